"""How a command is added. A module of commands has

    def add(commands: Commands) -> None:
        parser = commands.add("usage", "What was used, by whom.", run)
        parser.add_argument(...)

    def run(options: argparse.Namespace, settings: Gateway) -> int: ...

and one line in `cli/main.py`. What is heavy (FastAPI, SQLAlchemy) is imported inside `run`. `settings` is gateway.json,
read and checked. `run` returns the exit status; it may raise `ConfigError` (78) or `client.Failed` (1).
"""

import argparse
import os
from collections.abc import Callable
from typing import Any

from citadel_gateway.settings import Gateway

DEFAULT_CONFIG = "/etc/citadel-gateway/gateway.json"

Run = Callable[[argparse.Namespace, Gateway], int]
Bare = Callable[[argparse.Namespace], int]


class Commands:
    """The commands of one parser; `group` makes those of a second word (`keys create`)."""

    def __init__(self, parser: argparse.ArgumentParser, dest: str = "command") -> None:
        self.dest = dest
        self.parsers: Any = parser.add_subparsers(dest=dest, required=True, metavar=dest.upper())

    def add(self, name: str, text: str, run: Run) -> argparse.ArgumentParser:
        """A command that works with gateway.json."""
        parser = self.bare(name, text, lambda options: 0)
        parser.set_defaults(run=run, bare=None)
        parser.add_argument(
            "--config",
            default=os.environ.get("CITADEL_GATEWAY_CONFIG", DEFAULT_CONFIG),
            metavar="FILE",
            help="gateway.json (default: $CITADEL_GATEWAY_CONFIG, else %(default)s)",
        )
        return parser

    def bare(self, name: str, text: str, run: Bare) -> argparse.ArgumentParser:
        """A command that reads gateway.json itself, or not at all."""
        parser: argparse.ArgumentParser = self.parsers.add_parser(name, help=text, description=text)
        parser.set_defaults(bare=run)
        return parser

    def group(self, name: str, text: str) -> "Commands":
        return Commands(self.parsers.add_parser(name, help=text, description=text), "action")
