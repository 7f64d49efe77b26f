"""The log: one JSON object a line, for the journal and for whoever searches it."""

import json
import math
import sys
import time
from typing import Any, TextIO


def plain(value: Any) -> Any:
    """As JSON can have it: NaN and infinity become null."""
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(each) for each in (sorted(value) if isinstance(value, set) else value)]
    return value


class Journal:
    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream

    def __call__(self, event: str, **fields: Any) -> None:
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        stream = self.stream or sys.stdout
        print(json.dumps({"time": at, "event": event, **plain(fields)}), file=stream, flush=True)
