"""How fast the settler enters a journal into the ledger, with all that takes part in its transaction but conversations.

    PYTHONPATH=gateway/src:. python bench/gateway/ledger.py [postgresql+psycopg://USER@HOST:PORT/NAME] [PASSWORD_FILE]

Without an address into SQLite. Each record is as large as a real one; a schema of its own is made and dropped again.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

from citadel_gateway.control.segments import folder_of
from citadel_gateway.control.settler import Settler
from citadel_gateway.control.sql import Database
from citadel_gateway.core.pricing import Prices
from citadel_gateway.records import Candidate, Why
from citadel_gateway.settings import Database as Where
from citadel_gateway.settings import Gateway, Hardware, Listen
from sqlalchemy import text

from gateway.tests.fake_worker import FakeJournal, opened, settled

RECORDS = 40_000
WHY = Why(
    policy="auto",
    rule="short",
    choose="load",
    candidates=(Candidate("one", "127.0.0.1:11400", 0.5, "best"), Candidate("two", "127.0.0.1:11401", 0.7, "down")),
    prompt_tokens=50,
    remaining={"requests_per_minute": 50, "tokens_per_minute": 1000},
)


def write(journal: FakeJournal) -> None:
    for number in range(RECORDS):
        name = f"b-{number:x}"
        journal.write(
            opened(name),
            settled(
                name, user=f"u{number % 100}", key=f"k{number % 150}", model=f"m{number % 4}", why=WHY,
                request_id=os.urandom(16).hex(), backend="127.0.0.1:11400", session="talk", client="10.0.0.1",
                queue_seconds=0.1, first_byte_seconds=0.2, total_seconds=1.2, bytes_in=100, bytes_out=2000,
            ),
        )  # fmt: skip


def measure(folder: str, where: Where) -> None:
    settings = Gateway("bench", Listen(), "/unused", folder, folder, "/unused", "/unused", database=where)
    database = Database(settings)
    database.migrate()
    journal = FakeJournal(folder_of(settings), host="bench", size=16 << 20)
    write(journal)
    settler = Settler(settings, database, lambda: Prices(Hardware(), ()))
    began, worked = time.monotonic(), time.process_time()
    while settler.step():
        pass
    took, worked = time.monotonic() - began, time.process_time() - worked
    done = settler.counts["settled"]
    kind = database.url.get_backend_name()
    print(f"{kind}: {done} records, {done / took:.0f}/s, {worked / done * 1e6:.0f} µs of the CPU each")
    if not database.sqlite:
        with database.begin() as connection:
            connection.execute(text(f"DROP SCHEMA {where.schema} CASCADE"))
    database.close()
    journal.die()


def main(url: str = "", password_file: str = "") -> None:
    with tempfile.TemporaryDirectory() as folder:
        measure(str(Path(folder)), Where(url=url, password_file=password_file, schema=f"bench_{os.getpid()}"))


if __name__ == "__main__":
    main(*sys.argv[1:])
