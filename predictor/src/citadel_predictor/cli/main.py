"""The `citadel-predictor` command."""

import argparse
import sys
from collections.abc import Callable, Sequence

from citadel_predictor import __version__
from citadel_predictor.cli import commands
from citadel_predictor.prometheus import QueryError
from citadel_predictor.settings import HORIZONS, ConfigError, Settings, read

CONFIG = "/etc/citadel-predictor/predictor.json"
EX_CONFIG = 78  # systemd does not restart on it: the file must be changed first

Run = Callable[[argparse.Namespace, Settings], int]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="citadel-predictor",
        description="Forecasts and anomaly scores of a Prometheus' recording rules, each with its measured skill.",
        epilog="Exit status: 0 done, 1 refused or failed, 78 settings that cannot be used.",
    )
    parser.add_argument("--version", action="version", version=f"citadel-predictor {__version__}")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--config", default=CONFIG, metavar="FILE", help=f"the settings (default {CONFIG})")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Run, text: str, more: str = "") -> argparse.ArgumentParser:
        added = subparsers.add_parser(name, parents=[shared], help=text, description=f"{text} {more}".strip())
        added.set_defaults(run=run)
        return added

    command(
        "serve",
        commands.serve,
        "Read, forecast and serve /metrics and /healthz until told to stop.",
        "Logs JSON lines, among them model cards. SIGTERM ends it; what was learnt stays in state_dir.",
    )
    check = command("check", commands.check, "Check the settings; with --live ask Prometheus for each target too.")
    check.add_argument("--live", action="store_true", help="say how many series each target has now")
    explain = command(
        "explain",
        commands.explain,
        "Say what would be forecast for a target, by which method, and why by that.",
        "Reads its history from Prometheus, judges all methods, and leaves the service's state alone.",
    )
    explain.add_argument("target", metavar="TARGET", help="the name of a target of the settings")
    backtest = command(
        "backtest",
        commands.backtest,
        "Forecast past ends of series from what was before them, and compare with what came.",
        "Of each end nothing is known when methods are judged. Series come from Prometheus, or with --csv from a file: "
        "its last column has one value a row, oldest first, empty where nothing was measured; a heading is allowed.",
    )
    backtest.add_argument("target", metavar="TARGET", nargs="*", help="names of targets (default: all)")
    backtest.add_argument(
        "--folds", type=int, default=3, metavar="N", help="ends of each series, one after another (default 3)"
    )
    backtest.add_argument("--csv", metavar="FILE", help="this series in place of the settings' targets")
    backtest.add_argument(
        "--step", type=int, default=3600, metavar="S", help="with --csv: seconds between rows (default 3600)"
    )
    backtest.add_argument(
        "--horizon", choices=list(HORIZONS), default="1d", help="with --csv: how far ahead (default 1d)"
    )
    for each in (explain, backtest):
        each.add_argument("--json", action="store_true", help="for machines: one JSON document")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command's exit status."""
    options = build_parser().parse_args(arguments)
    try:
        if getattr(options, "csv", None):
            return commands.backtest_csv(options)
        run: Run = options.run
        return run(options, read(options.config))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EX_CONFIG
    except (QueryError, commands.Failed) as error:
        print(error, file=sys.stderr)
        return 1
