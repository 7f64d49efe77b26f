"""`replay`: what another policy would have done with the requests of the journal."""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from citadel_gateway.cli.commands import DEFAULT_CONFIG, Commands
from citadel_gateway.cli.show import document, table
from citadel_gateway.core.replay import Load, Outcome, Replay, read
from citadel_gateway.records import Settled
from citadel_gateway.settings import ConfigError, Keys, Models, Policies, policy_problems, read_gateway
from citadel_gateway.settings import read as read_settings


def add(commands: Commands) -> None:
    parser = commands.bare(
        "replay", "Decide journaled requests again by other policies, and show what would differ.", run
    )
    parser.add_argument(
        "files",
        nargs="*",
        type=Path,
        metavar="FILE",
        help="segments of the journal, exports as JSON lines, or folders of them (default: the journal of this host)",
    )
    parser.add_argument("--policies", metavar="FILE", help="policies.json to try (default: that of gateway.json)")
    parser.add_argument("--policy", default="", metavar="NAME", help="decide by this policy whatever asked for one")
    parser.add_argument("--models", metavar="FILE", help="models.json (default: that of gateway.json)")
    parser.add_argument("--keys", metavar="FILE", help="keys.json (default: that of gateway.json, if there is one)")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON document")
    parser.add_argument(
        "--config",
        default=os.environ.get("CITADEL_GATEWAY_CONFIG", DEFAULT_CONFIG),
        metavar="FILE",
        help="gateway.json; not read when files, --models and --policies are all given",
    )


def run(options: argparse.Namespace) -> int:
    """0, also when everything would differ."""
    models_file, policies_file, keys_file, files = options.models, options.policies, options.keys, options.files
    if not (models_file and policies_file and files):
        settings = read_gateway(options.config)
        models_file = models_file or settings.models_file
        policies_file = policies_file or settings.policies_file
        keys_file = keys_file or settings.keys_file
        files = files or [Path(settings.journal.folder or Path(settings.state_dir) / "journal")]
    models = read_settings(models_file, Models)
    policies = read_settings(policies_file, Policies) if policies_file else Policies()
    found = policy_problems(policies, models, policies_file)
    if options.policy and options.policy not in {
        name for one in policies.policies for name in (one.name, *one.aliases)
    }:
        found.append(f"{policies_file}: there is no policy {options.policy!r}")
    if found:
        raise ConfigError(*found)
    keys = read_settings(keys_file, Keys).keys if keys_file else ()
    outcome = Outcome()
    Replay(models.models, policies, keys, options.policy).run(records(files, outcome), outcome)
    if options.json:
        document(msgspec.to_builtins(outcome))
    else:
        show(outcome)
    return 0


def records(files: list[Path], outcome: Outcome) -> Iterator[Settled]:
    """All settled requests of all files; of a folder those of its segments."""
    for path in files:
        for one in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
            try:
                with one.open("rb") as file:
                    yield from read(file, outcome)
            except OSError as error:
                raise ConfigError(f"{one}: cannot be read: {error.strerror}") from None


def share(part: int, whole: int) -> str:
    return f"{part} ({100 * part / whole:.1f} %)" if whole else str(part)


def usd(before: float, after: float) -> str:
    """A cost and what becomes of it."""
    change = f" ({100 * (after - before) / before:+.1f} %)" if before else ""
    return f"{before:.6f} -> {after:.6f}{change}"


def show(outcome: Outcome) -> None:
    print(f"requests   {outcome.requests} in {outcome.seconds:.1f} s; {outcome.passed_over} had reached no model")
    if outcome.damaged:
        print(f"damaged    {outcome.damaged} lines are no records")
    print(f"unchanged  {share(outcome.unchanged, outcome.requests)}")
    print(f"cost USD   {usd(outcome.cost_before, outcome.cost_after)}; recorded {outcome.cost_recorded:.6f}")
    if outcome.changes:
        print("\nwho would answer instead")
        table(
            (
                (one.before, one.after or "(refused)", one.requests, usd(one.cost_before, one.cost_after))
                for one in outcome.changes
            ),
            "from", "to", "requests", "cost USD",
        )  # fmt: skip
    if outcome.models:
        print("\nload (tokens under way)")
        table(map(load_row, outcome.models), "model", "requests", "mean", "peak", "cost USD")
    for title, counts in (("rules that held", outcome.rules), ("refusals", outcome.refused)):
        if counts:
            print(f"\n{title}")
            table(counts.items(), "name", "requests")


def load_row(one: Load) -> tuple[str, ...]:
    return (
        one.model,
        f"{one.requests_before} -> {one.requests_after}",
        f"{one.mean_before:.0f} -> {one.mean_after:.0f}",
        f"{one.peak_before} -> {one.peak_after}",
        usd(one.cost_before, one.cost_after),
    )
