"""The access log: a JSON line for each request, without prompt text and without keys, written in batches off the
request path.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from citadel_gateway.core.ticket import Line

BATCH: Final = 256  # lines that are encoded at once; more would be felt as a pause by the streams
BACKLOG: Final = (
    64 * 1024 * 1024
)  # bytes that may wait for a disk that does not take them; what is above is counted as lost


class AccessLog:
    """Lines wait in memory until `flush`; `write` may run in a thread.

    The file is opened anew when it was renamed or removed (log rotation) and when `reopen` was called (SIGHUP).
    Several workers append to one file: each writes whole lines with O_APPEND.
    """

    def __init__(self, path: str, lost: Callable[[int], None]) -> None:
        self.path = path
        self.lost = lost
        self.lines: list[Line] = []
        self.waiting: list[bytes] = []
        self.size = 0
        self.file = -1
        self.inode = 0
        self.look = 0.0
        self.torn = False
        self.encode_lines = msgspec.json.Encoder(decimal_format="number").encode_lines

    def record(self, line: Line) -> None:
        self.lines.append(line)
        if len(self.lines) >= BATCH:
            self.pack()

    def pack(self) -> None:
        if not self.lines:
            return
        count = len(self.lines)
        data = self.encode_lines(self.lines)
        self.lines.clear()
        if self.size + len(data) > BACKLOG:
            self.lost(count)
            return
        self.size += len(data)
        self.waiting.append(data)

    def take(self) -> bytes:
        """Everything that waits, for `write`."""
        self.pack()
        data = b"".join(self.waiting)
        self.waiting.clear()
        self.size = 0
        return data

    def reopen(self) -> None:
        """Open the file anew before the next line."""
        self.look = 0.0
        self.inode = 0

    def write(self, data: bytes) -> int:
        """Write a block; the number of lines that could not be written."""
        rest = b"\n" + data if self.torn else data  # a line that broke off on a full disk must not swallow the next one
        try:
            while rest:
                rest = rest[os.write(self.descriptor(), rest) :]
                self.torn = not rest.startswith(b"\n") and len(rest) > 0
        except OSError:
            return rest.count(b"\n")
        self.torn = False
        return 0

    def descriptor(self) -> int:
        if self.path == "-":
            return sys.stdout.fileno()
        now = time.monotonic()
        if now >= self.look:
            self.look = now + 1.0
            try:
                inode = Path(self.path).stat().st_ino
            except OSError:
                inode = 0
            if self.file < 0 or inode != self.inode or not inode:
                self.close()
                self.file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
                self.inode = os.fstat(self.file).st_ino
        return self.file

    def close(self) -> None:
        if self.file >= 0:
            os.close(self.file)
            self.file = -1
