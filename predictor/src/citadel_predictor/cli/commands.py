"""What each command does. They return the exit status."""

import argparse
import csv
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from .. import outlook, reading
from ..cards import card
from ..forecast import NAIVE, FloatArray, choose, filled
from ..forecast.choose import scale
from ..forecast.exhaustion import LEAST_DAYS, WEEK
from ..journal import plain
from ..outlook import Plan
from ..prometheus import Client
from ..serve import Service
from ..settings import DAY, DETECTION_STEP, Settings, Target
from ..track import Track
from ..watched import Watched


class Failed(Exception):  # noqa: N818  # it is what the command has done
    """The command cannot do what was asked; its text says why."""


def serve(options: argparse.Namespace, settings: Settings) -> int:
    Service(settings).run()
    return 0


def check(options: argparse.Namespace, settings: Settings) -> int:
    """0 if all is well; with --live 1 if a target has no series."""
    print(f"{options.config}: {len(settings.targets)} target{'s' if len(settings.targets) != 1 else ''}, no problem")
    if not options.live:
        return 0
    client = Client(settings.prometheus)
    missing = 0
    for target in settings.targets:
        here = reading.present(client, target, now())
        over = max(0, len(here.series) - settings.max_series_per_target)
        said = [f"{len(here.series)} series"]
        if not here.series:
            missing += 1
            said = ["no series: is its rule loaded, and does it have values?"]
        if over:
            said.append(f"{over} more than max_series_per_target, which are left out")
        if here.ambiguous:
            said.append(
                f"{here.raw - len(here.series)} of {here.raw} look the same without the labels that are left out"
            )
        print(f"{target.name}: {'; '.join(said)}")
    return 1 if missing else 0


def now() -> int:
    return int(time.time()) // DETECTION_STEP * DETECTION_STEP


def named(settings: Settings, names: list[str]) -> list[Target]:
    known = {target.name: target for target in settings.targets}
    for name in names:
        if name not in known:
            raise Failed(f"there is no target {name!r}: take one of {', '.join(known)}")
    return [known[name] for name in names] if names else list(settings.targets)


def gathered(settings: Settings, target: Target) -> list[Watched]:
    """The target's series with their history, as Prometheus has it."""
    client = Client(settings.prometheus)
    at = now()
    here = reading.present(client, target, at)
    keys = sorted(here.series)[: settings.max_series_per_target]
    found = {key: Watched(target, key) for key in keys}
    until = at // target.step * target.step
    for piece in (
        reading.history(client, target, keys, until - target.history_days * DAY + target.step, until, here)
        if keys
        else ()
    ):
        for key in keys:
            found[key].track.put(piece.get(key, []))
    if not found:
        raise Failed(
            f"target {target.name!r} has no series: is the rule of {target.query!r} loaded, and does it have values?"
        )
    return list(found.values())


def explain(options: argparse.Namespace, settings: Settings) -> int:
    target = named(settings, [options.target])[0]
    limits = reading.limits(Client(settings.prometheus), target, now())
    found = [explained(each, settings, limits.get(each.key, limits.get(()))) for each in gathered(settings, target)]
    if options.json:
        print(json.dumps(plain(found)))
        return 0
    for each in found:
        print(", ".join(f"{name} {value}" for name, value in each["labels"].items() if value))
        print(
            f"  {each['history_days']:.1f} days of history"
            + (f", limit {each['limit']:g}" if each["limit"] is not None else "")
        )
        for plan in each["forecasts"]:
            print(f"  {', '.join(plan['horizons'])}: {plan['text']}")
            for horizon, points in plan["points"].items():
                print(f"    {horizon:>4}: " + " … ".join(f"{value:.6g}" for value in points.values()))
            for name, error in list(plan["mase_by_method"].items())[:8]:
                print(f"    {name:<22} MASE {error:.3f}{'  <- used' if name == plan['method'] else ''}")
            for reason in plan["reasons"]:
                print(f"    {reason}")
        if each["eta_days"]:
            print("  limit reached in days: " + " … ".join(f"{days:.1f}" for days in each["eta_days"].values()))
    return 0


def explained(watched: Watched, settings: Settings, limit: float | None) -> dict[str, Any]:
    target = watched.target
    days = watched.track.days(target.aggregate)
    forecasts: list[dict[str, Any]] = []
    eta: dict[float, float] = {}
    for plan in outlook.plans(target):
        methods = outlook.chosen_methods(settings.methods, plan)
        found = outlook.answer(plan, target, days if plan.daily else watched.track, time.time(), methods, None)
        if found.choice is None:
            text = "; ".join(found.said) or "no value was ever measured"
            empty: dict[str, Any] = {"points": {}, "mase_by_method": {}, "method": None, "reasons": []}
            forecasts.append({"horizons": list(plan.horizons), "text": f"no forecast: {text}", **empty})
            continue
        choice = found.choice
        held = f", interval of 80 % held {100 * choice.coverage:.0f} %" if math.isfinite(choice.coverage) else ""
        skill = (
            f", {100 * choice.skill:.0f} % less error than the seasonal naive" if math.isfinite(choice.skill) else ""
        )
        text = f"by {choice.method}{skill}{held}"
        forecasts.append({**card(watched, plan, choice), "points": found.points, "text": text})
        if target.capacity and limit is not None and "30d" in plan.horizons:
            eta = {level: each / DAY for level, each in outlook.until(choice, days, target, limit, time.time()).items()}
    return {
        "labels": watched.labels,
        "history_days": watched.track.known_days(),
        "limit": limit,
        "forecasts": forecasts,
        "eta_days": eta,
    }


