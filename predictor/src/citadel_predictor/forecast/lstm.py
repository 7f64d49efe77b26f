"""A small recurrent network for one series. Asked for by name only, and used where it does better than all the rest.

PyTorch is an extra (`citadel-predictor[lstm]`) and is imported with the first fit.
"""

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from .base import FloatArray

WINDOWS = 512  # that it learns from at most: the latest
AHEAD = 64  # steps that it answers with at once; further ones by feeding them back
LONGEST = 192  # steps that it looks back at


class MissingTorchError(ValueError):
    """PyTorch is not installed."""


def torch() -> Any:
    """PyTorch. Raises MissingTorchError, which choose() writes down as this method's reason."""
    try:
        return importlib.import_module("torch")
    except ImportError:
        raise MissingTorchError("PyTorch is not installed: install citadel-predictor[lstm]") from None


@dataclass(frozen=True)
class Trained:
    """The network, and how to go between its unit and that of the series.

    It sees and foretells the differences from one season ago, in units of their standard deviation.
    """

    network: Any
    values: FloatArray
    season: int
    spread: float
    back: int

    def predict(self, horizon: int) -> FloatArray:
        found = torch()
        size = self.values.size
        whole = np.concatenate([self.values, np.empty(horizon)])
        reach = float(np.ptp(self.values))
        low, high = float(self.values.min()) - reach / 2, float(self.values.max()) + reach / 2
        at = size
        while at < size + horizon:
            recent = (whole[at - self.back : at] - whole[at - self.back - self.season : at - self.season]) / self.spread
            with found.no_grad():
                answer = self.network(found.tensor(recent[None, :], dtype=found.float32))[0].numpy()
            for change in answer[: size + horizon - at]:
                whole[at] = min(max(whole[at - self.season] + float(change) * self.spread, low), high)
                at += 1
        return np.asarray(whole[size:], dtype=np.float64)


@dataclass(frozen=True)
class Lstm:
    """One layer of ``hidden`` cells over the last two seasons, and a line from its last state to the steps ahead."""

    name: str = "lstm"
    hidden: int = 24
    epochs: int = 30
    seed: int = 20261124

    def least(self, season: int) -> int:
        return 4 * season + 48

    def fit(self, values: FloatArray, season: int) -> Trained:
        if values.size < self.least(season):
            raise ValueError(f"{values.size} values are fewer than {self.least(season)}")
        found = torch()
        changes = values[season:] - values[:-season]
        spread = float(changes.std())
        if spread <= 1e-12 * max(1.0, float(np.abs(values).max())):
            raise ValueError("the series repeats itself: there is nothing to learn")
        back, ahead = min(2 * season, LONGEST), min(max(season, 6), AHEAD)
        pieces = np.lib.stride_tricks.sliding_window_view(changes / spread, back + ahead)[-WINDOWS:]
        if len(pieces) < 16:
            raise ValueError(f"{values.size} values give {len(pieces)} examples: too few to learn from")
        network = self._learn(found, pieces[:, :back], pieces[:, back:])
        return Trained(network, values, season, spread, back)

    def _learn(self, found: Any, seen: FloatArray, coming: FloatArray) -> Any:
        """A network fitted by Adam on the absolute error; the same one each time, whatever else used the generator."""
        with found.random.fork_rng(devices=[]):
            found.manual_seed(self.seed)
            network = build(found, self.hidden, coming.shape[1])
            rows = found.tensor(np.ascontiguousarray(seen), dtype=found.float32)
            wanted = found.tensor(np.ascontiguousarray(coming), dtype=found.float32)
            steps = found.optim.Adam(network.parameters(), lr=0.01, weight_decay=1e-4)
            for _ in range(self.epochs):
                for chosen in found.randperm(len(rows)).split(64):
                    steps.zero_grad()
                    found.nn.functional.l1_loss(network(rows[chosen]), wanted[chosen]).backward()
                    found.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                    steps.step()
        return network.eval()


def build(found: Any, hidden: int, ahead: int) -> Any:
    """The network: (n, back) in, (n, ahead) out. Its class is made here, because its base comes with PyTorch."""

    class Network(found.nn.Module):  # type: ignore[misc]  # its base is not known without PyTorch
        def __init__(self) -> None:
            super().__init__()
            self.cells = found.nn.LSTM(1, hidden, batch_first=True)
            self.line = found.nn.Linear(hidden, ahead)

        def forward(self, rows: Any) -> Any:
            states, _ = self.cells(rows[:, :, None])
            return self.line(states[:, -1])

    return Network()
