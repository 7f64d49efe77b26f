"""predictor.json: what is forecast, from where, how often. Read once into frozen structs.

A key that is not known is refused with its name, because a misspelt setting that is silently ignored is found weeks
later. What the types cannot say (a name given twice, a horizon that the step does not divide) is said by `problems`.
"""

import importlib.util
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct

from .anomaly import DETECTORS
from .forecast import METHODS

DAY = 86_400
DETECTION_STEP = 300  # seconds between two values that a detector sees; nothing is asked for in smaller steps
HORIZONS = {"1h": 3600, "6h": 6 * 3600, "1d": DAY, "7d": 7 * DAY, "30d": 30 * DAY}
LONG = {"7d", "30d"}  # forecast from daily values
THRESHOLD = "threshold"  # the detector that learns nothing: the target's limit
RESERVED = {
    "target",
    "horizon",
    "horizon_days",
    "quantile",
    "method",
    "detector",
    "level",
    "reason",
    "le",
    "host",
    "job",
}
SELECTOR = re.compile(r'[a-zA-Z_][a-zA-Z0-9_]*:[a-zA-Z0-9_:]*(\{(?:[^{}"]|"(?:[^"\\]|\\.)*")*\})?')

Port = Annotated[int, Meta(ge=1, le=65535)]
Seconds = Annotated[float, Meta(gt=0)]
Name = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}\Z")]
Label = Annotated[str, Meta(pattern=r"^[a-zA-Z_][a-zA-Z0-9_]{0,63}\Z")]
Horizon = Literal["1h", "6h", "1d", "7d", "30d"]


class ConfigError(Exception):
    """The settings cannot be used. One line for each problem, each naming the file."""

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


class Strict(Struct, frozen=True, forbid_unknown_fields=True):
    """Every rendered struct: nothing changes after reading, nothing unknown is swallowed."""


class Prometheus(Strict, frozen=True):
    """Who is asked. A password or a bearer token is in a file, read anew for each question."""

    url: str
    timeout_seconds: Seconds = 20.0
    username: str = ""
    password_file: str = ""
    bearer_file: str = ""
    ca_file: str = ""


class Listen(Strict, frozen=True):
    host: str = "127.0.0.1"
    port: Port = 9110


class Target(Strict, frozen=True):
    """One recording rule. `step` and `season` in seconds; the rule's values within a step become one by `aggregate`,
    those of a day by the same. `limit`: a number, or a recording rule that has it. `capacity`: thirty daily values and
    the day on which the limit is reached.
    """

    name: Name
    query: str
    labels: tuple[Label, ...] = ()
    aggregate: Literal["mean", "max", "min"] = "mean"
    step: Annotated[int, Meta(ge=DETECTION_STEP, le=DAY)] = 3600
    season: Annotated[int, Meta(ge=DETECTION_STEP, le=7 * DAY)] = DAY
    history_days: Annotated[int, Meta(ge=2, le=800)] = 90
    horizons: tuple[Horizon, ...] = ("1h", "6h", "1d", "7d", "30d")
    limit: float | str | None = None
    direction: Literal["above", "below"] = "above"
    capacity: bool = False
    detectors: tuple[str, ...] = ("robust", "ar", "iforest", "ensemble")


class Settings(Strict, frozen=True):
    """`methods` empty: all that `forecast.DEFAULT` has. Metrics of a series that has gone stay for `absent_seconds`,
    what was learnt of it for `forget_days`.
    """

    prometheus: Prometheus
    targets: Annotated[tuple[Target, ...], Meta(min_length=1)]
    listen: Listen = Listen()
    state_dir: str = "/var/lib/citadel-predictor"
    cycle_seconds: Annotated[float, Meta(ge=10, le=3600)] = 300.0
    retrain_seconds: Annotated[float, Meta(ge=60, le=30 * DAY)] = float(DAY)
    max_series_per_target: Annotated[int, Meta(ge=1, le=1000)] = 20
    max_series: Annotated[int, Meta(ge=1, le=5000)] = 200
    absent_seconds: Annotated[float, Meta(ge=60)] = 1800.0
    forget_days: Annotated[float, Meta(gt=0)] = 7.0
    methods: tuple[str, ...] = ()


