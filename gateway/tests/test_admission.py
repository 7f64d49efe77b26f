"""Who goes, who waits and who is shed: with a clock that the tests turn."""

import heapq
import random
from pathlib import Path

import pytest
from citadel_gateway.core.admission import ADMITTED, OTHERS, Gatekeeper, Shed, Waiter
from citadel_gateway.core.board import Board
from citadel_gateway.core.catalogue import Catalogue, Model
from citadel_gateway.errors import Refusal
from citadel_gateway.settings import Address, Admission
from citadel_gateway.settings import Model as ModelEntry
from citadel_gateway.snapshot import Snapshot
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

START = 100.0


class Request:
    """A waiter that notes what becomes of it."""

    def __init__(self, name: str = "", log: list[str] | None = None) -> None:
        self.name = name
        self.log = log if log is not None else []
        self.ends: list[str | Refusal] = []

    def go(self) -> None:
        self.ends.append("go")
        self.log.append(self.name)

    def refused(self, refusal: Refusal) -> None:
        self.ends.append(refusal)

    @property
    def shed(self) -> Shed:
        (found,) = self.ends
        assert isinstance(found, Shed)
        return found


class Site:
    """One model before one worker. Times are added up by the tests."""

    def __init__(
        self,
        slots: int = 2,
        queue: int = 16,
        max_wait: float = 30.0,
        backends: int = 1,
        board: Board | None = None,
        most: int = 512,
    ) -> None:
        self.now = START
        self.catalogue = Catalogue(5.0, board or Board())
        self.keeper = Gatekeeper(Admission(queue, max_wait), most)
        self.entry = ModelEntry("one", tuple(Address("h", 1 + number) for number in range(backends)), slots=slots)
        self.log: list[str] = []
        self.apply(self.entry)

    def apply(self, *entries: ModelEntry) -> None:
        self.catalogue.apply(Snapshot(0, entries, ()), self.now)
        self.keeper.apply(self.catalogue, self.now)

    @property
    def model(self) -> Model:
        return self.catalogue.models["one"]

    def enter(self, name: str, priority: int = 0, user: str = "", deadline: float = 0.0) -> Request | Refusal | None:
        """The waiter when it waits, nothing when it was admitted, or the refusal."""
        request = Request(name, self.log)
        found = self.keeper.enter(request, self.model, priority, user or name, deadline, self.now, 10)
        if found is ADMITTED:
            return None
        return found if isinstance(found, Refusal) else request

    def waiting(self, name: str, priority: int = 0, user: str = "", deadline: float = 0.0) -> Request:
        found = self.enter(name, priority, user, deadline)
        assert isinstance(found, Request)
        return found

    def refused(self, name: str, priority: int = 0, deadline: float = 0.0) -> Shed:
        found = self.enter(name, priority, "", deadline)
        assert isinstance(found, Shed)
        return found

    def fill(self) -> None:
        while self.model.inflight < self.model.slots * len(self.model.backends):
            assert self.enter("first") is None

    def leave(self, held: float = 1.0) -> None:
        self.keeper.leave(self.model, self.now, held)

    def learn(self, held: float) -> None:
        """A request that has held a slot for so long."""
        assert self.enter("past") is None
        self.leave(held)


def test_slots_and_then_the_queue() -> None:
    site = Site(slots=2)
    assert site.enter("a") is None
    assert site.enter("b") is None
    third = site.waiting("c")
    assert (site.model.inflight, site.keeper.waiting, site.keeper.queued(site.model)) == (2, 1, 1)
    assert third.ends == []
    site.leave()
    assert third.ends == ["go"]
    assert (site.model.inflight, site.keeper.waiting) == (2, 0)
    site.leave()
    site.leave()
    assert site.model.inflight == 0


def test_slots_are_those_of_all_replicas_that_are_up() -> None:
    site = Site(slots=2, backends=2)
    site.fill()
    assert site.model.inflight == 4
    for _ in range(2):
        site.leave()
    site.model.backends[0].health.failed(site.now)
    site.keeper.tick(site.now)
    waiter = site.waiting("c")
    site.model.backends[0].health.healthy(site.now + 1)
    site.keeper.tick(site.now + 1)
    assert waiter.ends == ["go"]


