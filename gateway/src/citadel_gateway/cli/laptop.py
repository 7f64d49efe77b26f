"""`citadel-gateway serve`: everything on this machine, without systemd."""

import argparse

from citadel_gateway.cli.commands import Commands
from citadel_gateway.cli.local import may_start, talk
from citadel_gateway.settings import Gateway, engine_key


def add(commands: Commands) -> None:
    commands.add(
        "serve", "Run the control process and all workers on this machine, without systemd; end them together.", run
    )


def run(options: argparse.Namespace, settings: Gateway) -> int:
    from citadel_gateway.serve import run_serve

    may_start(settings, options.config)
    talk()
    engine_key(settings)
    return run_serve(settings, options.config)
