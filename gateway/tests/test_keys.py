"""How keys are made, and noticed where they must not be."""

import pytest
from citadel_gateway.keys import digest, key_in_url, new_key


def test_a_key_is_random_and_its_digest_is_not() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert {len(key) for key in keys} == {46}
    assert digest("sk-a") == digest("sk-a") != digest("sk-b")
    assert len(digest("\udcff")) == 64  # what no encoding made is no reason to fail


@pytest.mark.parametrize(
    "target",
    [
        b"/v1/models?key=abc",
        b"/v1/models?a=1&API_KEY=abc",
        b"/v1/models?x-api-key=abc",
        b"/v1/models?apikey=abc",
        b"/v1/models?token=abc",
        b"/v1/models?access_token=abc",
        b"/v1/models?authorization=Bearer%20abc",
        b"/v1/models/ck-" + b"Z" * 43,
        b"/admin/usage?user=ck-" + b"_" * 43,
        b"/admin/usage?key=sk-" + b"z" * 20,
    ],
)
def test_a_key_in_a_url(target: bytes) -> None:
    assert key_in_url(target)


@pytest.mark.parametrize(
    "target",
    [
        b"/v1/models",
        b"/v1/models?tokens=5",
        b"/v1/models/task-xl-of-some-considerable-length",
        b"/admin/usage?group_by=user,key",
        b"/admin/usage?key=bob-laptop",
        b"/v1/chat/completions?api-version=2024-06-01",
    ],
)
def test_no_key_in_a_url(target: bytes) -> None:
    assert not key_in_url(target)
