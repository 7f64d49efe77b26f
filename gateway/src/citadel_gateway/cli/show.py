"""How commands print what they found."""

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any


def table(rows: Iterable[Sequence[Any]], *heads: str) -> None:
    """Columns as wide as what is in them."""
    lines = [heads, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def document(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def brief(value: Any) -> str:
    """A value on one line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def when(at: float) -> str:
    """A moment in UTC; nothing for one that is not set."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%SZ") if at else ""
