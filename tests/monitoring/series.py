"""Thirty days of a plausible platform, as the series that the recording rules leave behind.

Four models on one server, with days, weeks, growth and noise; a deployment of the gateway in the morning of the last
day; one incident in the last hours (`INCIDENT`), in which a model runs out of KV cache. The same seed gives the same
figures. A value every fifteen minutes, every five in the
last day, every minute in the last hour; raw series are not needed, because dashboards
read none. `build` makes blocks of a Prometheus of it: with blocks of a month, two million samples take seconds.
"""

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.monitoring.servers import check, promtool, run_prometheus

ROOT = Path(__file__).resolve().parents[2]
RECOMMENDATIONS = ROOT / "files/monitoring/rules/recording_recommendations.yml"
DAYS, BEFORE = 30, 14  # days that are written, and days before them that what looks back starts from
STEP = 900
END = 1_795_703_760  # a Thursday, 14:36 UTC: always the same, and Prometheus is asked for that moment
OPTIONS = ("--query.lookback-delta=16m",)  # Prometheus must look back further than the step
SERVER, SQL, METRICS = "hx-llm-server-01", "hx-sql-01", "hx-metrics-01"
INCIDENT = (-2.6, -1.7)  # hours before the end
GIB = 2.0**30
Column = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Model:
    """What a day of the model is like: requests a second at its height, seconds, tokens, dollars, cores, bytes."""

    name: str
    peak: float
    seconds: float
    first: float
    tokens: float
    dollars: float
    cores: int
    memory: float
    target: tuple[float, float]  # seconds, requests a minute
    score: float
    worth: float
    work: float  # share of its cores that the peak needs


MODELS = (
    Model("mixtral-8x7b", 0.62, 1.30, 0.46, 310, 1.90, 8, 90 * GIB, (2.0, 50), 8.3, 0.0062, 0.78),
    Model("hermes-2", 1.05, 0.92, 0.31, 240, 0.86, 4, 15 * GIB, (1.5, 80), 7.8, 0.0021, 0.37),
    Model("openchat-3.5", 1.50, 0.61, 0.22, 180, 0.72, 4, 10 * GIB, (1.0, 120), 7.1, 0.0011, 0.7),
    Model("phi-3-mini", 2.60, 0.29, 0.09, 95, 0.40, 2, 6 * GIB, (0.5, 200), 6.4, 0.0004, 0.97),
)


