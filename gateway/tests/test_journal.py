"""The journal of a worker: nothing that was written is lost, whatever ends the process."""

import asyncio
import errno
import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
from citadel_gateway.records import Opened, Record, decode
from citadel_gateway.worker import journal as module
from citadel_gateway.worker.journal import Journal
from citadel_gateway.worker.outbox import Outbox

from gateway.tests.processes import environment

WRITER = """
import sys
from pathlib import Path
from citadel_gateway.worker.journal import Journal
from gateway.tests.test_journal import opened
journal = Journal(Path(sys.argv[1]), "h", 1, 65536, print)
journal.start()
for number in range(10**9):
    journal.append(opened(number))
    if number % 50 == 0:
        journal.tend()
        print(number, flush=True)
"""


def opened(number: int) -> Opened:
    return Opened(f"w-{number:x}", "r", 1.0, "h", 1, "u", "k", "t", "m", "chat")


def lines(path: Path) -> list[Record]:
    """As the settler reads it: up to the last newline before the zero bytes."""
    data = path.read_bytes().partition(b"\0")[0]
    return [decode(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]


def all_ids(folder: Path) -> list[str]:
    paths = sorted(folder.glob("*.jsonl"), key=lambda path: int(path.stem.rpartition("-")[2]))
    return [record.id for path in paths for record in lines(path) if isinstance(record, Opened)]


def locked(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


@pytest.fixture
def lost() -> list[int]:
    return []


def make(folder: Path, lost: list[int], size: int = 65536) -> Journal:
    journal = Journal(folder, "h", 3, size, lost.append)
    journal.start()
    return journal


def test_a_record_is_in_the_file_at_once(tmp_path: Path, lost: list[int]) -> None:
    journal = make(tmp_path / "journal", lost)
    journal.append(opened(1))
    (path,) = (tmp_path / "journal").glob("h-w3-*-0.jsonl")
    assert lines(path) == [opened(1)]
    assert path.stat().st_size == 65536
    assert path.stat().st_mode & 0o777 == 0o640
    assert locked(path)
    journal.close()
    assert not locked(path)
    assert path.read_bytes().endswith(b"}\n")
    assert not lost


def test_records_of_one_turn_are_written_together_before_anything_leaves(tmp_path: Path, lost: list[int]) -> None:
    journal = make(tmp_path, lost)
    calls: list[Callable[[], None]] = []
    journal.soon = calls.append
    for number in range(3):
        journal.append(opened(number))
    assert all_ids(tmp_path) == []
    assert calls == [journal.flush]
    loop = asyncio.new_event_loop()
    outbox = Outbox(loop)
    outbox.before = journal.flush
    transport = Recorder(tmp_path)
    outbox.put(cast("asyncio.Transport", transport), b"reply", load=1)
    loop.close()
    assert transport.seen == [["w-0", "w-1", "w-2"]]
    calls[0]()
    journal.append(opened(3))
    assert len(calls) == 2
    journal.close()
    assert all_ids(tmp_path) == ["w-0", "w-1", "w-2", "w-3"]


class Recorder:
    """A transport that notes what the journal has when it is written to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: list[list[str]] = []

    def write(self, data: bytes) -> None:
        self.seen.append(all_ids(self.folder))


def test_segments_follow_each_other(tmp_path: Path, lost: list[int]) -> None:
    journal = make(tmp_path, lost, 4096)
    for number in range(200):
        journal.append(opened(number))
        journal.tend()
        newest = max(tmp_path.glob("*.jsonl"), key=lambda path: int(path.stem.rpartition("-")[2]))
        assert locked(newest)
    assert len(list(tmp_path.glob("*.jsonl"))) > 3
    journal.close()
    assert all_ids(tmp_path) == [f"w-{number:x}" for number in range(200)]
    assert not lost
    assert all(path.stat().st_size for path in tmp_path.glob("*.jsonl"))


def test_what_was_synced_is_still_there(tmp_path: Path, lost: list[int]) -> None:
    journal = make(tmp_path, lost)
    for number in range(300):
        journal.append(opened(number))
        if number % 40 == 0:
            journal.tend()
    journal.close()
    assert len(all_ids(tmp_path)) == 300


def test_a_full_disk_holds_up_nothing(tmp_path: Path, lost: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    journal = make(tmp_path, lost, 4096)
    real = os.posix_fallocate

    def full(fd: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(module, "WAITING", 4096)
    for number in range(100):
        journal.append(opened(number))
        journal.tend()
    assert "No space left" in journal.trouble
    assert journal.size <= 4096
    assert 0 < sum(lost) < 60
    kept = 100 - sum(lost)
    monkeypatch.setattr(os, "posix_fallocate", real)
    for _ in range(5):
        journal.tend()
        journal.tick()
    journal.append(opened(100))
    assert not journal.trouble
    journal.close()
    assert all_ids(tmp_path) == [f"w-{number:x}" for number in (*range(kept), 100)]


def test_without_space_from_the_beginning(tmp_path: Path, lost: list[int]) -> None:
    (tmp_path / "journal").write_text("in the way")
    journal = make(tmp_path / "journal", lost)
    journal.append(opened(1))
    journal.append(opened(2))
    journal.tend()
    journal.close()
    assert lost == [2]


def test_what_nobody_has_written_in_is_taken_away(tmp_path: Path, lost: list[int]) -> None:
    """As a worker leaves it that was killed between its start and its first request."""
    names = ["h-w3-1-0.jsonl", "h-w3-1-1.jsonl", "h-w3-2-0.jsonl", "h-w33-1-0.jsonl", "h-w3-3-0.jsonl"]
    for name in names:
        (tmp_path / name).write_bytes(bytes(8192))
    (tmp_path / names[1]).write_bytes(b"{}\n" + bytes(100))
    with (tmp_path / names[4]).open("rb") as living:
        fcntl.flock(living, fcntl.LOCK_EX)
        journal = make(tmp_path, lost)
    journal.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([names[1], names[3], names[4]])


def test_a_record_larger_than_a_segment_is_counted(tmp_path: Path, lost: list[int]) -> None:
    journal = make(tmp_path, lost, 4096)
    journal.append(Opened("x" * 5000, "r", 1.0, "h", 1, "u", "k", "t", "m", "chat"))
    journal.append(opened(1))
    assert lost == [1]
    journal.close()


def test_the_loop_and_the_thread_at_the_same_time(tmp_path: Path, lost: list[int]) -> None:
    journal = make(tmp_path, lost, 8192)
    over = threading.Event()

    def tend() -> None:
        while not over.is_set():
            journal.tend()

    thread = threading.Thread(target=tend)
    thread.start()
    for number in range(3000):
        journal.append(opened(number))
        journal.tick()
    over.set()
    thread.join()
    journal.tend()
    journal.tick()
    journal.close()
    assert all_ids(tmp_path) == [f"w-{number:x}" for number in range(3000 - sum(lost))]


def test_a_kill_loses_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    said = 0
    while said < 2000:
        said = int(process.stdout.readline())
    process.kill()
    said = int([str(said), *process.stdout.read().splitlines()][-1])
    process.wait()
    process.stdout.close()
    found = all_ids(tmp_path)
    assert found == [f"w-{number:x}" for number in range(len(found))]
    assert len(found) > said
    assert not any(locked(path) for path in tmp_path.glob("*.jsonl"))
