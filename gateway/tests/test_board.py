"""What workers of one host know of each other."""

import os
import subprocess
import sys
from pathlib import Path

from citadel_gateway.core import board
from citadel_gateway.core.board import HEAD, INFLIGHT, NOTHING_WAITS, ROWS, TOKENS, Board


def pair(folder: Path) -> tuple[Board, Board]:
    one, two = Board(folder, 1, 2), Board(folder, 2, 2)
    for _ in range(2):
        one.tick(10.0)
        two.tick(10.0)
    return one, two


def test_two_workers_see_each_other(tmp_path: Path) -> None:
    one, two = pair(tmp_path)
    mine, other = one.row("h:1"), two.row("h:1")
    one.tick(10.1)
    two.tick(10.1)
    mine.write(INFLIGHT, 3)
    mine.write(TOKENS, 500)
    assert (other.elsewhere(INFLIGHT), other.elsewhere(TOKENS)) == (3, 500)
    assert mine.elsewhere(INFLIGHT) == 0
    assert (one.alive(), two.alive()) == (2, 2)


def test_names_are_told_apart_in_whatever_order_they_come(tmp_path: Path) -> None:
    one, two = pair(tmp_path)
    names = [f"h:{port}" for port in range(300)]
    for number, name in enumerate(names):
        one.row(name).write(INFLIGHT, number)
    for name in reversed(names):
        two.row(name)
    two.tick(10.1)
    assert [two.row(name).elsewhere(INFLIGHT) for name in names] == list(range(300))


def test_a_worker_that_says_nothing_does_not_count(tmp_path: Path) -> None:
    one, two = pair(tmp_path)
    row = two.row("h:1")
    one.row("h:1").write(INFLIGHT, 3)
    two.tick(10.9)
    assert row.elsewhere(INFLIGHT) == 3
    two.tick(11.1)
    assert (row.elsewhere(INFLIGHT), two.alive()) == (0, 1)
    one.tick(11.2)
    two.tick(11.2)
    assert row.elsewhere(INFLIGHT) == 3
    one.close()
    two.tick(11.3)
    assert row.elsewhere(INFLIGHT) == 0


def test_a_worker_that_starts_again_begins_with_nothing(tmp_path: Path) -> None:
    one, two = pair(tmp_path)
    one.row("h:1").write(INFLIGHT, 3)
    row = two.row("h:1")
    again = Board(tmp_path, 1, 2)
    again.tick(10.2)
    two.tick(10.2)
    assert row.elsewhere(INFLIGHT) == 0
    again.row("h:1").write(INFLIGHT, 1)
    two.tick(10.3)
    assert row.elsewhere(INFLIGHT) == 1


def test_a_file_that_was_replaced_is_found_again(tmp_path: Path) -> None:
    one, two = pair(tmp_path)
    row = two.row("h:1")
    (tmp_path / "board-1").unlink()
    again = Board(tmp_path, 1, 2)
    again.row("h:1").write(INFLIGHT, 2)
    for now in (12.5, 12.6):
        again.tick(now)
        two.tick(now)
    assert row.elsewhere(INFLIGHT) == 2
    assert one.row("h:1").elsewhere(INFLIGHT) == 0


def test_files_that_are_none_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "board-2").write_bytes(b"short")
    (tmp_path / "board-3").write_bytes(b"x" * board.SIZE)
    one = Board(tmp_path, 1, 3)
    one.tick(5.0)
    assert one.alive() == 1


def test_a_heartbeat_of_the_future_is_one_of_another_boot(tmp_path: Path) -> None:
    one, two = Board(tmp_path, 1, 2), Board(tmp_path, 2, 2)
    one.tick(90_000.0)
    two.tick(3.0)
    assert two.alive() == 1


def test_more_names_than_rows_are_served_alone() -> None:
    one = Board()
    rows = [one.row(str(number)) for number in range(ROWS + 5)]
    rows[-1].write(INFLIGHT, 1)
    assert rows[0].mine[rows[0].base + INFLIGHT] == 0
    assert rows[-1].elsewhere(INFLIGHT) == 0
    assert rows[-1].earliest() == NOTHING_WAITS


def test_the_earliest_waiter_of_the_others(tmp_path: Path) -> None:
    one, two = pair(tmp_path)
    one.row("m").write(HEAD, 70)
    row = two.row("m")
    assert row.earliest() == 70
    assert one.row("m").earliest() == NOTHING_WAITS


OTHER = """
import sys
from pathlib import Path
from citadel_gateway.core.board import INFLIGHT, Board

board = Board(Path(sys.argv[1]), 2, 2)
board.tick(10.0)
board.row("h:1").write(INFLIGHT, 41)
"""


def test_another_process_is_seen(tmp_path: Path) -> None:
    one = Board(tmp_path, 1, 2)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", OTHER, str(tmp_path)], check=True, env=environment, timeout=60)
    one.tick(10.1)
    assert one.row("h:1").elsewhere(INFLIGHT) == 41