def backtest(options: argparse.Namespace, settings: Settings) -> int:
    rows = []
    for target in named(settings, options.target):
        for watched in gathered(settings, target):
            days = watched.track.days(target.aggregate)
            for plan in outlook.plans(target):
                track = days if plan.daily else watched.track
                name = "/".join(value for value in (target.name, *watched.key) if value)
                rows.append(tested(name, plan, track, target, settings.methods, options.folds))
    return show(rows, options)


def backtest_csv(options: argparse.Namespace) -> int:
    path = Path(options.csv)
    track = Track(options.step, 1_000_000)
    track.values = numbers(path)
    track.end = now() // options.step * options.step
    target = Target(path.stem, "", step=options.step, horizons=(options.horizon,), history_days=800)
    if DAY % options.step:
        raise Failed(f"--step: {options.step} seconds do not divide a day")
    plan = outlook.plans(target)[0]
    if plan.daily:
        track.end = track.end // DAY * DAY
        track = track.days(target.aggregate)
    return show([tested(path.name, plan, track, target, (), options.folds)], options)


def numbers(path: Path) -> FloatArray:
    """The last column of a file. Raises Failed."""
    values: list[float] = []
    try:
        with path.open(newline="") as file:
            for at, row in enumerate(csv.reader(file)):
                text = row[-1].strip() if row else ""
                try:
                    values.append(float(text) if text else math.nan)
                except ValueError:
                    if at:
                        raise Failed(f"{path}: line {at + 1}: {text!r} is no number") from None
    except OSError as error:
        raise Failed(f"{path}: cannot be read: {error.strerror}") from None
    return np.array(values, dtype=np.float64)


def tested(name: str, plan: Plan, track: Track, target: Target, methods: tuple[str, ...], folds: int) -> dict[str, Any]:
    """Errors over all ends, in units of the seasonal naive's error within what was before each."""
    season = WEEK if plan.daily else target.season // target.step
    row: dict[str, Any] = {"series": name, "horizons": "/".join(plan.horizons), "folds": 0}
    misses, naive, held, used, seconds = [], [], [], [], 0.0
    for fold in range(folds, 0, -1):
        cut = track.values.size - fold * plan.steps
        least = LEAST_DAYS if plan.daily else 2 * season
        past, came = (
            track.values[: max(0, cut)][-max(outlook.LONGEST, 8 * season) :],
            track.values[max(0, cut) :][: plan.steps],
        )
        if np.isfinite(past).sum() < least or not np.isfinite(came).any() or cut < 1 or not np.isfinite(past[-1]):
            continue
        began = time.process_time()
        choice = choose(past, season, plan.steps, methods=outlook.chosen_methods(methods, plan))
        seconds += time.process_time() - began
        whole, _ = filled(past, season)
        unit = scale(whole, season)
        known = np.isfinite(came)
        misses.append(np.abs(choice.forecast - came)[known].mean() / unit)
        naive.append(np.abs(NAIVE.fit(whole, season).predict(plan.steps) - came)[known].mean() / unit)
        held.append(((came >= choice.quantiles[0.1]) & (came <= choice.quantiles[0.9]))[known].mean())
        used.append(choice.method)
    if not used:
        return {**row, "why": f"{track.known_days():.1f} days of history are too few, or its ends have no values"}
    return {
        **row,
        "folds": len(used),
        "mase": float(np.mean(misses)),
        "mase_naive": float(np.mean(naive)),
        "coverage_80": float(np.mean(held)),
        "ms": 1000 * seconds / len(used),
        "methods": sorted(set(used)),
    }


def show(rows: list[dict[str, Any]], options: argparse.Namespace) -> int:
    """A table or JSON; 1 if nothing could be tested."""
    if options.json:
        print(json.dumps(plain(rows)))
    else:
        print(f"{'series':<40} {'ahead':<10} {'ends':>4} {'MASE':>7} {'naive':>7} {'held':>5} {'ms':>6}  methods")
        for row in rows:
            start = f"{row['series']:<40} {row['horizons']:<10} {row['folds']:>4} "
            if not row["folds"]:
                print(start + row["why"])
                continue
            figures = f"{row['mase']:>7.3f} {row['mase_naive']:>7.3f} {row['coverage_80']:>5.0%} {row['ms']:>6.0f}"
            print(f"{start}{figures}  {', '.join(row['methods'])}")
    return 0 if any(row["folds"] for row in rows) else 1
