"""What a cycle of the service costs.

    python -m bench.predictor.cycle --series 100

from the root of the repository, with the predictor's requirements installed. CPU seconds and the peak of memory of one
process, with the defaults of the settings: 90 days by the hour, five horizons, four detectors. A Prometheus is not
needed: its answers are made here, and making them is not counted. Reading them is.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(threads, "1")  # as the command does, before numpy comes
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "predictor" / "src"))

import numpy as np
from citadel_predictor.cycle import Clock, Cycle
from citadel_predictor.exposition import Metrics
from citadel_predictor.prometheus import Client
from citadel_predictor.settings import DAY, DETECTION_STEP, Prometheus, Settings, Target
from citadel_predictor.state import Store

HOUR = 3600
PER_TARGET = 20  # the default of max_series_per_target
NOW = 20_775 * DAY + 10 * HOUR + 120  # two minutes past the hour: its last values are recorded


class FakePrometheus(Client):
    """A client that gets its answers from nowhere, as bytes: they are decoded as real ones are.

    ``spent``: CPU seconds for making them.
    """

    def __init__(self, series: dict[str, int]) -> None:
        """``series``: how many each rule has."""
        super().__init__(Prometheus("http://127.0.0.1:9"))
        self.series = series
        self.spent = 0.0
        self.questions = 0

    def _post(self, path: str, form: bytes) -> bytes:
        began = time.process_time()
        asked = dict(urllib.parse.parse_qsl(form.decode()))
        rule = next(name for name in self.series if name in asked["query"])
        times = np.arange(int(asked["start"]), int(asked["end"]) + 1, int(asked["step"]))
        result = [
            {"metric": {"model": f"model-{at:02}"}, "values": [[int(when), str(value)] for when, value in pairs]}
            for at in range(self.series[rule])
            for pairs in [zip(times, self.values(f"{rule}{at}", times), strict=True)]
        ]
        body = json.dumps({"status": "success", "data": {"resultType": "matrix", "result": result}}).encode()
        self.questions += 1
        self.spent += time.process_time() - began
        return body

    @staticmethod
    def values(name: str, times: Any) -> Any:
        """Days and weeks, a slow growth, and noise that is the same whenever one asks."""
        seed = sum(name.encode())
        hours = times / HOUR
        week = np.where((times // DAY + seed) % 7 < 2, 0.6, 1.0)
        noise = np.sin((times // DETECTION_STEP + 7919.0 * seed) * 12.9898) * 43758.5453 % 1 - 0.5
        shape = 1.3 + np.sin(2 * np.pi * (hours + seed) / 24) + 0.0001 * (hours - NOW / HOUR)
        return np.round(100 * week * shape * (1 + 0.1 * noise), 6)


@dataclass
class Bench:
    """A cycle beside clocks that are set by hand."""

    count: int
    folder: Path
    wall: float = NOW
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        rest = [min(PER_TARGET, self.count - at) for at in range(0, self.count, PER_TARGET)]
        self.client = FakePrometheus({f"model:bench_{chr(97 + at)}:rate5m": size for at, size in enumerate(rest)})
        targets = [Target(f"bench-{at}", rule, labels=("model",)) for at, rule in enumerate(self.client.series)]
        self.settings = Settings(Prometheus("http://127.0.0.1:9"), tuple(targets), max_series=self.count)
        self.start()

    def start(self) -> None:
        """As a new process does, but that this one keeps what it has imported."""
        self.metrics = Metrics()
        store = Store(self.folder, lambda *_, **__: None, lambda _: None)
        clock = Clock(lambda: self.wall, lambda: self.wall)
        self.cycle = Cycle(self.settings, self.client, store, self.metrics, lambda *_, **__: None, clock=clock)

    def measure(self, name: str, seconds: float) -> None:
        """One cycle, ``seconds`` after the last."""
        self.wall += seconds
        self.client.questions, self.client.spent, began = 0, 0.0, time.process_time()
        if not self.cycle.run():
            raise RuntimeError(f"the cycle {name!r} is not complete: {self.metrics.text(up_to_date=False)[-2000:]}")
        spent = time.process_time() - began - self.client.spent
        lines = self.metrics.text(up_to_date=True).splitlines()
        self.rows.append(
            {
                "cycle": name,
                "cpu_seconds": round(spent, 2),
                "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
                "questions": self.client.questions,
                "samples_shown": sum(not line.startswith("#") for line in lines),
            }
        )


def score(count: int, folder: Path) -> list[dict[str, Any]]:
    """A row for each kind of cycle."""
    bench = Bench(count, folder)
    bench.measure("first, with training", 0)
    bench.measure("quiet, five minutes later", DETECTION_STEP)
    bench.measure("an hour later, all forecast anew", HOUR)
    bench.cycle.save()
    bench.start()
    bench.measure("after a restart", DETECTION_STEP)
    bench.measure("a day later, with training", DAY)
    return bench.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--series", type=int, default=100, help="how many series (default: 100)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    chosen = parser.parse_args()
    if not 1 <= chosen.series <= 26 * PER_TARGET:
        parser.error(f"--series is {chosen.series}: take 1 to {26 * PER_TARGET}")
    with tempfile.TemporaryDirectory() as folder:
        rows = score(chosen.series, Path(folder))
    if chosen.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{'cycle':<34}{'CPU s':>8}{'peak MB':>9}{'questions':>11}{'samples shown':>15}")
    for row in rows:
        print(
            f"{row['cycle']:<34}{row['cpu_seconds']:>8}{row['peak_mb']:>9}{row['questions']:>11}{row['samples_shown']:>15}"
        )


if __name__ == "__main__":
    main()