def test_without_slots_there_is_no_queue_but_a_bound() -> None:
    site = Site(slots=0, most=2)
    assert site.enter("a") is None
    assert site.enter("b") is None
    found = site.refused("c")
    assert (found.status, found.code, found.reason, found.retry_after) == (503, "overloaded", "limit", 1)
    site.leave()
    assert site.enter("c") is None


def test_what_other_hosts_run_on_an_engine_takes_slots_too() -> None:
    site = Site(slots=2)
    backend = site.model.backends[0]
    for _ in range(2):
        backend.begin(10, site.now)
    waiter = site.waiting("a")
    backend.end(10, site.now, site.now, 1)
    site.keeper.pump(site.now)
    assert waiter.ends == ["go"]


def test_a_higher_tier_goes_first_and_everyone_goes() -> None:
    site = Site(slots=1)
    site.fill()
    low = site.waiting("low", priority=0)
    site.now += 1
    high = site.waiting("high", priority=5)
    site.leave()
    assert (high.ends, low.ends) == (["go"], [])
    site.leave()
    assert low.ends == ["go"]


def test_age_beats_priority_in_the_end() -> None:
    site = Site(slots=1, max_wait=30.0)  # a priority is worth a second and a half
    site.fill()
    low = site.waiting("low", priority=0)
    site.now += 7
    site.waiting("high", priority=2)
    site.leave()
    assert low.ends == ["go"]


@pytest.mark.parametrize("slots", [1, 16])
def test_nobody_starves_where_the_highest_tier_alone_is_too_much(slots: int) -> None:
    site = Site(slots=slots, queue=64)
    site.fill()
    for _ in range(400):
        site.now += 1.0 / slots
        for _ in range(20):
            site.enter("high", priority=9)
        site.enter("low", priority=0)
        site.leave(1.0)
        site.keeper.tick(site.now)
    assert site.log.count("low") >= 0.8 * 400 / OTHERS
    assert site.log.count("high") >= 0.8 * 400 * (1 - 1 / OTHERS)


def test_many_waiters_of_one_user_do_not_keep_the_others_back() -> None:
    site = Site(slots=1, queue=64)
    site.fill()
    for number in range(20):
        site.waiting(f"greedy{number}", user="greedy")
    site.now += 0.5
    site.waiting("modest", user="modest")
    for _ in range(10):
        site.leave()
    assert "modest" in site.log


def test_a_full_queue_evicts_the_youngest_of_the_lowest() -> None:
    site = Site(slots=1, queue=3)
    site.fill()
    old = site.waiting("old", priority=1)
    middle = site.waiting("middle", priority=1)
    young = site.waiting("young", priority=1)
    assert site.refused("another", priority=1).reason == "full"
    site.waiting("high", priority=2)
    assert young.shed.reason == "evicted"
    assert (old.ends, middle.ends) == ([], [])
    assert site.keeper.waiting == 3


def test_the_lower_tiers_keep_a_part_of_the_queue() -> None:
    site = Site(slots=1, queue=16)
    site.fill()
    low = [site.waiting(f"low{number}", priority=0, user=str(number)) for number in range(4)]
    for number in range(14):
        site.waiting(f"high{number}", priority=5, user=str(number))
    assert site.refused("high", priority=5).reason == "full"
    assert [len(one.ends) for one in low] == [0, 0, 1, 1]  # an eighth of sixteen stays


def test_what_would_wait_too_long_is_shed_at_once_with_the_time_to_come_back() -> None:
    site = Site(slots=2, queue=256, max_wait=10.0)
    site.learn(4.0)  # half a slot a second becomes free
    site.fill()
    for number in range(5):
        site.waiting(f"w{number}")
    found = site.refused("late")
    assert (found.reason, found.ahead) == ("wait", 5)
    assert 2 <= found.retry_after <= 3  # six places are twelve seconds; in two, ten of them are left
    for _ in range(1):
        site.now += 2.0
        site.leave(4.0)
    site.waiting("again")