@dataclass
class World:
    """The clock of all series, and those that exist: (name, labels, values)."""

    end: int = END
    seed: int = 5
    found: list[tuple[str, dict[str, str], Column]] = field(default_factory=list)

    def __post_init__(self) -> None:
        bounds = ((self.end - (DAYS + BEFORE) * 86_400, STEP), (self.end - 86_400, 300), (self.end - 3600, 60))
        ends = (bounds[1][0], bounds[2][0], self.end + 1)
        pieces = [np.arange(start, end, step) for (start, step), end in zip(bounds, ends, strict=True)]
        self.at = np.concatenate(pieces).astype(np.float64)
        self.hours = (self.at - self.end) / 3600
        self.days = self.hours / 24
        self.noise = np.random.default_rng(self.seed)

    def add(self, name: str, values: Column | float, **labels: str) -> None:
        self.found.append((name, labels, np.broadcast_to(np.asarray(values, dtype=np.float64), self.at.shape)))

    def rough(self, share: float, memory: float = 0.8) -> Column:
        """Noise around 1 that remembers: what is high now is likely to be high in a quarter of an hour."""
        steps = self.noise.normal(0, share * (1 - memory**2) ** 0.5, self.at.shape)
        out = np.empty_like(steps)
        last = 0.0
        for number, step in enumerate(steps):
            last = out[number] = memory * last + step
        return np.clip(1 + out, 0.05, None)

    def season(self, night: float = 0.12, weekend: float = 0.35) -> Column:
        """Office hours, weekdays, and two per cent more each week."""
        hour = (self.at / 3600) % 24
        day = np.exp(-(((hour - 11) / 3.2) ** 2)) + 0.9 * np.exp(-(((hour - 15.5) / 2.6) ** 2))
        weekday = ((self.at // 86_400) + 3) % 7
        shape = night + (1 - night) * day / 1.18
        grown: Column = shape * np.where(weekday >= 5, weekend, 1) * 1.02 ** (self.days / 7)
        return grown

    def during(self, first: float, last: float) -> Column:
        """How deep in the middle of these hours a moment is: 0 outside, up to 1 within."""
        middle, half = (first + last) / 2, (last - first) / 2
        depth: Column = np.clip(1 - ((self.hours - middle) / half) ** 2, 0, 1)
        return depth

    def rolled(self, values: Column, hours: float) -> Column:
        """The mean of the hours before each moment."""
        weight = np.gradient(self.at)
        total = np.concatenate([[0], np.cumsum(values * weight)])
        span = np.concatenate([[0], np.cumsum(weight)])
        since = np.searchsorted(self.at, self.at - hours * 3600)
        index = np.arange(1, len(self.at) + 1)
        mean: Column = (total[index] - total[since]) / (span[index] - span[since])
        return mean

    def back(self, values: Column, days: float) -> Column:
        moved: Column = np.interp(self.at - days * 86_400, self.at, values)
        return moved


def generate() -> World:
    """Every series, up to END."""
    world = World()
    totals = {name: np.zeros_like(world.at) for name in ("requests", "tokens", "cost", "value", "realised", "risk")}
    for model in MODELS:
        one_model(world, model, totals)
    platform(world, totals)
    objectives(world)
    machines(world)
    monitoring(world)
    alerts(world)
    return world


def one_model(world: World, model: Model, totals: dict[str, Column]) -> None:
    name, calm = model.name, world.season() * world.rough(0.07)
    sick = world.during(*INCIDENT) * (1.0 if name == "mixtral-8x7b" else 0.0)
    stumble = world.during(-150, -147) * (1.0 if name == "openchat-3.5" else 0.0)
    load = calm / 1.02 ** (world.days / 7)
    requests = model.peak * calm * (1 + 0.35 * sick)
    errors = np.clip(0.0007 * world.rough(0.5) + 0.045 * sick + 0.03 * stumble, 0, 1)
    shed = np.clip(0.0004 * load + 0.08 * np.clip(sick - 0.4, 0, 1), 0, 1)
    left = 0.006 * world.rough(0.2) + 0.04 * sick

    def put(series: str, values: Column | float, **labels: str) -> None:
        world.add(series, values, model=name, **labels)

    def ratio(series: str, values: Column) -> None:
        put(f"model:{series}", values)

    # traffic
    put("model:llm_gateway_requests:rate5m", requests)
    put("model:llm_gateway_requests:increase1h", 3600 * world.rolled(requests, 1))
    limited = 0.011 * world.rough(0.3)
    codes = {"200": 1 - errors - shed - left - limited, "429": limited, "503": 0.6 * errors + shed, "502": 0.3 * errors}
    for code, part in {**codes, "timeout": 0.1 * errors, "client_closed": left}.items():
        put("model_code:llm_gateway_requests:rate5m", requests * part, code=code)
    put("model:llm_gateway_errors:rate5m", requests * errors)
    ratio("llm_gateway_errors:ratio_rate5m", errors)
    ratio("llm_gateway_closed_by_client:ratio_rate5m", left)
    for reason, share in (("connect", 0.2), ("timeout", 0.5), ("status", 0.3)):
        put("model_reason:llm_gateway_upstream_errors:rate5m", requests * errors * share, reason=reason)
    put("model:llm_gateway_retries:rate5m", requests * errors * 0.6)
    if model.cores > 2:
        put("model_to:llm_gateway_fallbacks:rate5m", requests * errors * 0.4, to_model="phi-3-mini")
    for reason, share in (("full", 0.7), ("wait", 0.3)):
        put("model_reason:llm_gateway_shed:rate5m", requests * shed * share, reason=reason)
    ratio("llm_gateway_shed:ratio_rate5m", shed)
    for reason, share in (("requests", 0.6), ("tokens", 0.4)):
        put("model_reason:llm_gateway_ratelimited:rate5m", requests * limited * share, reason=reason)

    # times
    slow = (1 + 0.4 * load**2) * world.rough(0.05) * (1 + 1.8 * sick)
    for quantile, factor in (("0.5", 0.55), ("0.95", 1.0), ("0.99", 1.45)):
        put(
            "model:llm_gateway_request_duration_seconds:quantile_rate5m",
            model.seconds * slow * factor,
            quantile=quantile,
        )
    put("model:llm_gateway_request_duration_seconds:mean_rate5m", model.seconds * slow * 0.6)
    first = model.first * (1 + 0.5 * load**2) * world.rough(0.06) * (1 + 3.4 * sick)
    for quantile, factor in (("0.5", 0.5), ("0.95", 1.0)):
        put("model:llm_gateway_time_to_first_token_seconds:quantile_rate5m", first * factor, quantile=quantile)
    put("model:llm_gateway_queue_seconds:quantile_rate5m", 0.04 * load * world.rough(0.2) + 4.5 * sick, quantile="0.95")
    z = (requests - world.rolled(requests, 24)) / (0.55 * np.maximum(world.rolled(requests, 24), 0.02))
    put("model:llm_gateway_requests:zscore1d", z)
    put("model:llm_gateway_request_duration_seconds:zscore1d", (slow - world.rolled(slow, 24)) / 0.2)
    put("model:llm_gateway_requests:ratio_offset1w", requests / np.maximum(world.back(requests, 7), 1e-3))

    # what is under way
    put(
        "model:llm_gateway_inflight_requests:sum", np.round(requests * model.seconds * slow * 2 * world.rough(0.2, 0.2))
    )
    put("model:llm_gateway_queue_length:sum", np.round(26 * sick * world.rough(0.1) + np.clip(load - 0.85, 0, 1) * 6))

    # tokens and money
    output = requests * model.tokens * world.rough(0.04)
    incoming = 2.6 * output
    put("model:llm_gateway_output_tokens:rate5m", output)
    put("model:llm_gateway_tokens:rate5m", output + incoming)
    ratio("llm_gateway_cached_tokens:ratio_rate5m", np.clip(0.34 * world.rough(0.08), 0, 1))
    busy = np.clip(0.25 + 0.75 * load, 0, 1)
    usd = world.rolled(model.dollars * busy * world.rough(0.03), 1)
    for component, share in (("hardware", 0.74), ("energy", 0.19), ("tokens", 0.07)):
        put("model_component:llm_gateway_cost_usd_per_hour:rate1h", usd * share, component=component)
    put("model:llm_gateway_cost_usd_per_hour:rate1h", usd)
    put("model:llm_gateway_idle_usd_per_hour:sum", model.dollars * 0.7)
    hourly = np.maximum(world.rolled(requests, 1), 1e-3)
    put("model:llm_gateway_cost_usd_per_request:ratio_rate1h", usd / 3600 / hourly)
    put("model:llm_gateway_cost_usd_per_megatoken:ratio_rate1h", 1e6 * usd / 3600 / (hourly * model.tokens * 3.6))
    put("model:llm_gateway_tokens_per_usd:ratio_rate1h", hourly * model.tokens * 3600 / usd)

    # quality
    votes = 86_400 * world.rolled(requests, 24)
    accuracy = np.clip(
        (0.76 + 0.022 * model.score) * world.rough(0.006, 0.97) - 0.05 * world.rolled(stumble, 24) * 20, 0, 1
    )
    score = np.clip(model.score * world.rough(0.012, 0.97) - world.rolled(sick + stumble, 24) * 9, 1, 10)
    low = np.clip(0.52 - 0.058 * score, 0.01, 1)
    put("model:llm_feedback_votes:increase1d", np.round(votes * 0.018))
    put("model:llm_feedback_ratings:increase1d", np.round(votes * 0.011))
    put("model:llm_feedback_accuracy:ratio_rate1d", accuracy)
    for source, more in (("user", 0.0), ("judge", 0.025), ("golden", -0.015)):
        put("model_source:llm_feedback_accuracy:ratio_rate1d", np.clip(accuracy + more, 0, 1), source=source)
    put("model:llm_feedback_satisfaction:mean1d", score)
    put("model:llm_feedback_satisfaction_low:ratio_rate1d", low)
    gone = np.clip(0.13 * world.rough(0.05, 0.95) + 0.5 * low, 0, 1)
    for outcome, part in (("completed", 1 - gone), ("abandoned", gone)):
        put("model_outcome:llm_gateway_conversations:increase1d", np.round(votes * 0.08 * part), outcome=outcome)
    put("model:llm_gateway_conversations_abandoned:ratio_rate1d", gone)
    put("model:llm_gateway_conversations_turns:mean1d", 3.4 * world.rough(0.03, 0.95))

    # value
    realised = 3600 * world.rolled(requests * model.worth * world.rough(0.05), 24)
    put("model:llm_business_value_usd_per_hour:rate1d", realised * 0.96)
    put("model:llm_business_estimated_usd_per_hour:rate1h", 3600 * hourly * model.worth * 0.4)
    put("model:llm_business_return:ratio_rate1d", realised * 0.96 / world.rolled(usd, 24))
    risk = realised * np.clip(errors + shed, 0, 1)
    put("model:llm_business_value_at_risk_usd_per_hour:ratio", risk)
    sums = {
        "requests": requests,
        "tokens": output + incoming,
        "cost": usd,
        "value": realised * 0.96,
        "realised": realised,
    }
    for key, values in {**sums, "risk": risk}.items():
        totals[key] += values

    engine(world, model, requests, output, load, sick)
    levels(world, name, errors, first, slow)
    forecasts(world, "requests", requests, model=name)


def engine(world: World, model: Model, requests: Column, output: Column, load: Column, sick: Column) -> None:
    def put(series: str, values: Column | float, **labels: str) -> None:
        world.add(series, values, model=model.name, **labels)

    for series in ("model:llm_engine_up:min", "model:llm_gateway_backend_up:min", "model:llm_gateway_backend_up:sum"):
        put(series, 1)
    put("model:llm_gateway_draining:max", 0)
    put("model:llm_gateway_circuit_state:max", np.where(sick > 0.9, 1.0, 0.0))
    cache = np.clip(0.1 + 0.5 * load * world.rough(0.12) + 0.75 * sick, 0, 1)
    put("model:llm_engine_kv_cache_usage:ratio", cache)
    put("model:llm_engine_preemptions:rate5m", np.where(cache > 0.97, 0.7 * sick, 0))
    put("model:llm_engine_running_requests:sum", np.round(requests * model.seconds * 1.6 * world.rough(0.2, 0.2)))
    put("model:llm_engine_waiting_requests:sum", np.round(9 * sick))
    put("model:llm_engine_prefix_cache_hits:ratio_rate5m", np.clip(0.36 * world.rough(0.08), 0, 1))
    put("model:llm_engine_prompt_tokens:rate5m", 2.6 * output)
    put("model:llm_engine_generation_tokens:rate5m", output)
    for reason, share in (("stop", 0.86), ("length", 0.125), ("abort", 0.01), ("error", 0.005)):
        put("model_reason:llm_engine_finished_requests:rate5m", requests * share, finished_reason=reason)
    put("model:llm_engine_failed_requests:ratio_rate5m", 0.005 * world.rough(0.2))
    slow = world.rough(0.06) * (1 + 0.3 * load + 1.2 * sick)
    put("model:llm_engine_inter_token_latency_seconds:quantile_rate5m", model.seconds * 0.035 * slow, quantile="0.95")
    put("model:llm_engine_time_to_first_token_seconds:quantile_rate5m", model.first * 0.8 * slow, quantile="0.95")
    put("model:llm_engine_queue_seconds:quantile_rate5m", 0.02 * load + 1.6 * sick, quantile="0.95")
    cores = np.clip(model.cores * (0.03 + model.work * load) * world.rough(0.08), 0.05, model.cores)
    put("model:citadel_unit_cpu_cores:rate5m", cores)
    put("model:citadel_unit_memory_bytes:sum", model.memory * np.clip(0.71 + 0.06 * cache + 0.0008 * world.days, 0, 1))
    put("model:citadel_unit_oom_kills:increase1h", 0)
    put("model:citadel_engine_canary_seconds:max", model.first * slow)
    put("model:citadel_engine_canary_failures:max", 0)
    put("model:llm_engine_tokens_per_core_second:ratio_rate5m", output / cores)
    put("model:llm_engine_busy:ratio_avg1d", np.clip(world.rolled(np.clip(1.6 * load, 0, 1), 24), 0, 1))


def levels(world: World, model: str, errors: Column, first: Column, slow: Column) -> None:
    """Service levels: the errors of each indicator over its windows, the budget that is left, and how fast it burns."""
    late = np.clip(0.012 + 0.25 * np.clip(first - 0.6, 0, 2), 0, 1)
    long = np.clip(0.015 + 0.2 * np.clip(slow - 1.5, 0, 2), 0, 1)
    for slo, bad, allowed in (("availability", errors, 0.005), ("ttft", late, 0.05), ("latency", long, 0.05)):
        labels = {"slo": slo, "model": model}
        windows = {"5m": bad, "1h": world.rolled(bad, 1), "30d": world.rolled(bad, 30 * 24)}
        for window, values in windows.items():
            world.add(f"slo:sli_error:ratio_rate{window}", values, **labels)
        world.add("slo:burn_rate:ratio1h", windows["1h"] / allowed, **labels)
        world.add("slo:error_budget_remaining:ratio", 1 - windows["30d"] / allowed, **labels)


METHODS = {"1h": "ridge", "6h": "ridge", "1d": "ridge", "7d": "linear", "30d": "linear"}


def forecasts(world: World, target: str, actual: Column, **labels: str) -> None:
    """What a decent predictor would have said: the truth of the horizon ahead, less its accidents, with an error."""
    usual = world.rolled(actual, 1.0)
    for horizon, ahead in (("1h", 1 / 24), ("6h", 0.25), ("1d", 1), ("7d", 7), ("30d", 30)):
        week = world.back(usual, 7 - ahead) if ahead < 7 else world.rolled(actual, 24)
        centre = week * world.rough(0.03, 0.95) * 1.02
        where = {"target": target, **labels, "horizon": horizon, "method": METHODS[horizon]}
        for quantile, factor in (("0.1", 0.86), ("0.5", 1.0), ("0.9", 1.16)):
            world.add("target:llm_forecast_value:max", centre * factor, **where, quantile=quantile)
        world.add("target:llm_forecast_mase:max", (0.62 + 0.1 * ahead**0.3) * world.rough(0.03, 0.98), **where)
    world.add(
        "target:llm_forecast_coverage:ratio",
        np.clip(0.81 * world.rough(0.01, 0.98), 0, 1),
        target=target,
        level="0.8",
        **labels,
    )
    world.add("target:llm_forecast_history_days:max", 60 + world.days, target=target, **labels)
    world.add("target:llm_forecast_age_seconds:min", 60 + (world.at % 300), target=target, **labels)
    odd = world.during(*INCIDENT) * (1.0 if labels.get("model") in (None, "mixtral-8x7b") else 0.0)
    for detector, height in (("robust", 2.1), ("ar", 1.7), ("iforest", 1.3), ("ensemble", 1.5)):
        score = 0.32 * world.rough(0.35, 0.5) + height * odd
        world.add("target_detector:llm_anomaly_score:max", score, target=target, detector=detector, **labels)
    agree = np.where(odd > 0.6, 3, np.where(odd > 0.3, 2, np.nan))
    agree = np.where(np.isnan(agree) & (world.noise.random(world.at.shape) > 0.995), 1, agree)
    agree[-8:] = 1 if labels.get("model") == "openchat-3.5" else agree[-8:]
    world.add("target:llm_anomaly_detectors:count", agree, target=target, **labels)


def platform(world: World, totals: dict[str, Column]) -> None:
    cost, value = totals["cost"], totals["value"]
    world.add("platform:llm_gateway_requests:rate5m", totals["requests"])
    world.add("platform:llm_gateway_tokens:rate5m", totals["tokens"])
    world.add("platform:llm_gateway_cost_usd_per_hour:rate1h", cost)
    day = 24 * world.rolled(cost, 24)
    world.add("platform:llm_gateway_cost_usd:increase1d", day)
    for period, budget, used in (("day", 60.0, day), ("month", 1500.0, 720 * world.rolled(cost, 720))):
        world.add("period:llm_budget_usd:max", budget, period=period)
        world.add("period:llm_budget_used:ratio", used / budget, period=period)
    world.add("platform:llm_business_value_usd_per_hour:rate1d", value)
    world.add("platform:llm_business_return:ratio_rate1d", value / world.rolled(cost, 24))
    world.add("platform:llm_business_value_at_risk_usd_per_hour:sum", totals["risk"])
    for use_case, share in (("support", 0.44), ("drafting", 0.27), ("search", 0.18), ("code", 0.11)):
        labels = {"use_case": use_case}
        world.add(
            "use_case:llm_business_value_usd_per_hour:rate1d",
            totals["realised"] * share * world.rough(0.03, 0.97),
            **labels,
        )
    hour = (world.at / 3600) % 24
    weekday = ((world.at // 86_400) + 3) % 7
    people = 142 * 1.03 ** (world.days / 7)
    today = np.round(people * np.where(weekday >= 5, 0.22, 0.62) * np.clip((hour - 5) / 11, 0.02, 1))
    world.add("window:llm_gateway_active_users:max", today, window="day")
    world.add("window:llm_gateway_active_users:max", np.round(people), window="week")
    world.add("platform:llm_gateway_adoption:ratio", today / np.round(people))
    world.add("platform:llm_gateway_conversations_open:max", np.round(48 * world.season() * world.rough(0.1)))
    for tier, share in (("gold", 0.5), ("silver", 0.35), ("bronze", 0.15)):
        for outcome, part in (("served", 0.97), ("refused", 0.02), ("failed", 0.01)):
            rate = totals["requests"] * share * part
            world.add("tier_outcome:llm_gateway_requests:rate5m", rate, tier=tier, outcome=outcome)
    forecasts(world, "cost", cost)
    forecasts(world, "disk", 0.55 * np.ones_like(cost) + 0.004 * world.days)
    capacity(world)
    world.add("platform:llm_predictor_series_limited:increase1h", 0)


def capacity(world: World) -> None:
    """Thirty daily values of two capacity targets with their limits, and the day on which they are reached."""
    for target, model, start, growth, limit in (
        ("disk", "", 0.66, 0.0052, 0.9),
        ("peak-load", "mixtral-8x7b", 0.7, 0.0085, 0.83),
    ):
        labels = {"target": target} | ({"model": model} if model else {})
        world.add("target:llm_forecast_limit:max", limit, **labels)
        for day in range(1, 31):
            swing = 0.015 * np.sin(2 * np.pi * day / 7)
            for quantile, wide in (("0.1", -0.004), ("0.5", 0.0), ("0.9", 0.004)):
                ahead = start + (growth + wide * 0.3) * (day + world.days) + swing + wide * day**0.6
                where = {**labels, "horizon_days": str(day), "quantile": quantile, "method": "linear"}
                world.add("target:llm_forecast_value:max", ahead, **where)
        for quantile, factor in (("0.1", 0.86), ("0.5", 1.0), ("0.9", 1.22)):
            days = np.clip((limit - start) / growth - world.days, 0, None) * factor * (0.5 if model else 0.6)
            world.add("target:llm_forecast_limit_eta_seconds:min", days * 86_400, **labels, quantile=quantile)


def objectives(world: World) -> None:
    """What the role renders from the inventory."""
    for slo, share in (("availability", 0.995), ("ttft", 0.95)):
        world.add("slo:objective:ratio", share, slo=slo)
    for model in MODELS:
        world.add("slo:objective:ratio", 0.95, slo="latency", model=model.name)
        world.add("model:llm_objective_latency_seconds:target", model.target[0], model=model.name)
        world.add("model:llm_objective_requests_per_minute:target", model.target[1], model=model.name)
        world.add("model:llm_given_cores:sum", model.cores, model=model.name)
        world.add("model:llm_given_memory_bytes:sum", model.memory, model=model.name)


def machines(world: World) -> None:
    load = world.season() * world.rough(0.06)
    for host, level in ((SERVER, 0.62), (SQL, 0.18), (METRICS, 0.12)):
        busy = np.clip(level * (0.25 + 0.75 * load), 0, 1)
        world.add("instance:node_cpu_utilisation:rate5m", busy, instance=host)
        world.add("instance:node_load1_per_core:ratio", busy * 1.3 * world.rough(0.1), instance=host)
        world.add("instance:node_memory_used:ratio", np.clip(0.3 + level * 0.62 + 0.05 * load, 0, 1), instance=host)
        for mountpoint, used in (("/", 0.41), ("/srv", 0.66 if host == SERVER else 0.3)):
            values = np.clip(used + 0.0021 * world.days, 0, 1)
            world.add("instance_mountpoint:node_filesystem_used:ratio", values, instance=host, mountpoint=mountpoint)
        world.add("instance:node_network_receive_bytes:rate5m", 2.1e6 * level * load, instance=host)
        world.add("instance:node_network_transmit_bytes:rate5m", 3.8e6 * level * load, instance=host)
        world.add("instance:node_disk_io_time:rate5m", np.clip(0.09 * load * world.rough(0.3), 0, 1), instance=host)
    here = {"instance": SERVER}
    world.add("instance:redis_up:min", 1, **here)
    world.add("instance:redis_memory_used:ratio", 0.21 + 0.05 * load, **here)
    world.add("instance:redis_commands:rate5m", 46 * load, **here)
    world.add("instance:pg_up:min", 1, instance=SQL)
    world.add("instance:pg_connections:ratio", 0.18 + 0.07 * load, instance=SQL)
    world.add("instance:pg_database_size_bytes:sum", 4.1 * GIB * 1.03 ** (world.days / 7), instance=SQL)
    world.add("instance:llm_gateway_workers:sum", 2, **here)
    world.add("instance:llm_gateway_connections:sum", np.round(60 * load * world.rough(0.1, 0.3)), **here)
    world.add("instance:llm_gateway_limit_store_up:min", 1, **here)
    world.add(
        "instance:llm_gateway_limit_store_seconds:quantile_rate5m", 0.0009 * world.rough(0.15), **here, quantile="0.95"
    )
    world.add(
        "instance:llm_gateway_journal_lag_seconds:max", 1.1 * world.rough(0.3) + 30 * world.during(-5, -4.6), **here
    )
    world.add("instance:llm_gateway_lost_records:increase1h", 0, **here)
    world.add("instance:llm_gateway_dropped_labels:increase1h", 0, **here)
    for version, there in (("0.4.1", world.hours < -4), ("0.4.2", world.hours >= -4)):
        world.add("instance_version:llm_gateway_build_info:max", np.where(there, 1, np.nan), **here, version=version)
    gpu = {**here, "gpu": "0"}
    world.add("instance_gpu:gpu_utilisation:ratio", np.clip(0.7 * load, 0, 1), **gpu)
    world.add("instance_gpu:gpu_memory_used:ratio", 0.82, **gpu)
    world.add("instance_gpu:gpu_temperature_celsius:max", 46 + 22 * load, **gpu)
    world.add("instance_gpu:gpu_power_watts:rate5m", 70 + 180 * load, **gpu)


JOBS = {
    "citadel-gateway": (SERVER, 940, 0.06),
    "citadel-engine": (SERVER, 610, 0.05),
    "citadel-node": (SERVER, 880, 0.11),
    "citadel-redis": (SERVER, 210, 0.03),
    "citadel-postgres": (SQL, 330, 0.09),
    "citadel-predictor": (METRICS, 1240, 0.02),
    "citadel-escalator": (METRICS, 60, 0.01),
}


def monitoring(world: World) -> None:
    for job, (host, samples, seconds) in JOBS.items():
        up = np.where((job == "citadel-engine") & (world.during(*INCIDENT) > 0.97), 0, 1)
        world.add("job_instance:up:min", up, job=job, instance=host)
        world.add("job:up:avg", np.where(up == 0, 0.75, 1), job=job)
        world.add("job:scrape_samples:max", samples, job=job)
        world.add("job:scrape_duration_seconds:max", seconds * world.rough(0.2), job=job)
    group = "/etc/prometheus/citadel/rules/recording_gateway.yml;citadel-gateway"
    world.add("rule_group:prometheus_rule_evaluation_failures:increase15m", 0, rule_group=group)
    world.add("platform:prometheus_notifications_failed:increase15m", 0)
    for integration in ("email", "slack", "webhook"):
        failed = 3 * world.during(-3.4, -3.1) if integration == "slack" else 0.0
        world.add(
            "integration:alertmanager_notifications_failed:increase15m", np.round(failed), integration=integration
        )
    for level in ("2", "3"):
        raised = (world.hours > INCIDENT[0] + 0.5) & (level == "2")
        world.add("platform:citadel_escalations:increase1d", np.where(raised, 1, 0), level=level)


def alerts(world: World) -> None:
    first, last = INCIDENT
    for name, severity, team, labels, since, until in (
        (
            "LLMErrorBudgetBurn",
            "critical",
            "platform",
            {"model": "mixtral-8x7b", "slo": "availability"},
            first + 0.15,
            last,
        ),
        ("LLMKVCacheSaturated", "warning", "models", {"model": "mixtral-8x7b"}, first + 0.1, last - 0.1),
        ("LLMBusinessValueAtRisk", "warning", "business", {"model": "mixtral-8x7b"}, -0.4, 1),
        ("LLMSatisfactionDrop", "warning", "quality", {"model": "phi-3-mini"}, -7, 1),
        ("LLMCapacityExhaustion", "warning", "platform", {"model": "mixtral-8x7b"}, -60, 1),
    ):
        on = (world.hours >= since) & (world.hours <= until)
        tags = {"alertname": name, "alertstate": "firing", "severity": severity, "team": team, "suite": "citadel"}
        world.add("ALERTS", np.where(on, 1, np.nan), **tags, **labels)


def exposition(world: World) -> Iterator[str]:
    """The series as OpenMetrics, one after the other; what is not a number is left out."""
    first = int(np.searchsorted(world.at, world.end - DAYS * 86_400))
    stamps = [f" {stamp:.0f}\n" for stamp in world.at[first:]]
    by_name = sorted(world.found, key=lambda one: one[0])
    for name, labels, values in by_name:
        inside = ",".join(f'{label}="{value}"' for label, value in labels.items())
        head = f"{name}{{{inside}}} " if inside else f"{name} "
        yield "".join(
            f"{head}{value:.6g}{stamp}"
            for value, stamp in zip(values[first:].tolist(), stamps, strict=True)
            if value == value
        )
    yield "# EOF\n"


def build(folder: Path) -> Path:
    """Blocks of a Prometheus in `folder`/data, with the recommendations computed by their rules over the last hours."""
    text = folder / "series.om"
    with text.open("w") as out:
        out.writelines(exposition(generate()))
    data = folder / "data"
    run("tsdb", "create-blocks-from", "openmetrics", "--max-block-duration=744h", "--quiet", text, data)
    text.unlink()
    config = configuration(folder)
    # promtool does not know rules that read other rules: once for each depth
    for _ in range(depth()):
        with run_prometheus(config, data, *OPTIONS) as url:
            start, rules = str(END - 2 * 3600), folder / "blocks"
            run("tsdb", "create-blocks-from", "rules", f"--url={url}", f"--start={start}", f"--end={END}",
                "--eval-interval=10m", f"--output-dir={rules}", RECOMMENDATIONS)  # fmt: skip
        for block in rules.iterdir():
            shutil.move(block, data / block.name)
    return data


def depth() -> int:
    """How many rules stand behind one another in the recommendations."""
    rules = [rule for group in yaml.safe_load(RECOMMENDATIONS.read_text())["groups"] for rule in group["rules"]]
    names = {rule["record"] for rule in rules}
    deep: dict[str, int] = {}
    for rule in rules:
        read = set(re.findall(r"[a-z_]+:[a-zA-Z0-9_:]+", rule["expr"])) & names
        deep[rule["record"]] = 1 + max((deep[name] for name in read), default=0)
    return max(deep.values())


def configuration(folder: Path) -> Path:
    path = folder / "prometheus.yml"
    path.write_text("global: {scrape_interval: 15s}\n")
    return path


def run(*arguments: str | Path) -> None:
    done = check(promtool(), *arguments)
    if done.returncode:
        raise RuntimeError(f"promtool {arguments[1]}: {done.stderr or done.stdout}")
