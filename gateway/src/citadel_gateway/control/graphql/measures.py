"""The types of figures. Money is USD, moments are seconds since the epoch, as everywhere in the gateway."""

from typing import TYPE_CHECKING, Any

import strawberry
from strawberry.scalars import JSON

from citadel_gateway.control.analytics import DAYS
from citadel_gateway.control.analytics import Analytics as StoredAnalytics
from citadel_gateway.control.figures import Figures
from citadel_gateway.errors import Refusal
from citadel_gateway.settings import Price as DeclaredPrice

if TYPE_CHECKING:
    Loose = dict[str, Any]
else:
    Loose = JSON


def days_of(days: int) -> int:
    if not 1 <= days <= DAYS:
        raise Refusal(400, "invalid_request", f"days must be between 1 and {DAYS}")
    return days


def picked(kind: type[Any], source: object, **more: Any) -> Any:
    """An object of `kind` from the fields of the same name."""
    names = [field.python_name for field in kind.__strawberry_definition__.fields if field.base_resolver is None]
    return kind(**{name: more[name] if name in more else getattr(source, name) for name in names})


@strawberry.type(description="Use, quality and worth of a group of requests.")
class Analytics:
    group: str
    requests: int
    refused: int
    errors: int
    input_tokens: float
    output_tokens: float
    cost_usd: float
    feedback: int
    correct: int
    incorrect: int
    accuracy: float | None
    rated: int
    satisfaction: float | None
    satisfied: int
    dissatisfied: int
    value_usd: float
    estimated_usd: float
    net_usd: float

    @classmethod
    def of(cls, found: StoredAnalytics) -> "Analytics":
        made: Analytics = picked(cls, found)
        return made


@strawberry.type(description="A span of seconds by quantile.")
class Quantiles:
    p50: float
    p95: float


@strawberry.type(description="A replica of a model.")
class Backend:
    address: str
    up: bool


@strawberry.type(description="What a model does now: rates of the last ten seconds, times of the last minute.")
class ModelFigures:
    name: str
    state: str
    draining: list[str]
    backends: list[Backend]
    inflight: int
    queue: int
    requests_per_second: float
    errors_per_minute: float
    limited_per_minute: float
    input_tokens_per_second: float
    output_tokens_per_second: float
    first_token_seconds: Quantiles | None
    duration_seconds: Quantiles | None
    cost_today_usd: float | None

    @classmethod
    def of(cls, name: str, found: Figures) -> "ModelFigures":
        return cls(
            name=name,
            state=found["state"],
            draining=found["draining"],
            backends=[Backend(address=one, up=up) for one, up in sorted(found["backends"].items())],
            inflight=int(found["inflight"]),
            queue=int(found["queue"]),
            requests_per_second=found["requests_per_second"],
            errors_per_minute=found["errors_per_minute"],
            limited_per_minute=found["limited_per_minute"],
            input_tokens_per_second=found["input_tokens_per_second"],
            output_tokens_per_second=found["output_tokens_per_second"],
            first_token_seconds=quantiles(found, "first_token_seconds"),
            duration_seconds=quantiles(found, "duration_seconds"),
            cost_today_usd=found.get("cost_today_usd"),
        )


def quantiles(found: Figures, name: str) -> Quantiles | None:
    return Quantiles(p50=found[name]["p50"], p95=found[name]["p95"]) if name in found else None


@strawberry.type(description="The gateway of this host now.")
class Metrics:
    at: float
    host: str
    workers: int
    connections: int
    inflight: int
    queue: int
    requests_per_second: float
    output_tokens_per_second: float
    errors_per_minute: float
    cost_today_usd: float | None
    models: list[ModelFigures]

    @classmethod
    def of(cls, found: Figures) -> "Metrics":
        total = found["total"]
        return cls(
            at=found["at"],
            host=found["host"],
            workers=found["workers"],
            connections=int(total.get("connections", 0)),
            inflight=int(total.get("inflight", 0)),
            queue=int(total.get("queue", 0)),
            requests_per_second=total.get("requests_per_second", 0.0),
            output_tokens_per_second=total.get("output_tokens_per_second", 0.0),
            errors_per_minute=total.get("errors_per_minute", 0.0),
            cost_today_usd=total.get("cost_today_usd"),
            models=[ModelFigures.of(name, one) for name, one in found["models"].items()],
        )


@strawberry.type(description="USD; the hardware's price is a share of the host's.")
class Price:
    share: float
    input_mtoken: float
    output_mtoken: float
    cached_mtoken: float

    @classmethod
    def of(cls, price: DeclaredPrice) -> "Price":
        made: Price = picked(cls, price)
        return made
