"""What a cycle of the service costs: its own code, in a process of its own on one core, beside a real Prometheus."""

import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from citadel_predictor.settings import DAY, DETECTION_STEP
from citadel_predictor.settings import read as read_settings

SERIES = 100
PER_TARGET = 20  # the default of max_series_per_target
HISTORY_DAYS = 90  # the default
SPARSE = 1200  # seconds between two samples of what is only read as means of an hour
RECENT = 4 * DAY  # before the end: by the five minutes, because detectors read them
HOUR = 3600
# Seconds from one cycle to the next, and whether the process has been started anew before it.
CYCLES = {
    "first, with training": (0, False),
    "five minutes later": (DETECTION_STEP, False),
    "an hour later, all forecast anew": (HOUR, False),
    "after a restart": (DETECTION_STEP, True),
    "a day later, with training": (DAY, False),
}


def samples(number: int, times: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Requests a second: a day's wave, weekends, slow growth, and noise."""
    random = np.random.default_rng(number)
    wave = 1.3 + np.sin(2 * np.pi * (times / DAY + random.uniform()))
    week = np.where((times // DAY + number) % 7 < 2, 0.6, 1.0)
    growth = 1 + random.uniform(0, 0.005) * (times - times[0]) / DAY
    return np.asarray(random.uniform(10, 200) * wave * week * growth * random.normal(1, 0.05, times.size))


def rules(count: int) -> dict[str, int]:
    """How many series each recording rule has."""
    return {
        f"model:bench_requests_{at // PER_TARGET}:rate5m": min(PER_TARGET, count - at)
        for at in range(0, count, PER_TARGET)
    }


def lines(count: int, first: int, last: int) -> Iterator[str]:
    """All samples of all series, in the text format that promtool makes blocks from."""
    recent = last - RECENT
    times = np.concatenate([np.arange(first, recent, SPARSE), np.arange(recent, last + 1, DETECTION_STEP)])
    for rule, size in rules(count).items():
        yield f"# TYPE {rule} gauge\n"
        for number in range(size):
            head = f'{rule}{{model="model-{number:02}"}}'
            found = zip(times.tolist(), samples(seed(rule) + number, times).tolist(), strict=True)
            yield "".join(f"{head} {value:.6g} {at}\n" for at, value in found)
    yield "# EOF\n"


def seed(rule: str) -> int:
    """The same in each run."""
    return sum(rule.encode()) * 100


def write_settings(folder: Path, url: str, port: int, count: int) -> Path:
    """Defaults as they are, with a limit and the date of its exhaustion for each series."""
    targets = [
        {"name": f"requests-{at}", "query": rule, "labels": ["model"], "limit": 1000, "capacity": True}
        for at, rule in enumerate(rules(count))
    ]
    settings = {
        "prometheus": {"url": url},
        "listen": {"port": port},
        "state_dir": str(folder / "state"),
        "targets": targets,
        "max_series": count,
    }
    path = folder / "predictor.json"
    path.write_text(json.dumps(settings))
    return path


def peak() -> float:
    """Most memory that this process has had since its program was started, in MB."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) / 1024


def measured(config: Path, now: int) -> list[dict[str, Any]]:
    """A row for each of CYCLES, the first at the time ``now``. Raises ValueError for one that is not complete."""
    from citadel_predictor.cycle import Clock
    from citadel_predictor.serve import Service

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    settings = read_settings(config)
    wall = float(now)
    said: list[tuple[str, dict[str, Any]]] = []

    def service() -> Service:
        made = Service(
            settings, lambda event, **fields: said.append((event, fields)), Clock(lambda: wall, lambda: wall)
        )
        made.front.server_close()
        return made

    running = service()
    rows = []
    for name, (seconds, restart) in CYCLES.items():
        wall += seconds
        began, spent = time.perf_counter(), time.process_time()
        if restart:
            running.cycle.save()
            running = service()
        said.clear()
        if not running.cycle.run():
            raise ValueError(f"the cycle {name!r} is not complete: {[each for each in said if 'why' in each[1]]}")
        text = running.metrics_text()
        rows.append(
            {
                "row": name,
                "cpu_seconds": round(time.process_time() - spent, 1),
                "wall_seconds": round(time.perf_counter() - began, 1),
                "peak_mb": round(peak()),
                "series": sum(len(board.series) for board in running.cycle.boards),
                "trained": sum(event == "model_card" for event, _ in said),
                "shown": sum(not line.startswith("#") for line in text.splitlines()),
            }
        )
    if "torch" in sys.modules:
        raise ValueError("PyTorch was loaded: the figures are not those of the service without it")
    return rows


def score(count: int, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """Rows of a process that has nothing else to do. Raises RuntimeError without a Prometheus."""
    from tests.monitoring.servers import check, free_port, promtool, run_prometheus

    last = int(time.time()) // DAY * DAY  # the last sample: a day and more after the first cycle
    now = last - 2 * DAY + 10 * HOUR + 120  # two minutes past an hour
    with tempfile.TemporaryDirectory(prefix="predictor-cycle-") as name:
        folder = Path(name)
        tell(f"{count} series: making {HISTORY_DAYS} days of samples")
        with (folder / "samples").open("w") as file:
            file.writelines(lines(count, now - (HISTORY_DAYS + 1) * DAY, last))
        options = ("--max-block-duration=2232h", "--quiet")
        made = check(
            promtool(), "tsdb", "create-blocks-from", "openmetrics", *options, folder / "samples", folder / "data"
        )
        if made.returncode:
            raise ValueError(f"promtool made no blocks: {made.stderr.strip()}")
        (folder / "samples").unlink()
        (folder / "prometheus.yml").write_text("global: {scrape_interval: 15s}\n")
        with (
            run_prometheus(folder / "prometheus.yml", folder / "data") as url,
            ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
        ):
            tell("cycles")
            return pool.submit(measured, write_settings(folder, url, free_port(), count), now).result()
