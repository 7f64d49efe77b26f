"""A worker process: one event loop that accepts, decides and relays."""

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import uvicorn

from citadel_gateway.core.board import Board
from citadel_gateway.core.limits import Limiter
from citadel_gateway.metrics import Labels, Metrics, encode, read_report, write_atomically
from citadel_gateway.settings import ConfigError, Gateway, engine_key
from citadel_gateway.snapshot import Watcher
from citadel_gateway.systemd import notify, watchdog_interval
from citadel_gateway.worker.accesslog import AccessLog
from citadel_gateway.worker.front import Front, bound_to
from citadel_gateway.worker.gate import Gate
from citadel_gateway.worker.journal import Journal
from citadel_gateway.worker.redis import limit_store

log = logging.getLogger("citadel_gateway")

GRACE = (
    2.0  # seconds that idle connections of a stopping worker have for one more request, answered with Connection: close
)
BACKLOG = 4096


async def answered_elsewhere(scope: Any, receive: Any, send: Any) -> None:
    """uvicorn wants an ASGI application; the protocol class answers every request before one would be asked."""
    raise RuntimeError("no request reaches ASGI in a worker")


class Worker:
    """The parts of one worker and what is done now and then."""

    def __init__(self, settings: Gateway, number: int) -> None:
        self.settings = settings
        self.number = number
        self.key = engine_key(settings)
        self.peer_key = peer_key(settings)
        self.watcher = Watcher(settings)
        self.first = self.watcher.first()
        self.metrics = Metrics()
        self.report_path = Path(settings.run_dir) / f"metrics-{number}.json"
        former = read_report(self.report_path)
        if former is not None:
            self.metrics.add(former)
        self.log = AccessLog(settings.access_log, self.lost)
        folder = Path(settings.journal.folder or Path(settings.state_dir) / "journal")
        self.journal = Journal(folder, settings.host, number, settings.journal.segment_bytes, self.lost_records)
        self.board = Board(Path(settings.run_dir), number, settings.workers)
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="files")
        self.writing: Future[int] | None = None
        self.alive_every = watchdog_interval()
        self.alive_next = 0.0
        self.tending: Future[None] | None = None
        self.gate: Gate | None = None
        self.limiter: Limiter | None = None

    def lost_records(self, records: int) -> None:
        self.metrics.count("llm_gateway_journal_lost_total", (), records)

    def answered(self, seconds: float) -> None:
        self.metrics.observe("llm_gateway_limit_store_seconds", seconds)

    def lost(self, lines: int) -> None:
        if lines:
            self.metrics.count("llm_gateway_access_log_lost_total", (), lines)

    def make_gate(self) -> Gate:
        """On the running loop."""
        store = limit_store(self.settings, time.monotonic, time.time, self.answered)
        redis = self.settings.redis
        name = self.journal.name  # of this process alone
        self.limiter = limiter = Limiter(
            store, name, time.monotonic, time.time, on_failure=redis.on_failure, patience=redis.timeout
        )
        gate = Gate(
            self.settings,
            self.number,
            self.key,
            metrics=self.metrics,
            record=self.log.record,
            journal=self.journal.append,
            limiter=limiter,
            clock=time.monotonic,
            wall=time.time,
            loop=asyncio.get_running_loop(),
            board=self.board,
            peer_key=self.peer_key,
        )
        self.journal.soon = asyncio.get_running_loop().call_soon
        gate.outbox.before = self.journal.flush
        gate.set_date(time.time())
        gate.apply(self.first)
        self.gate = gate
        return gate

    def tick(self, counter: int, fronts: set[Any]) -> None:
        """Ten times a second."""
        gate = self.gate
        assert gate is not None
        now = gate.clock()
        for front in tuple(fronts):
            front.tick(now)
        gate.tick(now)
        self.journal.tick()
        self.write_log()
        if counter % 5 == 0:
            snapshot = self.watcher.changed()
            if snapshot is not None:
                gate.apply(snapshot)
        if counter % 10 == 0:
            gate.set_date(time.time())
            gate.prune(now)
            gate.core.note_progress(now)
            self.write_report(len(fronts))
        # a segment that was begun needs the next one soon: under full load it is full within a second
        if (counter % 10 == 0 or self.journal.next is None) and (self.tending is None or self.tending.done()):
            self.tending = self.thread.submit(self.journal.tend)
        if self.alive_every and now >= self.alive_next:
            self.alive_next = now + self.alive_every
            notify("WATCHDOG=1")

    def write_report(self, connections: int) -> None:
        self.thread.submit(write_atomically, self.report_path, self.report(connections))

    def report(self, connections: int) -> bytes:
        assert self.gate is not None
        assert self.limiter is not None
        gauges: dict[str, dict[Labels, float]] = self.gate.core.gauges(connections)
        gauges["llm_gateway_limit_store_up"] = {(): float(self.limiter.store.up)}
        gauges["llm_gateway_worker_stopping"] = {(): float(self.gate.stopping)}
        return encode(self.metrics.report(self.number, gauges, time.time()))

    def write_log(self) -> None:
        """Hand the waiting lines to the thread; one block at a time, so that a slow disk holds up nothing here."""
        if self.writing is not None:
            if not self.writing.done():
                return
            self.lost(self.writing.result())
            self.writing = None
        data = self.log.take()
        if data:
            self.writing = self.thread.submit(self.log.write, data)

    def close(self) -> None:
        """The last lines, the last records and the last figures; what is held of limits goes back."""
        if self.limiter is not None:
            self.limiter.close()
        self.thread.shutdown(wait=True)
        self.journal.close()
        self.board.close()
        if self.writing is not None:
            self.lost(self.writing.result())
        self.lost(self.log.write(self.log.take()))
        self.log.close()
        with contextlib.suppress(OSError):
            write_atomically(self.report_path, self.report(0))


