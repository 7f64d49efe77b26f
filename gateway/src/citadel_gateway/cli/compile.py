"""`citadel-gateway compile`."""

import argparse
import sys

from citadel_gateway.cli.commands import Commands
from citadel_gateway.compiled import NotCompiledError, install


def add(commands: Commands) -> None:
    one = commands.bare(
        "compile",
        "Compile the modules on the way of a request to machine code, beside the installed sources."
        " Without it the gateway does the same, three times as slowly.",
        compile_package,
    )
    one.add_argument("--required", action="store_true", help="fail when it cannot be done; else say why and go on")


def compile_package(options: argparse.Namespace) -> int:
    try:
        number = install()
    except NotCompiledError as error:
        print(f"compile: not compiled: {error}", file=sys.stderr)
        return 1 if options.required else 0
    print(f"compiled: {number} extensions")
    return 0