def test_a_deadline_counts_when_it_is_nearer() -> None:
    site = Site(slots=1, max_wait=30.0)
    site.learn(4.0)
    site.fill()
    assert site.refused("short", deadline=site.now + 3.0).reason == "deadline"
    waiter = site.waiting("long", deadline=site.now + 6.0)
    site.now += 6.1
    site.keeper.pump(site.now)
    assert (waiter.shed.status, waiter.shed.code, waiter.shed.reason) == (504, "deadline_exceeded", "expired")


def test_a_wait_that_was_guessed_too_short_ends_nevertheless() -> None:
    site = Site(slots=1, max_wait=5.0)
    site.fill()
    waiter = site.waiting("a")
    site.now += 4.9
    site.keeper.pump(site.now)
    assert waiter.ends == []
    site.now += 0.2
    site.keeper.pump(site.now)
    assert (waiter.shed.status, waiter.shed.reason) == (503, "expired")
    assert site.keeper.waiting == 0


def test_who_goes_away_leaves_no_hole() -> None:
    site = Site(slots=1)
    site.fill()
    first, second = site.waiting("a"), site.waiting("b")
    assert site.keeper.cancel(first)
    assert not site.keeper.cancel(first)
    site.leave()
    assert (first.ends, second.ends) == ([], ["go"])
    assert not site.keeper.cancel(second)


def test_waiters_are_told_when_nobody_is_left_to_serve_them() -> None:
    site = Site(slots=1)
    site.fill()
    waiter = site.waiting("a")
    site.model.backends[0].health.failed(site.now)
    site.keeper.pump(site.now)
    (refusal,) = waiter.ends
    assert isinstance(refusal, Refusal)
    assert (refusal.code, refusal.outcome) == ("model_unavailable", "unavailable")
    found = site.enter("b")
    assert isinstance(found, Refusal)
    assert found.code == "model_unavailable"


def test_waiters_are_told_that_the_model_is_drained_or_gone() -> None:
    site = Site(slots=1)
    site.fill()
    drained, gone = site.waiting("a"), Request()
    site.model.draining = True
    site.keeper.tick(site.now)
    (refusal,) = drained.ends
    assert isinstance(refusal, Refusal)
    assert refusal.code == "model_draining"
    site.model.draining = False
    model = site.model
    assert site.keeper.enter(gone, model, 0, "u", 0.0, site.now) is None
    site.apply(ModelEntry("other", (Address("h", 9),)))
    assert len(gone.ends) == 1
    site.keeper.leave(model, site.now)  # what still runs gives its slot back as ever
    assert model.inflight == 0


def test_a_model_that_gets_more_slots_serves_its_queue() -> None:
    site = Site(slots=1)
    site.fill()
    waiters = [site.waiting(str(number)) for number in range(3)]
    site.apply(ModelEntry("one", (Address("h", 1),), slots=3))
    assert [waiter.ends for waiter in waiters] == [["go"], ["go"], []]
    site.apply(ModelEntry("one", (Address("h", 1),), slots=0))
    assert waiters[2].ends == ["go"]


def test_a_waiter_that_fails_at_once_hands_its_slot_on() -> None:
    site = Site(slots=1)
    site.fill()

    class Failing(Request):
        def go(self) -> None:
            super().go()
            site.leave(0.0)

    failing = [Failing() for _ in range(5)]
    for one in failing:
        assert site.keeper.enter(one, site.model, 0, "", 0.0, site.now) is None
    last = site.waiting("last")
    site.leave()
    assert [one.ends for one in failing] == [["go"]] * 5
    assert last.ends == ["go"]
    assert site.model.inflight == 1


def test_a_newcomer_does_not_overtake_where_a_slot_is_free() -> None:
    site = Site(slots=1)
    board = site.keeper.lanes["one"].row
    site.fill()
    waiter = site.waiting("a")
    site.model.inflight -= 1  # as if another worker had given a slot back
    board.write(1, 0)
    newcomer = site.waiting("b")
    assert (waiter.ends, newcomer.ends) == (["go"], [])


