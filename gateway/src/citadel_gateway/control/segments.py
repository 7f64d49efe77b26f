"""The journal's files, as the settler reads them.

A worker process writes `<host>-w<N>-<start>-<K>.jsonl`, one segment after the other; all segments of one process are a
group. A segment is made long beforehand, so zeros follow what is written. The process holds a lock on its newest
segment as long as it lives: a group without any lock has said all that it will ever say.
"""

import fcntl
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from citadel_gateway.records import Opened, Record, Settled, decode
from citadel_gateway.settings import Gateway

NAME = re.compile(r"(?P<group>.+-w\d+-\d+)-(?P<number>\d+)\.jsonl")
CHUNK = 1 << 20
LONGEST = 64 << 20  # a line


class Line(NamedTuple):
    start: int
    data: bytes


def folder_of(settings: Gateway) -> Path:
    return Path(settings.journal.folder or Path(settings.state_dir) / "journal")


class Segment:
    """One file: how far it is read, and where the requests that are still open were opened."""

    def __init__(self, path: Path, group: str, number: int, position: int = 0) -> None:
        self.path = path
        self.name = path.name
        self.group = group
        self.number = number
        self.position = position
        self.saved = position  # what the database knows
        self.used = position  # where the last line ends that was read
        self.open: dict[str, int] = {}  # id -> where its Opened begins, in the order of the file
        self.settled = 0  # since it was last saved
        self.damaged = 0
        self.done = False
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    @property
    def safe(self) -> int:
        """From where to read again after a restart, so that no open request is forgotten."""
        return next(iter(self.open.values()), self.position)

    def has_data(self) -> bool:
        return os.pread(self.descriptor, 1, 0) not in (b"", b"\0")

    def locked(self) -> bool:
        """Whether its worker lives. The lock that we get is given back at once."""
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        fcntl.flock(self.descriptor, fcntl.LOCK_UN)
        return False

    def read(self, final: bool, size: int = CHUNK) -> tuple[list[Line], int]:
        """The next complete lines, and where the one after them begins. `final`: nothing more will be written, so a
        line without an end is broken, and a hole of zeros (pages that a power cut took) is passed over.
        """
        while True:
            data = os.pread(self.descriptor, size, self.position)
            at_end = len(data) < size
            lines, used = split(data, self.position, final, at_end)
            if used or at_end or size >= LONGEST or (not final and b"\0" in data):
                return lines, self.position + used
            size *= 2

    def unread(self) -> bytes:
        """What is written and not read yet; for who looks for one request, from another thread."""
        data = bytearray()
        with self.path.open("rb") as file:
            file.seek(self.position)
            while piece := file.read(CHUNK):
                end = piece.find(b"\0")
                data += piece if end < 0 else piece[:end]
                if end >= 0:
                    break
        return bytes(data)

    def shrink(self) -> None:
        """Give the zeros after the last line back; a segment without any line goes as a whole."""
        with suppress(FileNotFoundError):
            if not self.used:
                self.path.unlink()
            elif self.path.stat().st_size > self.used:
                os.truncate(self.path, self.used)

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def split(data: bytes, position: int, final: bool, at_end: bool) -> tuple[list[Line], int]:
    """Lines of a piece of a file that begins at `position`, and how many of its bytes they take."""
    if not final:
        hole = data.find(b"\0")
        if hole >= 0:
            data = data[:hole]
    used = len(data) if final and at_end else data.rfind(b"\n") + 1
    lines = []
    start = 0
    for whole in data[:used].split(b"\n"):
        if b"\0" in whole:
            lines += [Line(position + start, piece) for piece in whole.split(b"\0") if piece]
        elif whole:
            lines.append(Line(position + start, whole))
        start += len(whole) + 1
    return lines, used


class Folder:
    """All segments of this host that are not in the ledger yet, in the order in which they were written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.groups: dict[str, list[Segment]] = {}
        self.finished: set[str] = set()  # segments of which everything is in the ledger

    def look(self, offsets: dict[str, int]) -> None:
        """Find new segments; `offsets` says from where to read those that were begun before."""
        known = {segment.name for segments in self.groups.values() for segment in segments} | self.finished
        for name in sorted(names(self.path)):
            match = NAME.fullmatch(name)
            if match is None or name in known:
                continue
            try:
                segment = Segment(self.path / name, match["group"], int(match["number"]), offsets.get(name, 0))
            except FileNotFoundError:  # removed meanwhile
                continue
            group = self.groups.setdefault(segment.group, [])
            group.append(segment)
            group.sort(key=lambda one: one.number)

    def __iter__(self) -> Iterator[Segment]:
        return (segment for segments in list(self.groups.values()) for segment in segments)

    def drop(self, segments: Iterable[Segment]) -> None:
        """These are done. Who restarts again and again must not fill the disk with segments made beforehand."""
        for segment in segments:
            segment.close()
            segment.shrink()
            self.finished.add(segment.name)
            self.groups[segment.group].remove(segment)
            if not self.groups[segment.group]:
                del self.groups[segment.group]

    def expired(self, before: float) -> list[str]:
        """Remove finished segments that nobody has written to since; their names."""
        gone = []
        for name in sorted(self.finished):
            path = self.path / name
            try:
                if path.stat().st_mtime >= before:
                    continue
                path.unlink()
            except FileNotFoundError:
                pass
            self.finished.discard(name)
            gone.append(name)
        return gone

    def close(self) -> None:
        for segment in self:
            segment.close()


def names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []  # no worker has written anything yet


class Survey:
    """What all segments of a folder say, read from their beginnings: for `ledger check`."""

    def __init__(self, folder: Path) -> None:
        self.opened: set[str] = set()
        self.settled: dict[str, int] = {}
        self.damaged = 0
        self.living = False
        looked = Folder(folder)
        looked.look({})
        for segment in looked:
            self.living = segment.locked() or self.living
        for segment in looked:
            while True:
                found, position = segment.read(final=not self.living)
                for line in found:
                    self.take(line.data)
                if position == segment.position:
                    break
                segment.position = position
        looked.close()

    def take(self, raw: bytes) -> None:
        record = decoded(raw)
        if isinstance(record, Settled):
            self.settled[record.id] = self.settled.get(record.id, 0) + 1
        elif isinstance(record, Opened):
            self.opened.add(record.id)
        elif record is None:
            self.damaged += 1

    @property
    def twice(self) -> list[str]:
        return sorted(name for name, count in self.settled.items() if count > 1)

    @property
    def unsettled(self) -> list[str]:
        return sorted(self.opened - self.settled.keys())


def decoded(raw: bytes) -> Record | None:
    """A line of the journal; None for one that is damaged."""
    try:
        record: Record = decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return record
