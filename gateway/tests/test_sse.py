"""Where events end, however the bytes are cut."""

import random

import pytest
from citadel_gateway.worker.sse import LONGEST, end_of_events


@pytest.mark.parametrize(
    ("data", "end"),
    [
        (b"", 0),
        (b"data: 1", 0),
        (b"data: 1\n", 0),
        (b"data: 1\n\n", 9),
        (b"data: 1\n\ndata", 9),
        (b"data: 1\r\n\r\n", 11),
        (b"data: 1\r\n\r\ndata: 2", 11),
        (b"\n\ndata", 2),
        (b"a\n\nb", 3),
        (b"data: 1\n\n\n", 10),
        (b"x" * (LONGEST + 1), LONGEST + 1),
    ],
)
def test_the_end_of_the_last_event(data: bytes, end: int) -> None:
    assert end_of_events(data) == end


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_however_it_is_cut_only_whole_events_pass(newline: bytes) -> None:
    chance = random.Random(7)
    events = [b"data: %d%b%b" % (number, newline, newline) for number in range(200)]
    stream, tail, passed = b"".join(events), b"", []
    while stream:
        size = chance.randint(1, 40)
        data, stream = tail + stream[:size], stream[size:]
        end = end_of_events(data)
        passed.append(data[:end])
        tail = data[end:]
        assert not passed[-1] or passed[-1].endswith(newline * 2)
    assert b"".join(passed) == b"".join(events)
    assert not tail
