"""A fake worker's journal: segments as a worker writes them, without the worker."""

import fcntl
import os
from pathlib import Path
from typing import Any

from citadel_gateway.records import Opened, Progress, Running, Settled, encode

SEGMENT = 64 * 1024


class FakeJournal:
    """One worker process's group of segments. `die` lets the lock go, as a kill does."""

    def __init__(self, folder: Path, host: str = "test", worker: int = 1, start: int = 1, size: int = SEGMENT) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.host = host
        self.worker = worker
        self.start = start
        self.size = size
        self.number = -1
        self.used = 0
        self.descriptor = -1
        self.rotate()

    @property
    def path(self) -> Path:
        return self.folder / f"{self.host}-w{self.worker}-{self.start}-{self.number}.jsonl"

    def rotate(self) -> None:
        old = self.descriptor
        self.number += 1
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o640)
        fcntl.flock(self.descriptor, fcntl.LOCK_EX)
        os.truncate(self.descriptor, self.size)
        if old >= 0:
            os.truncate(old, self.used)
            os.close(old)
        self.used = 0

    def write(self, *records: Opened | Progress | Settled) -> None:
        for record in records:
            self.raw(encode(record) + b"\n")

    def raw(self, data: bytes) -> None:
        if self.used + len(data) > self.size:
            self.rotate()
        self.used += os.pwrite(self.descriptor, data, self.used)

    def die(self) -> None:
        os.close(self.descriptor)
        self.descriptor = -1


def opened(name: str, **more: Any) -> Opened:
    given: dict[str, Any] = {
        "request_id": f"r-{name}", "at": 1_900_000_000.25, "host": "test", "worker": 1, "user": "ann", "key": "k1",
        "tier": "basic", "model": "one", "endpoint": "chat", **more,
    }  # fmt: skip
    return Opened(name, **given)


def settled(name: str, **more: Any) -> Settled:
    """7 tokens in, 5 out, 0.001 USD."""
    given: dict[str, Any] = {
        "request_id": f"r-{name}", "at": 1_900_000_000.25, "host": "test", "worker": 1, "user": "ann", "key": "k1",
        "tier": "basic", "model": "one", "endpoint": "chat", "status": 200, "outcome": "ok", "input_tokens": 7,
        "output_tokens": 5, "exact": True, "cost_usd": 0.001, "cost": {"tokens": 0.001}, "engine_seconds": 0.5, **more,
    }  # fmt: skip
    return Settled(name, **given)


def progress(*running: Running, at: float = 1_900_000_002.25) -> Progress:
    return Progress(at, running)