# two workers ----------------------------------------------------------------------------------------------------------
class Host:
    """Two workers before one engine."""

    def __init__(self, folder: Path, slots: int = 2, queue: int = 64) -> None:
        self.boards = [Board(folder, number, 2) for number in (1, 2)]
        self.sites = [Site(slots=slots, queue=queue, board=board) for board in self.boards]
        self.to(START)
        self.to(START + 0.01)

    def to(self, now: float) -> None:
        for board, site in zip(self.boards, self.sites, strict=True):
            site.now = now
            board.tick(now)
        for site in self.sites:
            site.keeper.tick(now)

    @property
    def inflight(self) -> int:
        return sum(site.model.inflight for site in self.sites)


def test_two_workers_share_the_slots(tmp_path: Path) -> None:
    host = Host(tmp_path, slots=2)
    one, two = host.sites
    assert one.enter("a") is None
    assert two.enter("b") is None
    waiter = two.waiting("c")
    assert one.keeper.queued(one.model) == 0
    one.leave()
    two.keeper.pump(two.now)
    assert waiter.ends == ["go"]
    assert host.inflight == 2


def test_a_worker_that_has_all_slots_leaves_some_to_the_other(tmp_path: Path) -> None:
    host = Host(tmp_path, slots=4)
    one, two = host.sites
    one.fill()
    now = host.sites[0].now
    late = two.waiting("two")
    for number in range(8):
        host.to(now := now + 0.1)
        one.waiting(f"one{number}")
    for _ in range(8):
        host.to(now := now + 0.1)
        one.leave()
        for site in host.sites:
            site.keeper.pump(now)
        assert host.inflight <= 4
    assert late.ends == ["go"]
    assert host.inflight == 4


def test_a_dead_worker_holds_no_slot(tmp_path: Path) -> None:
    host = Host(tmp_path, slots=2)
    one, two = host.sites
    one.fill()
    waiter = two.waiting("a")
    for step in range(1, 13):
        two.now = START + step * 0.1
        host.boards[1].tick(two.now)
        two.keeper.tick(two.now)
    assert waiter.ends == ["go"]


# a simulation ---------------------------------------------------------------------------------------------------------
class Simulation:
    """Arrivals at a rate, an engine whose requests take about `service` seconds each, and what became of everyone.

    With two workers three of four requests come to the first one.
    """

    def __init__(self, slots: int, service: float, folder: Path | None = None) -> None:
        self.boards = [Board(folder, number, 2) for number in (1, 2)] if folder is not None else [Board()]
        self.sites = [Site(slots=slots, queue=256, max_wait=30.0, board=board) for board in self.boards]
        self.site = self.sites[0]
        self.served = [0] * len(self.sites)
        self.most = 0
        self.slots = slots
        self.service = service
        self.random = random.Random(7)
        self.events: list[tuple[float, int, str, object]] = []
        self.serial = 0
        self.waits: list[tuple[float, float]] = []  # when it came, how long it waited
        self.sheds: list[tuple[float, float]] = []  # when it came, after how long it was told
        self.idle = 0  # times at which a slot was free while somebody waited
        self.done = 0

    def at(self, when: float, what: str, data: object = None) -> None:
        self.serial += 1
        heapq.heappush(self.events, (when, self.serial, what, data))

    def started(self, site: Site, arrived: float) -> None:
        self.waits.append((arrived, site.now - arrived))
        self.served[self.sites.index(site)] += 1
        self.at(site.now + self.service * self.random.uniform(0.5, 1.5), "end", (site, site.now))

    def arrive(self, site: Site) -> None:
        simulation, arrived = self, site.now
        self.serial += 1

        class One:
            def go(self) -> None:
                simulation.started(site, arrived)

            def refused(self, refusal: Refusal) -> None:
                simulation.sheds.append((arrived, site.now - arrived))

        found = site.keeper.enter(One(), site.model, 0, str(self.serial), 0.0, arrived)
        if found is ADMITTED:
            self.started(site, arrived)
        elif found is not None:
            self.sheds.append((arrived, 0.0))

    def run(self, plan: list[tuple[float, float]]) -> None:
        """`plan`: seconds and requests a second, one after the other."""
        start = self.site.now
        for seconds, rate in plan:
            for number in range(int(seconds * rate)):
                self.at(start + number / rate, "come", number)
            start += seconds
        for number in range(int((start + 60.0 - self.site.now) / 0.02)):
            self.at(self.site.now + number * 0.02, "tick" if number % 5 == 0 else "pump")
        while self.events:
            now, _, what, data = heapq.heappop(self.events)
            for site in self.sites:
                site.now = now
            self.happen(what, data, now)
            inflight = sum(site.model.inflight for site in self.sites)
            self.most = max(self.most, inflight)
            self.idle += inflight < self.slots and any(site.keeper.waiting for site in self.sites)

    def happen(self, what: str, data: object, now: float) -> None:
        if what == "come":
            assert isinstance(data, int)
            self.arrive(self.sites[-1] if data % 4 == 3 else self.site)
        elif what == "end":
            assert isinstance(data, tuple)
            self.done += 1
            data[0].leave(now - data[1])
        for board, site in zip(self.boards, self.sites, strict=True):
            if what == "tick":
                board.tick(now)
                site.keeper.tick(now)
            elif what == "pump":
                site.keeper.pump(now)

    def percentile(self, low: float, high: float, share: float = 0.95) -> float:
        found = sorted(wait for arrived, wait in self.waits if low <= arrived - START < high)
        return found[int(len(found) * share)]


