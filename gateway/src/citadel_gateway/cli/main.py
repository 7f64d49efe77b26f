"""The `citadel-gateway` command. Each module of commands has one line in `build_parser` (see `cli/commands.py`)."""

import argparse
import sys
from collections.abc import Sequence

from citadel_gateway import __version__
from citadel_gateway.cli import compile as compiling
from citadel_gateway.cli import evaluate, laptop, ledger, local, people, replay
from citadel_gateway.cli.client import Failed
from citadel_gateway.cli.commands import Bare, Commands, Run
from citadel_gateway.cli.local import EX_CONFIG
from citadel_gateway.settings import ConfigError, gateway_problems, read_gateway


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="citadel-gateway", description="OpenAI-compatible gateway in front of the model servers."
    )
    parser.add_argument("--version", action="version", version=f"citadel-gateway {__version__}")
    commands = Commands(parser)
    local.add(commands)
    laptop.add(commands)
    people.add(commands)
    evaluate.add(commands)
    ledger.add(commands)
    replay.add(commands)
    compiling.add(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command's exit status: 78 for a configuration that cannot be used, 1 for what was refused or failed."""
    options = build_parser().parse_args(arguments)
    try:
        return run(options)
    except ConfigError as error:
        for line in error.lines:
            print(line, file=sys.stderr)
        return EX_CONFIG
    except Failed as error:
        print(error, file=sys.stderr)
        return 1


def run(options: argparse.Namespace) -> int:
    if options.bare is not None:
        bare: Bare = options.bare
        return bare(options)
    settings = read_gateway(options.config)
    found = gateway_problems(settings, options.config)
    if found:
        raise ConfigError(*found)
    command: Run = options.run
    return command(options, settings)
