"""What the workers of a host tell each other without a system call: who has how much under way.

Each worker owns one file, `run_dir/board-N`, that all the others have mapped into their memory. A row belongs to a
name (a backend or a model) and is found by its hash, so that workers need not know the models in the same order. A
worker writes only its own file; a reader adds up the rows of those whose heartbeat is not older than a second, so that
what a killed worker had under way is forgotten by itself.

The numbers are read and written without locks. Each is one aligned word, so none is ever half written; two workers
that look in the same instant both see the last free slot, and may both take it.
"""

import contextlib
import mmap
import os
from hashlib import blake2b
from pathlib import Path
from typing import Final

ROWS: Final = 1024  # more names than a host has backends and models; the names after that are not shared
WORDS: Final = 8  # a row is one line of the processor's cache
SIZE: Final = (ROWS + 1) * WORDS * 8
MAGIC: Final = int.from_bytes(b"citadel1", "little")  # another layout gets another number, and is not read

STALE: Final = 1.0  # a worker that has not said a word for this long does not count
LOOK_AGAIN: Final = 1.0  # seconds between looks for workers that have come or were replaced

# words of a row
KEY: Final = 0
INFLIGHT: Final = 1
TOKENS: Final = 2
QUEUED: Final = 3
QUEUED_TOKENS: Final = 4
HEAD: Final = 5
ARRIVED: Final = 6
NOTHING_WAITS: Final = 2**62  # HEAD of a worker whose queue is empty
HEARTBEAT: Final = (
    1  # word of the first row, in microseconds of the monotonic clock, which all processes of a host share
)

Words = memoryview  # of 64-bit integers


def key_of(name: str) -> int:
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little", signed=True) or 1


def find(words: Words, key: int) -> int:
    """Where the row of `key` begins, or minus where it would be made; 0 when the table is full."""
    start = key % ROWS
    for step in range(ROWS):
        base = ((start + step) % ROWS + 1) * WORDS
        found = words[base]
        if found == key:
            return base
        if not found:
            return -base
    return 0


class Row:
    """The figures of one name: ours, which we write, and those of the other workers that are alive."""

    __slots__ = ("base", "key", "mine", "others")

    def __init__(self, key: int, mine: Words, base: int) -> None:
        self.key = key
        self.mine = mine
        self.base = base
        self.others: tuple[tuple[Words, int], ...] = ()

    def write(self, word: int, value: int) -> None:
        self.mine[self.base + word] = value

    def elsewhere(self, word: int) -> int:
        """The sum of one figure over the other workers."""
        total = 0
        for words, base in self.others:
            total += words[base + word]
        return total

    def earliest(self) -> int:
        """HEAD of the other worker whose first waiter comes first."""
        first = NOTHING_WAITS
        for words, base in self.others:
            head = words[base + HEAD]
            if head < first:
                first = head
        return first


class Brother:
    """Another worker's file as we see it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.words: Words | None = None
        self.inode = 0
        self.alive = False

    def look(self, now: float) -> None:
        """Alive or not; changes what `alive` says."""
        words = self.words
        if words is None or words[0] != MAGIC:
            self.alive = False
            return
        age = now - words[HEARTBEAT] / 1e6
        self.alive = -STALE < age <= STALE  # one of the future is left from before the host was started

    def open(self) -> bool:
        """Map the file, or the one that has taken its place. True when there is a new one."""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino == self.inode or status.st_size < SIZE:
                    return False
                self.words = memoryview(mmap.mmap(file.fileno(), SIZE, access=mmap.ACCESS_READ)).cast("q")
                self.inode = status.st_ino
                return True
        except OSError:
            return False


class Board:
    """This worker's file, and those of the others. Without a folder it is private memory."""

    def __init__(self, folder: Path | None = None, number: int = 1, workers: int = 1) -> None:
        self.words = memoryview(bytearray(SIZE)).cast("q")
        self.brothers: list[Brother] = []
        self.rows: dict[str, Row] = {}
        self.look_next = 0.0
        if folder is not None:
            self.words = memoryview(own_file(folder / f"board-{number}")).cast("q")
            others = (other for other in range(1, workers + 1) if other != number)
            self.brothers = [Brother(folder / f"board-{other}") for other in others]
        self.words[0] = MAGIC

    def row(self, name: str) -> Row:
        """The row of a name. It is never given to another one as long as this process lives."""
        row = self.rows.get(name)
        if row is None:
            key = key_of(name)
            base = -find(self.words, key)
            if base > 0:
                row = Row(key, self.words, base)
                row.write(HEAD, NOTHING_WAITS)
                row.write(KEY, key)
            else:
                row = Row(key, memoryview(bytearray(WORDS * 8)).cast("q"), 0)
            self.rows[name] = row
            self.connect(row)
        return row

    def connect(self, row: Row) -> None:
        """Where the others, as far as they live, keep the same name."""
        places = ((brother.words, find(brother.words, row.key)) for brother in self.brothers if brother.words)
        alive = {id(brother.words) for brother in self.brothers if brother.alive}
        row.others = tuple((words, base) for words, base in places if base > 0 and id(words) in alive)

    def tick(self, now: float) -> None:
        """Say that we live, and see who else does. Called ten times a second."""
        self.words[HEARTBEAT] = int(now * 1e6)
        if not self.brothers:
            return
        for brother in self.brothers:
            brother.look(now)
        if now >= self.look_next:
            self.look_next = now + LOOK_AGAIN
            for brother in self.brothers:
                if not brother.alive and brother.open():
                    brother.look(now)
        for row in self.rows.values():
            self.connect(row)

    def alive(self) -> int:
        """Workers of this host that live, this one among them."""
        return 1 + sum(brother.alive for brother in self.brothers)

    def close(self) -> None:
        """Nothing of ours counts any more."""
        self.words[HEARTBEAT] = 0
        self.brothers = []
        for row in self.rows.values():
            row.others = ()


def own_file(path: Path) -> mmap.mmap:
    """The file of this worker, all zero. It is used again rather than replaced, so that the others need not look for
    a new one, and its blocks are there before they are needed: a full disk would else be a crash at the first write.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        with contextlib.suppress(OSError):
            os.fchmod(handle, 0o640)
        os.posix_fallocate(handle, 0, max(SIZE, os.fstat(handle).st_size))
        mapped = mmap.mmap(handle, SIZE)
    finally:
        os.close(handle)
    mapped[:] = bytes(SIZE)
    return mapped