def test_twenty_times_as_much_as_can_be_done() -> None:
    simulation = Simulation(slots=8, service=0.5)  # 16 requests a second
    simulation.run([(30, 12), (60, 320), (30, 12)])
    assert simulation.percentile(0, 30) == 0
    # those who are admitted wait for less than a request takes, after the first moments in which it may be a burst
    assert simulation.percentile(30, 90) <= 0.7 * 0.5
    assert max(wait for arrived, wait in simulation.waits if arrived >= START + 34) <= 0.5
    # the engine is never idle, and does in the overload what it can do at all
    assert simulation.idle == 0
    served = sum(1 for arrived, _ in simulation.waits if 30 <= arrived - START < 90)
    assert served >= 0.97 * 60 * 16
    # all others are told quickly
    told = sorted(after for _, after in simulation.sheds)
    assert told[int(len(told) * 0.9)] == 0
    assert told[-1] <= 1.5
    # and when it is over, it is over
    assert simulation.percentile(92, 120) <= 0.5
    assert sum(1 for arrived, _ in simulation.sheds if arrived - START >= 92) == 0
    assert len(simulation.waits) == simulation.done


def test_twenty_times_as_much_with_two_workers(tmp_path: Path) -> None:
    simulation = Simulation(slots=8, service=0.5, folder=tmp_path)
    simulation.run([(30, 12), (60, 320), (30, 12)])
    assert simulation.most == 8
    assert simulation.percentile(35, 90) <= 1.0
    served = sum(1 for arrived, _ in simulation.waits if 30 <= arrived - START < 90)
    assert served >= 0.95 * 60 * 16
    assert simulation.served[1] >= 0.2 * sum(simulation.served)
    assert sum(1 for arrived, _ in simulation.sheds if arrived - START >= 95) == 0
    assert len(simulation.waits) == simulation.done


def test_a_burst_is_no_overload() -> None:
    simulation = Simulation(slots=16, service=2.0)
    simulation.run([(30, 4), (1, 100), (30, 2)])  # a hundred at once are done in 12 s
    assert simulation.sheds == []
    assert simulation.idle == 0


def test_everyone_of_a_closed_circle_is_served() -> None:
    """A hundred clients, each of which asks again when it has its answer: a queue that never ends, and no overload."""
    simulation = Simulation(slots=16, service=1.0)
    site = simulation.site
    left = 2000

    def again() -> None:
        nonlocal left
        left -= 1
        simulation.at(site.now, "come", 0)

    for _ in range(100):
        again()
    leave = site.leave

    def leave_and_ask(held: float = 1.0) -> None:
        leave(held)
        if left:
            again()

    site.leave = leave_and_ask  # type: ignore[method-assign]  # the client asks again when it has its answer
    simulation.run([(200, 0.0001)])
    assert simulation.sheds == []
    assert simulation.done == 2000