class WorkerServer(uvicorn.Server):
    """uvicorn's server with our signals, our clockwork, and a stop that cuts nothing."""

    def __init__(self, config: uvicorn.Config, worker: Worker) -> None:
        super().__init__(config)
        self.worker = worker

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        loop.add_signal_handler(signal.SIGHUP, self.worker.log.reopen)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.remove_signal_handler(number)

    def stop(self) -> None:
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.worker.journal.start()
        gc.collect()
        gc.freeze()  # what lives as long as the process need not be looked at again
        gc.set_threshold(50_000, 20, 50)
        notify("READY=1", "STATUS=serving")
        log.info("worker %d is ready", self.worker.number)

    async def on_tick(self, counter: int) -> bool:
        self.worker.tick(counter, self.server_state.connections)
        return self.should_exit

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """No new connection (the other workers take them), one last answer for each kept one, and streams to their
        end.
        """
        gate = self.worker.gate
        assert gate is not None
        notify("STOPPING=1", "STATUS=draining")
        gate.stopping = True
        self.worker.write_report(len(self.server_state.connections))
        for server in self.servers:
            server.close()
        for listener in sockets or []:
            listener.close()
        fronts = self.server_state.connections
        began = gate.clock()
        counter = 0
        while fronts:
            await asyncio.sleep(0.1)
            counter += 1
            now = gate.clock()
            if now - began > GRACE:
                for front in tuple(fronts):
                    if isinstance(front, Front) and front.idle():
                        front.transport.close()
            if now - began > gate.timeouts.drain:
                for front in tuple(fronts):
                    if isinstance(front, Front):
                        front.cut()
                await asyncio.sleep(0.2)
                break
            self.worker.tick(counter, fronts)
        for task in tuple(gate.probes):
            task.cancel()
        for pool in (gate.control, *(backend.pool for backend in gate.core.catalogue.backends.values())):
            pool.close()
        self.worker.close()
        log.info("worker %d has ended", self.worker.number)


def peer_key(settings: Gateway) -> str:
    """What this gateway shows to those of other hosts; empty when there are none."""
    if not settings.peer_key_file:
        return ""
    try:
        return Path(settings.peer_key_file).read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{settings.peer_key_file}: the peer key cannot be read: {error}") from None


def run_worker(settings: Gateway, number: int, listeners: list[socket.socket]) -> int:
    """Serve until told to stop; 0 when everything ended in order."""
    worker = Worker(settings, number)

    async def serve() -> None:
        config = uvicorn.Config(
            answered_elsewhere,
            http=bound_to(worker.make_gate()),
            ws="none",
            lifespan="off",
            log_config=None,
            backlog=BACKLOG,
        )
        await WorkerServer(config, worker).serve(sockets=listeners)

    loop_of = uvicorn.Config(answered_elsewhere, loop="uvloop", log_config=None).get_loop_factory()
    with asyncio.Runner(loop_factory=loop_of) as runner:
        runner.run(serve())
    return 0
