"""What the role vllm refuses before it changes anything."""

from typing import Any

import pytest
from filter.citadel_engine import FilterModule, engine_problems, engine_taken_ports, engine_unknown_settings


def model(name: str = "one", port: int = 11400, **more: Any) -> dict[str, Any]:
    return {"name": name, "port": port, **more}


def test_good_models_have_no_problem() -> None:
    models = [model(), model("two-2.5", 11401, aliases=["second"]), model("old", 11400, state="absent")]
    assert engine_problems(models, {8000: "gateway"}) == []


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ([model("One")], "name 'One': use lower-case letters"),
        ([model("a/b")], "names the unit and the folders"),
        ([model(), model(port=11401)], "one: the name is used 2 times"),
        ([model(), model("two")], "port 11400: used by one and two"),
        ([model(), model("two", 11401, aliases=["one"])], "two: 'one' is a name or alias of one already"),
        ([model(port=8000)], "one: port 8000 is gateway's"),
        ([model(extra_args={"max_model_len": 9})], "extra_args has max_model_len, which is decided by context"),
        ([model(extra_args={"--no-enable-prefix-caching": True})], "decided by prefix_caching"),
        ([model(extra_args={"trust-remote-code": True})], "code of a model's repository is not run"),
    ],
)
def test_problems_name_the_model_and_the_remedy(models: list[dict[str, Any]], words: str) -> None:
    assert any(words in line for line in engine_problems(models, {8000: "gateway"}))


def test_settings_that_this_vllm_does_not_have() -> None:
    known = {"version": "0.32.0", "settings": ["max-logprobs", "seed"]}
    assert engine_unknown_settings([model(extra_args={"max_logprobs": 5})], known) == []
    said = engine_unknown_settings([model(extra_args={"max-logprob": 5})], known)
    assert said == ["one: vLLM 0.32.0 has no setting max-logprob (it has max-logprobs); correct extra_args"]


SOCKETS = [
    'LISTEN 0 511 0.0.0.0:80 0.0.0.0:* users:(("nginx",pid=7,fd=6)) ino:1 sk:1 <->',
    'LISTEN 0 2048 127.0.0.1:11400 0.0.0.0:* users:(("python",pid=9,fd=13)) uid:999 ino:2 sk:2 <->',
    "LISTEN 0 128 [::]:11401 [::]:* uid:33 ino:3 sk:3 <->",
]


def test_ports_that_somebody_else_has() -> None:
    models = [model(), model("two", 11401), model("three", 80)]
    assert engine_taken_ports(SOCKETS, models, 999) == [
        "three: port 80 is taken by nginx; stop it, or choose another port",
        "two: port 11401 is taken by a process of uid 33; stop it, or choose another port",
    ]


def test_the_filters_have_names() -> None:
    assert set(FilterModule().filters()) == {"engine_problems", "engine_taken_ports", "engine_unknown_settings"}
