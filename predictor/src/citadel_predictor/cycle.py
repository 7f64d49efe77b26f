"""One pass over all targets: read what is new, score it, forecast, publish. Whatever fails is said and passed over."""

import math
import random
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import outlook, reading
from .cards import card
from .exposition import Metrics, Sheet
from .outlook import Answer, Plan
from .prometheus import Client, QueryError
from .reading import Key, Present
from .settings import DAY, DETECTION_STEP, HORIZONS, Settings, Target
from .state import Kept, Store
from .watched import Watched

WARM = 2 * DAY  # of values that a new detector is shown
GRACE = 60  # seconds after a step's end until it is asked for: its last samples have to be recorded
SAVE = 3600.0  # seconds between two writes of a target's state; what came since is asked for again after a crash
JUMP = 300.0  # seconds by which the clock may be set without being noticed
LONGEST_WAIT = 900.0  # between two attempts at a Prometheus that does not answer


@dataclass(frozen=True)
class Clock:
    """The two clocks: seconds since the epoch, and seconds that never jump."""

    wall: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic


@dataclass
class Board:
    """What is known of one target."""

    target: Target
    plans: list[Plan]
    series: dict[Key, Watched] = field(default_factory=dict)
    answers: dict[Key, dict[str, tuple[tuple[int, int], Answer]]] = field(default_factory=dict)
    limits: dict[Key, float] = field(default_factory=dict)
    reasons: set[str] = field(default_factory=set)
    told: set[str] = field(default_factory=set)
    succeeded: float | None = None
    saved: float | None = None


