"""Python of the lab's hosts keeps what it has compiled out of zip files.

Ansible sends each module with all that it imports as a zip of sources, and Python keeps no bytecode of those. Every
host has this file as a module that a .pth file sets to work; bytecode is shared by all, by the hash of its source.
"""

import os
import zipimport
from types import CodeType

FOLDER = "/srv/bytecode"
compile_source = zipimport._compile_source  # type: ignore[attr-defined]  # no public place to step in


def compiled(path: str, source: bytes) -> CodeType:
    """The code of a module in a zip, compiled once; where the folder cannot be used, compiled as ever."""
    # Only where there is a zip: every Python of the host starts with this file.
    import hashlib
    import importlib.util
    import marshal

    name = f"{FOLDER}/{importlib.util.MAGIC_NUMBER.hex()}-{hashlib.sha256(source).hexdigest()}"
    try:
        with open(name, "rb") as file:  # noqa: PTH123  pathlib is not imported at the start of a Python
            code: CodeType = marshal.loads(file.read())  # noqa: S302  written by root of a host of the lab
    except (OSError, EOFError, ValueError, TypeError):
        code = compile_source(path, source)
        keep(name, marshal.dumps(code))
    return code


def keep(name: str, data: bytes) -> None:
    """Whole or not at all: two hosts may compile the same file."""
    new = f"{name}.{os.uname().nodename}.{os.getpid()}"
    try:
        with open(new, "wb") as file:  # noqa: PTH123  as above
            file.write(data)
        os.replace(new, name)  # noqa: PTH105  as above
    except OSError:
        return


def install() -> None:
    """From now on, in this process."""
    zipimport._compile_source = compiled  # type: ignore[attr-defined]  # as above
