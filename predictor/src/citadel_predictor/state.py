"""What is kept on disk: one file for each target, written whole or not at all."""

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from .settings import DAY, Target
from .watched import Watched

VERSION = 1
Report = Callable[..., None]  # (event, **fields)


@dataclass
class Kept:
    """The series of a target, and when it had last been read (seconds since the epoch)."""

    series: list[Watched] = field(default_factory=list)
    succeeded: float | None = None


class Store:
    """A folder of files. Nothing of what is wrong with them is fatal: it is reported, and learnt again."""

    def __init__(self, folder: Path, report: Report, count: Callable[[str], None]) -> None:
        """``count`` gets the reason of each failure: state_damaged or state_unwritable."""
        self.folder, self.report, self.count = folder, report, count

    def path(self, target: Target) -> Path:
        return self.folder / f"{target.name}.json"

    def load(self, target: Target) -> Kept:
        """What was kept; nothing if there is none, if the target is another now, or if the file is damaged, which is
        then put aside as NAME.json.damaged.
        """
        path = self.path(target)
        try:
            plain = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
            if plain["version"] != VERSION or plain["target"] != meaning(target):
                self.report("state_replaced", target=target.name, why="the target's definition has changed")
                return Kept()
            succeeded = plain.get("succeeded")  # not in a state from before it was kept
            series = [Watched.from_dict(target, each) for each in plain["series"]]
            return Kept(series, None if succeeded is None else float(succeeded))
        except FileNotFoundError:
            return Kept()
        except (OSError, msgspec.DecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
            self.count("state_damaged")
            self.report("state_damaged", target=target.name, file=str(path), why=f"{type(error).__name__}: {error}")
            with contextlib.suppress(OSError):
                path.replace(path.with_name(path.name + ".damaged"))
            return Kept()

    def save(self, target: Target, kept: Kept) -> bool:
        """Whether it was written. A crash at any point leaves the old file or the new one."""
        path = self.path(target)
        beside = path.with_name(path.name + ".new")
        try:
            self.folder.mkdir(mode=0o750, parents=True, exist_ok=True)
            with beside.open("wb") as file:
                head = msgspec.json.encode({"version": VERSION, "target": meaning(target), "succeeded": kept.succeeded})
                file.write(head[:-1] + b',"series":[')
                for at, each in enumerate(kept.series):  # one by one: a hundred at once are as many megabytes
                    file.write((b"," if at else b"") + msgspec.json.encode(each.to_dict()))
                file.write(b"]}")
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
            folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            self.count("state_unwritable")
            self.report("state_unwritable", target=target.name, file=str(path), why=str(error))
            return False
        return True

    def prune(self, targets: tuple[Target, ...], forget_days: float) -> None:
        """Remove files of targets that are not in the settings any more, when nobody has written them for long."""
        known = {self.path(target).name for target in targets}
        for path in self.folder.glob("*.json"):
            with contextlib.suppress(OSError):
                if path.name not in known and time.time() - path.stat().st_mtime > forget_days * DAY:
                    path.unlink()
                    self.report("state_pruned", file=str(path))


def meaning(target: Target) -> dict[str, Any]:
    """What of a target makes its past another when it changes."""
    return {
        "query": target.query,
        "labels": list(target.labels),
        "aggregate": target.aggregate,
        "step": target.step,
        "season": target.season,
    }