class Cycle:
    """All targets, in the order of the settings. ``beat`` is called between any two pieces of work."""

    def __init__(
        self,
        settings: Settings,
        client: Client,
        store: Store,
        metrics: Metrics,
        report: Callable[..., None],
        *,
        clock: Clock | None = None,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self.settings, self.client, self.store, self.metrics, self.report = settings, client, store, metrics, report
        self.clock, self.beat = clock or Clock(), beat
        self.boards = [Board(target, outlook.plans(target)) for target in settings.targets]
        self.before: tuple[float, float] | None = None  # wall and monotonic of the last cycle
        self.failures = 0
        for board in self.boards:
            self._recall(board, store.load(board.target))
        store.prune(settings.targets, settings.forget_days)

    def run(self) -> bool:
        """Whether all targets were read."""
        began = self.clock.monotonic()
        now = self.clock.wall()
        elapsed = began - self.before[1] if self.before else 0.0
        self._look_at_clock(now, began)
        read = True
        for at, board in enumerate(self.boards):
            self.beat()
            try:
                self._target(board, now, elapsed)
            except QueryError as error:
                read = False
                self._failed(board, error.reason, str(error))
                if error.everywhere:
                    for rest in self.boards[at + 1 :]:
                        self._failed(rest, error.reason, "")
                    break
            except Exception as error:
                # A defect in one target must not take the others with it; the log has all of it.
                read = False
                self._failed(board, "internal", f"{type(error).__name__}: {error}", traceback.format_exc())
        self.before = (now, began)
        self.failures = 0 if read else self.failures + 1
        self.metrics.add("llm_predictor_cycles_total", outcome="complete" if read else "incomplete")
        self.metrics.set("llm_predictor_cycle_seconds", self.clock.monotonic() - began)
        return read

    def wait(self, took: float) -> float:
        """Seconds until the next cycle: longer with each failure, and by chance, so that many do not come at once."""
        if not self.failures:
            return max(1.0, self.settings.cycle_seconds - took)
        longest = max(LONGEST_WAIT, self.settings.cycle_seconds)
        wait = min(longest, self.settings.cycle_seconds / 4 * 2.0 ** min(self.failures - 1, 16))
        return wait * random.uniform(0.75, 1.25)  # noqa: S311  jitter guards nothing

    def save(self) -> None:
        """Write all that is known, before the end."""
        for board in self.boards:
            if board.series:
                self.store.save(board.target, Kept(list(board.series.values()), board.succeeded))

    def _recall(self, board: Board, kept: Kept) -> None:
        """Go on from what was kept, and show at once what it foretold: Prometheus may not answer for long."""
        now = self.clock.wall()
        board.series = {each.key: each for each in kept.series}
        board.limits = {key: each.limit for key, each in board.series.items() if each.limit is not None}
        if board.target.limit is not None and not isinstance(board.target.limit, str):
            board.limits = {(): board.target.limit}
        for key, watched in board.series.items():
            days = watched.track.days(board.target.aggregate)
            for plan in board.plans:
                track = days if plan.daily else watched.track
                newest = track.last()
                at, end = watched.made.get(plan.name, (0.0, 0))
                choice = watched.choices.get(plan.name)
                if choice is None or newest is None or newest[0] != end or at > now:
                    continue  # not of these values, or of a clock that ran ahead
                try:
                    found = outlook.recalled(plan, board.target, track, at, choice)
                except ValueError:
                    continue
                stamp = (track.end, int((at - track.end) // track.step))
                board.answers.setdefault(key, {})[plan.name] = (stamp, found)
        if kept.succeeded is not None and kept.succeeded <= now and board.answers:
            board.succeeded = kept.succeeded
            self._publish(board)

    def _look_at_clock(self, now: float, monotonic: float) -> None:
        if self.before is not None:
            jump = (now - self.before[0]) - (monotonic - self.before[1])
            if abs(jump) > JUMP:
                self.metrics.add("llm_predictor_errors_total", reason="clock_jump")
                self.report("clock_jump", seconds=jump)
        wrong = [each.labels for board in self.boards for each in board.series.values() if each.clamp(now)]
        if wrong:
            self.report("clock_went_back", series=len(wrong))

    def _failed(self, board: Board, reason: str, text: str, trace: str = "") -> None:
        if text:
            self.metrics.add("llm_predictor_errors_total", reason=reason)
            self.report("target_failed", target=board.target.name, reason=reason, why=text, trace=trace)
        board.reasons = {reason}
        self._publish(board)

    def _target(self, board: Board, now: float, elapsed: float) -> None:
        target = board.target
        board.reasons = set()
        at = int(now) // DETECTION_STEP * DETECTION_STEP
        here = reading.present(self.client, target, at)
        kept = self._kept(board, here)
        self._absences(board, kept, elapsed)
        for key in kept:
            board.series.setdefault(key, Watched(target, key))
        if here.ambiguous:
            board.reasons.add("ambiguous")
        board.limits = self._limits(board, at)
        for key in kept if isinstance(target.limit, str) else ():
            board.series[key].limit = self._limit(board, key)
        self._values(board, here, kept, at)
        self._history(board, here, kept, now)
        trained = False
        for key in kept:
            self.beat()
            trained = self._forecast(board, board.series[key], now) or trained
        if kept:
            board.succeeded = now
        else:
            board.reasons.add("no_series")
        self._publish(board)
        if trained or board.saved is None or self.clock.monotonic() - board.saved >= SAVE:
            self.beat()
            self.store.save(target, Kept(list(board.series.values()), board.succeeded))
            board.saved = self.clock.monotonic()  # also if it failed: it has been said, and is tried again in time

    def _kept(self, board: Board, here: Present) -> list[Key]:
        """The series to watch: those that are known before those that are new, and no more than were planned."""
        others = (each for other in self.boards if other is not board for each in other.series.values())
        elsewhere = sum(each.absent <= self.settings.absent_seconds for each in others)
        room = max(0, min(self.settings.max_series_per_target, self.settings.max_series - elsewhere))
        known = sorted(key for key in here.series if key in board.series)
        kept = (known + sorted(key for key in here.series if key not in board.series))[:room]
        over = len(here.series) - len(kept)
        if over:
            board.reasons.add("series_limited")
            self.metrics.add("llm_predictor_series_limited_total", over, target=board.target.name)
        return kept

    def _absences(self, board: Board, kept: Sequence[Key], elapsed: float) -> None:
        """Count how long series have been away, by the clock that never jumps, and forget those that do not come back;
        at once those that have been away longest, where others need the room.
        """
        for key, watched in board.series.items():
            watched.absent = 0.0 if key in kept else watched.absent + elapsed
        away = sorted((key for key in board.series if key not in kept), key=lambda key: board.series[key].absent)
        longest = max(self.settings.absent_seconds, self.settings.forget_days * DAY)
        room = self.settings.max_series_per_target - len(kept)
        for at, key in enumerate(away):
            if at >= room or board.series[key].absent > longest:
                watched = board.series.pop(key)
                board.answers.pop(key, None)
                self.report("series_forgotten", **watched.labels, absent_seconds=watched.absent)

    def _limits(self, board: Board, at: int) -> dict[Key, float]:
        try:
            limits = reading.limits(self.client, board.target, at)
        except QueryError as error:
            if error.everywhere:
                raise
            self.metrics.add("llm_predictor_errors_total", reason=error.reason)
            self.report("limit_failed", target=board.target.name, reason=error.reason, why=str(error))
            limits = {}
        if board.target.limit is not None and not limits:
            board.reasons.add("no_limit")
        return limits

    def _values(self, board: Board, here: Present, kept: Sequence[Key], at: int) -> None:
        """Feed detectors: with the last minutes' values, and before those with what they have missed."""
        behind: dict[int, list[Key]] = defaultdict(list)
        for key in kept:
            if board.series[key].seen < at - reading.LOOK_BACK - DETECTION_STEP:
                start = max(board.series[key].seen + DETECTION_STEP, at - WARM)
                behind[start // DETECTION_STEP * DETECTION_STEP].append(key)
        until = at - reading.LOOK_BACK - DETECTION_STEP
        for start, keys in behind.items() if board.target.detectors else ():
            past: dict[Key, reading.Points] = {key: [] for key in keys}
            for piece in reading.values(self.client, board.target, keys, start, until, here):
                self.beat()
                for key in keys:
                    past[key] += piece.get(key, [])
            for key in keys:
                self.beat()
                board.series[key].warm(past[key])
        for key in kept:
            board.series[key].feed(here.series[key])
            board.series[key].judge(self._limit(board, key), here.series[key])

    def _history(self, board: Board, here: Present, kept: Sequence[Key], now: float) -> None:
        step = board.target.step
        until = int(now - GRACE) // step * step
        oldest = until - board.target.history_days * DAY + step
        behind: dict[int, list[Key]] = defaultdict(list)
        for key in kept:
            if board.series[key].asked < until:
                behind[max(board.series[key].asked + step, oldest)].append(key)
        for start, keys in behind.items():
            for piece in reading.history(self.client, board.target, keys, start, until, here):
                self.beat()
                for key in keys:
                    board.series[key].track.put(piece.get(key, []))
            for key in keys:
                board.series[key].asked = until

    def _limit(self, board: Board, key: Key) -> float | None:
        return board.limits.get(key, board.limits.get(()))

    def _forecast(self, board: Board, watched: Watched, now: float) -> bool:
        """Whether methods were judged anew."""
        due = now - watched.trained >= self.settings.retrain_seconds
        days = watched.track.days(board.target.aggregate)
        answers = board.answers.setdefault(watched.key, {})
        trained = False
        for plan in board.plans:
            track = days if plan.daily else watched.track
            stamp = (track.end, int((now - track.end) // track.step))
            if not due and plan.name in answers and answers[plan.name][0] == stamp:
                continue  # nothing new has come
            before = None if due else watched.choices.get(plan.name)
            methods = outlook.chosen_methods(self.settings.methods, plan)
            found = outlook.answer(plan, board.target, track, now, methods, before)
            answers[plan.name] = (stamp, found)
            if found.choice is None:
                watched.choices.pop(plan.name, None)
                watched.made.pop(plan.name, None)
                continue
            newest = track.last()
            assert newest is not None
            watched.made[plan.name] = (now, newest[0])
            watched.choices[plan.name] = found.choice
            if found.trained:
                trained = True
                self.metrics.observe("llm_forecast_fit_seconds", found.choice.fit_seconds, method=found.choice.method)
                self.report("model_card", **card(watched, plan, found.choice))
            self.beat()
        if due:
            watched.trained = now
        return trained

    def _publish(self, board: Board) -> None:
        sheet = Sheet()
        reasons = set(board.reasons)
        said: dict[str, list[str]] = {}
        name = {"target": board.target.name}
        shown = [each for each in board.series.values() if each.absent <= self.settings.absent_seconds]
        for watched in shown:
            limit = self._limit(board, watched.key)
            for _, found in board.answers.get(watched.key, {}).values():
                reasons |= found.reasons
                if found.said:
                    said.setdefault("/".join(watched.key), []).extend(found.said)
            self._lines(board, watched, limit, sheet)
        for reason in sorted(reasons):
            sheet.add("llm_predictor_degraded", {**name, "reason": reason}, 1)
        sheet.add("llm_predictor_series", name, len(shown))
        if board.succeeded is not None and (shown or board.series):
            sheet.add("llm_forecast_last_success_timestamp_seconds", name, board.succeeded)
        self.metrics.publish(board.target.name, sheet)
        if reasons != board.told:
            self.report("target_state", target=board.target.name, reasons=reasons, said=said)
            board.told = reasons

    def _lines(self, board: Board, watched: Watched, limit: float | None, sheet: Sheet) -> None:
        labels: dict[str, Any] = watched.labels
        now, step = self.clock.wall(), board.target.step
        sheet.add("llm_forecast_history_days", labels, watched.track.known_days())
        recent = reading.LOOK_BACK + 2 * self.settings.cycle_seconds
        for detector, score in watched.scores.items() if now - watched.seen <= recent else ():
            sheet.add("llm_anomaly_score", {**labels, "detector": detector}, score)
        if limit is not None:
            sheet.add("llm_forecast_limit", labels, limit)
        covered = []
        for plan in board.plans:
            _, found = board.answers.get(watched.key, {}).get(plan.name, (None, Answer()))
            horizons = [name for name in found.points if found.holds(plan, HORIZONS[name], step, now)]
            if found.choice is None or not horizons:
                continue
            method = {"method": found.choice.method}
            if math.isfinite(found.choice.coverage):
                covered.append(found.choice.coverage)
            for horizon in horizons:
                where = {**labels, "horizon": horizon}
                for level, value in found.points[horizon].items():
                    sheet.add("llm_forecast_value", {**where, "quantile": f"{level:g}", **method}, value)
                if found.choice.method in found.choice.mase:
                    # beside the naive on the same ends: a month ahead is harder than a week, for whichever method
                    sheet.add("llm_forecast_mase", {**where, **method}, 1 - found.choice.skill)
            if board.target.capacity and "30d" in horizons:
                self._capacity(board, watched, limit, plan, found, sheet)
        if covered:
            sheet.add("llm_forecast_coverage_ratio", {**labels, "level": "0.8"}, sum(covered) / len(covered))

    def _capacity(
        self, board: Board, watched: Watched, limit: float | None, plan: Plan, found: Answer, sheet: Sheet
    ) -> None:
        assert found.choice is not None
        now = self.clock.wall()
        labels = watched.labels
        method = {"method": found.choice.method}
        for level, path in found.curve.items():
            for day, value in enumerate(path[:30], 1):
                if not found.holds(plan, day * DAY, DAY, now):
                    continue
                where = {**labels, "horizon_days": str(day), "quantile": f"{level:g}", **method}
                sheet.add("llm_forecast_value", where, float(value))
        if limit is not None:
            days = watched.track.days(board.target.aggregate)
            for level, seconds in outlook.until(found.choice, days, board.target, limit, now).items():
                sheet.add("llm_forecast_limit_eta_seconds", {**labels, "quantile": f"{level:g}"}, seconds)
