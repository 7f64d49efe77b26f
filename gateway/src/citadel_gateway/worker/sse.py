"""Where an event of a stream ends."""

from typing import Final

LONGEST: Final = 256 * 1024  # an event that has not ended after so many bytes is passed on in pieces


def end_of_events(data: bytes) -> int:
    """The position after the last complete event: `len(data)` when nothing is left over, 0 when none has ended yet.

    Events are found as bytes and never decoded. A blank line ends them, in either line ending.
    """
    if data.endswith((b"\n\n", b"\r\n\r\n")):
        return len(data)
    plain, crlf = data.rfind(b"\n\n"), data.rfind(b"\r\n\r\n")
    end = max(plain + 2 if plain >= 0 else 0, crlf + 4 if crlf >= 0 else 0)
    return len(data) if len(data) - end > LONGEST else end
