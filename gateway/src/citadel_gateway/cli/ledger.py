"""What was used, by whom, for how much; whether the books are right; and the database itself."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import msgspec

from citadel_gateway.cli.client import Client, Failed, add_key_options, client_of
from citadel_gateway.cli.commands import Commands
from citadel_gateway.cli.show import document, table, when
from citadel_gateway.metrics import write_atomically
from citadel_gateway.settings import Gateway

TIMEOUT = 300.0  # of an export
CANARIES = "/run/citadel-llm"
FILTERS = ("user", "key", "model")


def add(commands: Commands) -> None:
    add_usage(commands)
    add_ledger(commands.group("ledger", "Settled requests, one by one."))
    parser = commands.add("why", "Why a request went as it did.", why)
    parser.add_argument("id", metavar="ID", help="the gateway's id of the request, or its X-Request-ID")
    add_key_options(parser)
    parser.add_argument("--json", action="store_true", help="all that is known")
    parser = commands.add("costs", "What each model costs, at work and idle.", costs)
    add_key_options(parser)
    parser.add_argument("--json", action="store_true", help="print what the control process answers")
    add_reconcile(commands)
    commands.add("migrate", "Make the gateway's tables in its database, or bring them up to date.", migrate)


def add_usage(commands: Commands) -> None:
    parser = commands.add("usage", "What was used: requests, tokens, USD.", usage)
    parser.add_argument(
        "--by", default="user,model", metavar="GROUPS", help="of user,key,model,day (default: user,model)"
    )
    add_span(parser)
    for name in FILTERS:
        parser.add_argument(f"--{name}", default="", metavar=name.upper())
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="for a spreadsheet")
    form.add_argument("--json", action="store_true", help="print what the control process answers")
    add_key_options(parser)


def add_span(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", dest="first", default="", metavar="DAY", help="2031-05-17 (default: 30 days)")
    parser.add_argument("--to", dest="last", default="", metavar="DAY")


def add_ledger(ledger: Commands) -> None:
    parser = ledger.add("list", "Requests, the newest first.", entries)
    add_span(parser)
    for name in (*FILTERS, "outcome", "session", "host"):
        parser.add_argument(f"--{name}", default="", metavar=name.upper())
    parser.add_argument("--limit", type=int, default=20, metavar="N")
    parser.add_argument(
        "--format", choices=("table", "json", "csv", "jsonl"), default="table", help="jsonl is what replay reads"
    )
    add_key_options(parser)
    parser = ledger.add("check", "Is every request there once, and do the days add up? Exit status 1 if not.", check)
    parser.add_argument("--journal", action="store_true", help="compare with this host's journal too, line by line")
    parser.add_argument("--open", action="store_true", help="requests that are still running are no fault")
    parser.add_argument(
        "--offline", action="store_true", help="open the database here; the control process may be down"
    )
    add_key_options(parser)

    parser = ledger.add("prune", "Delete old requests; what they add up to by day stays.", prune)
    parser.add_argument("before", metavar="DAY", help="the first day that stays, as 2031-05-17")
    add_key_options(parser)


def add_reconcile(commands: Commands) -> None:
    parser = commands.add(
        "reconcile",
        "Compare the ledger with the engines' own token counters. Exit status 1 when they differ.",
        reconcile,
    )
    parser.add_argument("model", nargs="*", metavar="MODEL", help="default: all that have engines on this host")
    parser.add_argument("--save", metavar="FILE", help="only note the counters of now, as the baseline of a later run")
    parser.add_argument("--since", metavar="FILE", help="compare from this baseline on (default: the engines' start)")
    parser.add_argument(
        "--tolerance", type=float, default=0.001, metavar="SHARE", help="of the tokens that may differ (default: 0.001)"
    )
    parser.add_argument("--exact", action="store_true", help="not one token may differ")
    parser.add_argument(
        "--metrics", action="append", default=[], metavar="MODEL=FILE", help="a saved /metrics page, instead of asking"
    )
    parser.add_argument(
        "--also", action="append", default=[], metavar="HOST:PORT",
        help="what other gateways sent to this address of ours counts too",
    )  # fmt: skip
    parser.add_argument("--canaries", default=CANARIES, metavar="FOLDER", help="default: %(default)s")
    parser.add_argument(
        "--wait", type=float, default=30.0, metavar="SECONDS", help="for running requests to end (default: 30)"
    )
    parser.add_argument("--offline", action="store_true", help="open the database here; needs --metrics")
    parser.add_argument("--json", action="store_true")
    add_key_options(parser)


def query(options: argparse.Namespace, *names: str, **more: object) -> str:
    """The part of a path behind the question mark, of those that are given."""
    given = {name: getattr(options, name) for name in names} | {"from": options.first, "to": options.last} | more
    return urlencode({name: value for name, value in given.items() if value != ""})


def usd(value: float) -> str:
    return f"{value:.6f}"


def usage(options: argparse.Namespace, settings: Gateway) -> int:
    client = client_of(settings, options)
    path = f"/admin/usage?{query(options, *FILTERS, group_by=options.by)}"
    if options.csv:
        sys.stdout.write(client.raw("GET", f"{path}&format=csv").decode())
        return 0
    found = client.ask("GET", path)
    if options.json:
        document(found)
        return 0
    groups = found["group_by"]
    names = ("requests", "refused", "errors", "input_tokens", "output_tokens", "cached_tokens")
    rows = [
        (*(row[group] for group in groups), *(row[name] for name in names), usd(row["cost_usd"]))
        for row in found["data"]
    ]
    total = found["total"]
    heads = ["total", *[""] * len(groups)][: len(groups)]
    rows.append((*heads, *(total[name] for name in names), usd(total["cost_usd"])))
    print(f"{found['first_day']} to {found['last_day']} (UTC)")
    table(rows, *(group.upper() for group in groups), "REQUESTS", "REFUSED", "ERRORS", "IN", "OUT", "CACHED", "USD")
    return 0


def entries(options: argparse.Namespace, settings: Gateway) -> int:
    client = client_of(settings, options)
    client.timeout = TIMEOUT
    form = "json" if options.format == "table" else options.format
    names = (*FILTERS, "outcome", "session", "host")
    answer = client.raw("GET", f"/admin/ledger?{query(options, *names, limit=options.limit, format=form)}")
    if form != "json":
        sys.stdout.write(answer.decode())
        return 0
    found = msgspec.json.decode(answer)
    if options.format == "json":
        document(found)
        return 0
    rows = [
        (
            when(one["at"]), one["id"], one["user"], one["model"], one["outcome"], one["status"], one["input_tokens"],
            one["output_tokens"], f"{one['total_seconds']:.2f}", usd(one["cost_usd"]),
        )
        for one in found["data"]
    ]  # fmt: skip
    table(rows, "TIME", "ID", "USER", "MODEL", "OUTCOME", "STATUS", "IN", "OUT", "SECONDS", "USD")
    return 0


def why(options: argparse.Namespace, settings: Gateway) -> int:
    found = client_of(settings, options).ask("GET", f"/v1/requests/{quote(options.id)}/why")
    if options.json:
        document(found)
    else:
        print(f"{found['id']} ({found['state']}), {when(found['at'])}")
        print("\n".join(found["story"]))
    return 0


def costs(options: argparse.Namespace, settings: Gateway) -> int:
    found = client_of(settings, options).ask("GET", "/admin/cost")
    if options.json:
        document(found)
        return 0
    rows = [
        (
            one["model"], usd(one["engine_hour_usd"]), usd(one["hardware_hour_usd"]), usd(one["energy_hour_usd"]),
            usd(one["idle_hour_usd"]), f"{one['busy']:.1%}", usd(one["idle_usd_today"]),
            "" if one["per_mtoken_usd"] is None else usd(one["per_mtoken_usd"]),
        )
        for one in found
    ]  # fmt: skip
    heads = ("ENGINE HOUR", "HARDWARE", "ENERGY", "IDLE HOUR", "BUSY", "IDLE TODAY", "MILLION TOKENS")
    table(rows, "MODEL", *heads)
    return 0


# The books ------------------------------------------------------------------------------------------------------------
def check(options: argparse.Namespace, settings: Gateway) -> int:
    found = (
        checked_here(settings) if options.offline else client_of(settings, options).ask("GET", "/admin/ledger/check")
    )
    faults = [
        f"{line['day']} {line['user']} {line['key']} {line['model']}: {apart(line)}" for line in found["differences"]
    ]
    if found["open"] and not options.open:
        faults.append(f"{found['open']} requests are not settled")
    if found["rejected"]:
        faults.append(f"{found['rejected']} requests were rejected by the database: the control process's log has them")
    if options.journal:
        faults += list(compared_with_journal(options, settings))
    for fault in faults:
        print(fault)
    print(f"{found['requests']} requests of {found['users']} users, each once; {found['open']} open; ", end="")
    print(f"{len(faults)} faults" if faults else "the days add up")
    return 1 if faults else 0


def prune(options: argparse.Namespace, settings: Gateway) -> int:
    client = client_of(settings, options)
    client.timeout = TIMEOUT
    found = client.ask("POST", f"/admin/ledger/prune?{urlencode({'before': options.before})}")
    print(f"{found['requests']} requests of the days before {found['before']} are deleted")
    return 0


def apart(line: dict[str, Any]) -> str:
    """What of a day differs."""
    real, said = line["requests"] or {}, line["usage"] or {}
    names = sorted(real.keys() | said.keys())
    return ", ".join(
        f"{name} {said.get(name, 0)} instead of {real.get(name, 0)}"
        for name in names
        if real.get(name) != said.get(name)
    )


def checked_here(settings: Gateway) -> dict[str, Any]:
    """The same without a control process; what is open only the journal knows then."""
    from citadel_gateway.control.segments import Survey, folder_of
    from citadel_gateway.control.sql import reports

    with opened(settings) as connection:
        found = reports.check(connection)
    unsettled = len(Survey(folder_of(settings)).unsettled)
    return {**msgspec.to_builtins(found), "open": unsettled, "rejected": 0}


def compared_with_journal(options: argparse.Namespace, settings: Gateway) -> Iterator[str]:
    from citadel_gateway.control.segments import Survey, folder_of
    from citadel_gateway.control.sql import reports

    found = Survey(folder_of(settings))
    if found.twice:
        yield f"{len(found.twice)} requests are settled twice in the journal, the first is {found.twice[0]}"
    with opened(settings) as connection:
        missing = reports.missing(connection, sorted(found.settled))
        orphans = reports.missing(connection, found.unsettled)
    if missing:
        yield f"{len(missing)} requests of the journal are not in the ledger, the first is {missing[0]}"
    if orphans and not options.open:
        yield f"{len(orphans)} requests were opened and never settled, the first is {orphans[0]}"
    if found.damaged:
        yield f"{found.damaged} lines of the journal are damaged"


@contextmanager
def opened(settings: Gateway) -> Iterator[Any]:
    """A connection of our own, to read; `Failed` when there is none to be had."""
    from citadel_gateway.control.sql import Database, DatabaseAwayError

    database = Database(settings)
    try:
        with database.read() as connection:
            yield connection
    except DatabaseAwayError as error:
        raise Failed(f"the database does not answer: {error}") from None
    finally:
        database.close()


def migrate(options: argparse.Namespace, settings: Gateway) -> int:
    from citadel_gateway.control.sql import Database, DatabaseAwayError

    database = Database(settings)
    where = database.url.render_as_string(hide_password=True)
    try:
        before, after = database.upgrade()
    except DatabaseAwayError as error:
        raise Failed(f"{where}: the database does not answer: {error}") from None
    finally:
        database.close()
    if before == after:
        print(f"up to date: {where} has revision {after}")
    else:
        print(f"migrated: {where} from {before or 'nothing'} to revision {after}")
    return 0


# Against the engines --------------------------------------------------------------------------------------------------
def reconcile(options: argparse.Namespace, settings: Gateway) -> int:
    from citadel_gateway.cli.reconciling import Reconciling

    if options.offline and not options.metrics:
        raise Failed("reconcile: --offline needs the engines' counters from files (--metrics MODEL=FILE)")
    client: Client | None = None if options.offline else client_of(settings, options)
    work = Reconciling(options, settings, client)
    reading = work.read()
    if options.save:
        write_atomically(Path(options.save), msgspec.json.encode(reading))
        print(f"{options.save}: {len(reading.engines)} models at {datetime.fromtimestamp(reading.at, UTC):%F %TZ}")
        return 0
    lines = work.compare(reading)
    if options.json:
        document(
            [{**msgspec.to_builtins(line), "difference": line.difference, "relative": line.relative} for line in lines]
        )
    else:
        rows = [
            (
                line.model, line.kind, line.engine, line.canary, line.ledger, line.difference, f"{line.relative:.4%}",
                line.inexact, when(line.since) + (" (restarted)" if line.restarted else ""),
            )
            for line in lines
        ]  # fmt: skip
        heads = ("ENGINE", "CANARY", "LEDGER", "DIFFERENCE", "SHARE", "INEXACT", "SINCE")
        table(rows, "MODEL", "TOKENS", *heads)
    wrong = [line for line in lines if (line.difference != 0 if options.exact else line.relative > options.tolerance)]
    return 1 if wrong else 0
