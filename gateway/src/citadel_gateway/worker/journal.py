"""The journal of one worker: what was asked and used, kept from the moment it is known.

The records of one turn of the event loop are written together, at its end and before anything of what was decided in
it leaves the process (see `Outbox`). They go into a file whose blocks were allocated before, so that a full disk is
known before it hurts; once written they are safe from a `kill -9`. Zero bytes are what is not written yet. A thread
makes the next segment ahead of time and syncs once a second; without space records wait in memory, and those that find
no room there are counted as lost: requests go on.

Segments of one process are `<host>-w<N>-<start ns>-<K>.jsonl`. The newest is locked as long as the process lives, so
that the settler can tell the journal of a dead worker from that of a silent one.
"""

import contextlib
import fcntl
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final

from citadel_gateway.records import Record, encode_lines

log = logging.getLogger("citadel_gateway")

WAITING: Final = 8 * 1024 * 1024  # bytes of records that may wait for space


class Segment:
    """One file, locked. Raises OSError when there is no space for it."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self.end = 0  # of what is written
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.posix_fallocate(self.fd, 0, size)
        except OSError:
            os.close(self.fd)
            path.unlink(missing_ok=True)
            raise

    def write(self, lines: bytes) -> bool:
        """Append whole lines; False when they do not fit, or the disk has failed."""
        end = self.end + len(lines)
        if end > self.size:
            return False
        try:
            written = os.pwrite(self.fd, lines, self.end)
            while written < len(lines):
                written += os.pwrite(self.fd, lines[written:], self.end + written)
        except OSError:  # what was written of them is written over
            return False
        self.end = end
        return True

    def sync(self) -> None:
        """Bring what is written to the disk."""
        os.fdatasync(self.fd)

    def close(self) -> None:
        """Give back the space that was not used, and the lock. A segment without a record leaves no file."""
        try:
            if self.end:
                os.ftruncate(self.fd, self.end)
                os.fdatasync(self.fd)
            else:
                self.path.unlink(missing_ok=True)
        finally:
            os.close(self.fd)


def remove_unused(path: Path) -> None:
    """Take away a segment in which nobody has written and nobody will."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if file.read(1) in (b"", b"\0"):
            path.unlink()


class Journal:
    """`append` and `tick` belong to the event loop, `tend` to the thread for files, `close` comes after both."""

    def __init__(
        self, folder: Path, host: str, number: int, segment_bytes: int, lost: Callable[[int], None], started: int = 0
    ) -> None:
        self.folder = folder
        self.worker = f"{host}-w{number}"
        self.name = f"{self.worker}-{started or time.time_ns():020d}"
        self.segment_bytes = segment_bytes
        self.lost = lost
        self.serial = 0
        self.current: Segment | None = None
        self.next: Segment | None = None
        self.former: list[Segment] = []
        self.soon: Callable[[Callable[[], None]], object] | None = None  # calls at the end of the loop's turn
        self.fresh: list[Record] = []  # of this turn
        self.waiting: deque[bytes] = deque()
        self.size = 0  # bytes that wait
        self.trouble = ""

    def start(self) -> None:
        """The first segment, once all else that could fail has not; a worker that cannot start leaves none behind."""
        for path in self.folder.glob(f"{self.worker}-*.jsonl"):
            remove_unused(path)
        self.make()

    # event loop -----------------------------------------------------------------------------------------------------
    def append(self, record: Record) -> None:
        """It is written at the end of the turn; without a loop, at once."""
        if not self.fresh and self.soon is not None:
            self.soon(self.flush)
        self.fresh.append(record)
        if self.soon is None:
            self.flush()

    def flush(self) -> None:
        """Write what this turn has brought."""
        if not self.fresh:
            return
        lines = encode_lines(self.fresh)
        self.fresh.clear()
        if self.waiting or not self.put(lines):
            for line in lines.splitlines(keepends=True):
                if self.waiting or not self.put(line):
                    self.wait(line)

    def put(self, lines: bytes) -> bool:
        """Into the segment, or into the next one when it is full and the next one is there."""
        current = self.current
        if current is not None and current.write(lines):
            return True
        following, self.next = self.next, None
        if following is None:
            return False
        if current is not None:
            self.former.append(current)
        self.current = following
        return following.write(lines)

    def wait(self, line: bytes) -> None:
        if self.size + len(line) > WAITING or len(line) >= self.segment_bytes:
            self.lost(1)
            return
        self.waiting.append(line)
        self.size += len(line)

    def tick(self) -> None:
        """Ten times a second: what waits goes first, as soon as there is room."""
        waiting = self.waiting
        while waiting and self.put(waiting[0]):
            self.size -= len(waiting.popleft())

    # thread ---------------------------------------------------------------------------------------------------------
    def tend(self) -> None:
        """Once a second: make the next segment, finish the full ones, sync the present one."""
        if self.next is None:
            self.make()
        try:
            while self.former:
                self.former[0].close()
                del self.former[0]
            if self.current is not None:
                self.current.sync()
        except OSError as error:
            self.complain(str(error))

    def make(self) -> None:
        """The next segment, if there is space."""
        path = self.folder / f"{self.name}-{self.serial}.jsonl"
        try:
            self.folder.mkdir(mode=0o750, parents=True, exist_ok=True)
            self.next = Segment(path, self.segment_bytes)
        except OSError as error:
            self.complain(f"{path}: {error.strerror}")
            return
        self.serial += 1
        if self.trouble:
            log.warning("the journal has space again")
            self.trouble = ""

    def complain(self, trouble: str) -> None:
        """Once for each trouble, not once a second."""
        if trouble != self.trouble:
            self.trouble = trouble
            log.warning("journal: %s", trouble)

    def close(self) -> None:
        """At the end of the worker; what found no space is lost."""
        self.flush()
        self.tick()
        if self.waiting:
            self.lost(len(self.waiting))
            self.waiting.clear()
        for segment in (*self.former, self.current, self.next):
            if segment is not None:
                with contextlib.suppress(OSError):
                    segment.close()
        self.former, self.current, self.next = [], None, None