def read(path: str | Path) -> Settings:
    """The settings, checked. Raises ConfigError with a line for each thing that is wrong."""
    try:
        settings = msgspec.json.decode(Path(path).read_bytes(), type=Settings)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:  # ValidationError is a DecodeError
        raise ConfigError(f"{path}: {error}") from None
    if found := problems(settings):
        raise ConfigError(*(f"{path}: {line}" for line in found))
    return settings


def problems(settings: Settings) -> list[str]:
    """What the types cannot say; each line names the key, its value and the remedy."""
    found = prometheus_problems(settings.prometheus)
    if not Path(settings.state_dir).is_absolute():
        found.append(f"state_dir: {settings.state_dir!r} is no absolute path")
    for name in settings.methods:
        if name not in METHODS:
            found.append(f"methods: there is no {name!r}: take some of {', '.join(METHODS)}")
        elif name == "lstm" and importlib.util.find_spec("torch") is None:
            found.append(
                "methods: 'lstm' needs torch, which is not here: install citadel-predictor[lstm], or leave it out"
            )
    names = Counter(target.name for target in settings.targets)
    found += [f"targets: the name {name!r} is there {count} times" for name, count in names.items() if count > 1]
    for target in settings.targets:
        found += [f"target {target.name!r}: {line}" for line in target_problems(target)]
    return found


def prometheus_problems(prometheus: Prometheus) -> list[str]:
    found = []
    parts = urlsplit(prometheus.url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        found.append(f"prometheus.url: {prometheus.url!r} is no address: write http://HOST:PORT")
    if parts.password is not None:
        found.append("prometheus.url: holds a password; put it into a file (prometheus.password_file)")
    if bool(prometheus.username) != bool(prometheus.password_file):
        found.append("prometheus: username and password_file belong together: give both or neither")
    if prometheus.username and prometheus.bearer_file:
        found.append("prometheus: username and bearer_file exclude each other: leave one out")
    return found


def target_problems(target: Target) -> list[str]:
    found = []
    if not SELECTOR.fullmatch(target.query):
        found.append(
            f"query: {target.query!r} does not select a recording rule (level:metric:operation, with matchers in braces"
            " if needed): record the expression in a rule and name that"
        )
    if isinstance(target.limit, str) and not SELECTOR.fullmatch(target.limit):
        found.append(
            f"limit: {target.limit!r} is neither a number nor a recording rule: record it, or write the number"
        )
    if target.limit is None and target.capacity:
        found.append("capacity: true needs a limit: the day is asked for on which it is reached")
    if target.capacity and "30d" not in target.horizons:
        found.append("capacity: true needs the horizon '30d' in horizons")
    if DAY % target.step:
        found.append(f"step: {target.step} seconds do not divide a day: take 300, 900 or 3600")
    if target.season % target.step or target.season < target.step:
        found.append(f"season: {target.season} is no multiple of the step of {target.step} seconds")
    if target.season // target.step > 2016:
        found.append(f"season: {target.season} seconds are more than 2016 steps of {target.step}: take a longer step")
    found += [
        f"horizons: {name!r} is shorter than the step of {target.step} seconds or no multiple of it"
        for name in target.horizons
        if name not in LONG and HORIZONS[name] % target.step
    ]
    found += [
        f"detectors: there is no {name!r}: take some of {', '.join([*DETECTORS, THRESHOLD])}"
        for name in target.detectors
        if name not in {*DETECTORS, THRESHOLD}
    ]
    if THRESHOLD in target.detectors and target.limit is None:
        found.append("detectors: 'threshold' needs a limit")
    found += [
        f"labels: {name!r} is a name of the predictor's own: keep another" for name in target.labels if name in RESERVED
    ]
    for key, values in (("labels", target.labels), ("horizons", target.horizons), ("detectors", target.detectors)):
        found += [f"{key}: {value!r} is there twice" for value, count in Counter(values).items() if count > 1]
    return found
