"""Lines in batches, rotation, and a disk that does not take them."""

import json
import os
from pathlib import Path

import pytest
from citadel_gateway.core.ticket import Line
from citadel_gateway.worker import accesslog
from citadel_gateway.worker.accesslog import AccessLog


def line(number: int = 0) -> Line:
    return Line(1.5, f"r{number}", "k", "m", "/p", 200, False, 1, 2, None, 3.25, "c", "ok")


def log_to(path: object) -> tuple[AccessLog, list[int]]:
    lost: list[int] = []
    return AccessLog(str(path), lost.append), lost


def test_lines_are_written_in_order(tmp_path: Path) -> None:
    log, _ = log_to(tmp_path / "a.jsonl")
    for number in range(1000):
        log.record(line(number))
    assert len(log.lines) < accesslog.BATCH
    assert log.write(log.take()) == 0
    log.close()
    written = [json.loads(text) for text in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [one["request_id"] for one in written] == [f"r{number}" for number in range(1000)]
    assert written[0]["ttft_ms"] is None
    assert log.take() == b""


def test_a_renamed_file_is_opened_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    log, _ = log_to(path)
    log.write(b"1\n")
    path.rename(tmp_path / "a.jsonl.1")
    log.write(b"2\n")  # looked at once a second only
    log.reopen()
    log.write(b"3\n")
    log.close()
    assert (tmp_path / "a.jsonl.1").read_text() == "1\n2\n"
    assert path.read_text() == "3\n"
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_full_disk_is_counted_and_tears_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    log, _ = log_to(path)
    real, room = os.write, [5]

    def write(fd: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(28, "No space left on device")
        done = real(fd, data[: room[0]])
        room[0] -= done
        return done

    monkeypatch.setattr(os, "write", write)
    assert log.write(b'{"a":1}\n{"b":2}\n') == 2
    room[0] = 100
    assert log.write(b'{"c":3}\n') == 0
    assert path.read_text() == '{"a":\n{"c":3}\n'


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    log, _ = log_to(tmp_path / "no" / "a.jsonl")
    assert log.write(b"1\n2\n") == 2


def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accesslog, "BACKLOG", 50_000)
    log, lost = log_to(tmp_path / "a.jsonl")
    for number in range(2000):
        log.record(line(number))
    assert sum(lost) > 0
    assert len(log.take()) <= 50_000


def test_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    log, _ = log_to("-")
    log.record(line())
    log.write(log.take())
    assert json.loads(capfd.readouterr().out)["key"] == "k"
    log.close()