@pytest.mark.parametrize("priority", [0, 5])
def test_a_retry_after_is_true(priority: int) -> None:
    """Who comes back when told to is not sent away again by those who were there before."""
    site = Site(slots=4, queue=256, max_wait=5.0)
    site.learn(2.0)
    site.fill()
    while isinstance(found := site.enter("w", priority), Request):
        pass
    assert isinstance(found, Shed)
    end = site.now + found.retry_after
    while site.now < end:
        site.now += 0.5
        site.leave(2.0)  # four slots of two seconds each
    site.waiting("again", priority)


# whatever happens -----------------------------------------------------------------------------------------------------
class AnyOrder(RuleBasedStateMachine):
    """Every waiter ends once: it goes, is refused, or has cancelled. No slot is ever lost or given twice."""

    def __init__(self) -> None:
        super().__init__()
        self.site = Site(slots=3, queue=5, max_wait=4.0, backends=2)
        self.waiting: list[Request] = []
        self.cancelled: list[Request] = []
        self.all: list[Request] = []
        self.running = 0

    def settle(self) -> None:
        """Who went has a slot now."""
        for request in tuple(self.waiting):
            if request.ends:
                self.waiting.remove(request)
                self.running += request.ends == ["go"]

    @rule(priority=st.integers(0, 9), user=st.sampled_from("abc"), deadline=st.sampled_from([0.0, 0.5, 3.0, 60.0]))
    def come(self, priority: int, user: str, deadline: float) -> None:
        found = self.site.enter(user, priority, user, self.site.now + deadline if deadline else 0.0)
        if found is None:
            self.running += 1
        elif isinstance(found, Request):
            self.waiting.append(found)
            self.all.append(found)
        self.settle()

    @precondition(lambda self: self.running)
    @rule(held=st.sampled_from([0.0, 0.1, 2.0, 9.0]))
    def end(self, held: float) -> None:
        self.running -= 1
        self.site.leave(held)
        self.settle()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.waiting))
        assert self.site.keeper.cancel(request)
        self.waiting.remove(request)
        self.cancelled.append(request)

    @rule(seconds=st.sampled_from([0.02, 0.5, 3.0]))
    def time(self, seconds: float) -> None:
        self.site.now += seconds
        self.site.keeper.tick(self.site.now)
        self.settle()

    @rule(number=st.integers(0, 1), up=st.booleans())
    def health(self, number: int, up: bool) -> None:
        health = self.site.model.backends[number].health
        if up:
            health.hold = 0.0
            health.healthy(self.site.now)
        else:
            health.failed(self.site.now)

    @rule(slots=st.integers(0, 4))
    def change(self, slots: int) -> None:
        self.site.apply(ModelEntry("one", tuple(Address("h", port) for port in (1, 2)), slots=slots))
        self.settle()

    @rule(drained=st.booleans())
    def drain(self, drained: bool) -> None:
        self.site.model.draining = drained
        self.site.keeper.tick(self.site.now)
        self.settle()

    @invariant()
    def nothing_is_lost(self) -> None:
        keeper, model = self.site.keeper, self.site.model
        assert model.inflight == self.running
        assert keeper.waiting == keeper.queued(model) == len(self.waiting) <= 5
        assert all(len(request.ends) == 1 for request in self.all if request not in self.waiting + self.cancelled)
        assert all(not request.ends for request in self.waiting + self.cancelled)
        lane = keeper.lanes["one"]
        assert lane.tokens == 10 * len(lane.queue)
        assert sum(lane.users.values()) == sum(lane.priorities.values()) == len(lane.queue)
        assert [place for place, _, _ in lane.queue] == sorted(place for place, _, _ in lane.queue)


AnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAnyOrder = AnyOrder.TestCase


def test_a_request_is_a_waiter() -> None:
    waiter: Waiter = Request()
    assert waiter is not None
