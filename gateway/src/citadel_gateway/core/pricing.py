"""What a request costs: the engine's time on the operator's own hardware, its energy, and a price of tokens if any.

A host that cost 20,000 USD, lives four years and works 60 % of them must earn its price back in the seconds in which it
works; a model bears its `share` of the host. Engine seconds are those of the whole engine: a second in which four
requests ran is a quarter for each, so that the sum over requests is the time in which the engine worked.
"""

from collections.abc import Iterable, Mapping
from typing import Final

from citadel_gateway.settings import Hardware, Model, Price

YEAR_SECONDS: Final = 365.25 * 86_400
HOUR_SECONDS: Final = 3600.0
MILLION: Final = 1e6
FREE: Final = Price()

Components = dict[str, float]  # "hardware", "energy", "tokens": USD


class Rate:
    """USD of a model: for a second in which its engine works, and for a token."""

    __slots__ = ("cached_token", "energy", "hardware", "idle_hour", "input_token", "output_token")

    def __init__(
        self,
        hardware: float = 0.0,
        energy: float = 0.0,
        input_token: float = 0.0,
        output_token: float = 0.0,
        cached_token: float = 0.0,
        idle_hour: float = 0.0,
    ) -> None:
        self.hardware = hardware
        self.energy = energy
        self.input_token = input_token
        self.output_token = output_token
        self.cached_token = cached_token
        self.idle_hour = idle_hour

    @property
    def second(self) -> float:
        return self.hardware + self.energy


def rate_of(hardware: Hardware, price: Price) -> Rate:
    life = hardware.lifetime_years * YEAR_SECONDS
    standing = hardware.usd / life * price.share  # a second of its life, at work or not
    return Rate(
        hardware=standing / hardware.utilisation,
        energy=hardware.watts / 1000 * hardware.usd_per_kwh / HOUR_SECONDS * price.share,
        input_token=price.input_mtoken / MILLION,
        output_token=price.output_mtoken / MILLION,
        cached_token=price.cached_mtoken / MILLION,
        idle_hour=standing * HOUR_SECONDS,
    )


class Prices:
    """The rates of all models. A model that is not known costs nothing."""

    def __init__(self, hardware: Hardware, models: Iterable[Model]) -> None:
        self.rates: Mapping[str, Rate] = {model.name: rate_of(hardware, model.price) for model in models}
        self.free = rate_of(hardware, FREE)

    def rate(self, model: str) -> Rate:
        return self.rates.get(model, self.free)

    def cost(
        self, model: str, input_tokens: int, output_tokens: int, cached_tokens: int, engine_seconds: float
    ) -> tuple[float, Components]:
        """USD, in all and by component; a component of nothing is left out. Cached tokens are some of the input."""
        rate = self.rates.get(model, self.free)
        cached = min(cached_tokens, input_tokens)
        hardware = rate.hardware * engine_seconds
        energy = rate.energy * engine_seconds
        tokens = rate.input_token * (input_tokens - cached) + rate.output_token * output_tokens
        tokens += rate.cached_token * cached
        found = {}
        if hardware:
            found["hardware"] = hardware
        if energy:
            found["energy"] = energy
        if tokens:
            found["tokens"] = tokens
        return hardware + energy + tokens, found

    def per_token(self, model: str, tokens_per_engine_second: float) -> float:
        """USD for a token that is generated, when the engine makes that many in a second."""
        rate = self.rate(model)
        time = rate.second / tokens_per_engine_second if tokens_per_engine_second > 0 else 0.0
        return time + rate.output_token

    def estimate(self, model: str, input_tokens: int, output_tokens: int, tokens_per_engine_second: float) -> float:
        """USD that a request will cost, before it has run: what a budget is compared with."""
        rate = self.rate(model)
        return rate.input_token * input_tokens + self.per_token(model, tokens_per_engine_second) * output_tokens

    def idle_per_hour(self, model: str) -> float:
        """USD of hardware for an hour in which the model does nothing. Its energy is not in it: `watts` are those of
        a host at work.
        """
        return self.rate(model).idle_hour
