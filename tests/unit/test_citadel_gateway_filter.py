"""What the role refuses of tiers, policies, users and stores: the same as the gateway itself, and in its own words."""

import json
from pathlib import Path
from typing import Any

import pytest
from citadel_gateway.settings import problems
from filter.citadel_gateway import FilterModule, gateway_problems

MODELS = [
    {"name": "large", "context": 8, "aliases": ["big"], "fallback": ["small"], "backends": [{"host": "h", "port": 1}]},
    {"name": "small", "context": 8, "backends": [{"host": "h", "port": 2}]},
]
GIVEN: dict[str, Any] = {
    "models": MODELS,
    "workers": 2,
    "tiers": [{"name": "basic", "requests_per_minute": 60, "models": ["*"]}, {"name": "premium"}],
    "default_tier": "basic",
    "policies": [
        {
            "name": "auto",
            "models": ["small"],
            "rules": [{"name": "long", "models": ["big"], "when": {"tiers": ["basic"]}}],
        }
    ],
    "users": [{"id": "ann@example.org", "tier": "premium"}],
    "peers": [{"name": "other", "sha256": "0" * 64}],
    "redis_url": "unix://gateway@/run/redis/x.sock?db=0",
    "redis_password": "",
    "redis_password_file": "/etc/password",
    "database_url": "postgresql+psycopg://me@10.0.0.1:5433/citadel",
    "database_password": "secret",
}


def test_what_is_good_has_no_problems() -> None:
    assert FilterModule().filters()["gateway_problems"](GIVEN) == []
    plain = {
        "tiers": [],
        "default_tier": "",
        "policies": [],
        "users": [],
        "peers": [],
        "redis_url": "",
        "database_url": "",
    }
    assert gateway_problems(GIVEN | plain) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"default_tier": "gold"}, 'gateway_default_tier is "gold", and gateway_tiers has basic, premium'),
        (
            {"tiers": [{"name": "basic"}, {"name": "basic"}, {"name": "premium"}]},
            'gateway_tiers has "basic" more than once',
        ),
        ({"tiers": [{"name": "a b"}], "default_tier": ""}, '"a b" is no name'),
        ({"tiers": [*GIVEN["tiers"], {"name": "x", "overage": "degrade"}]}, "name the cheaper model in degrade_to"),
        ({"tiers": [*GIVEN["tiers"], {"name": "x", "overage": "degrade", "degrade_to": "gone"}]}, 'the model "gone"'),
        ({"tiers": [*GIVEN["tiers"], {"name": "x", "models": ["gone"]}]}, '"x" names the model "gone"'),
        ({"redis_url": ""}, '"basic" has limits and gateway_redis_url is empty'),
        ({"policies": [{"name": "auto"}, {"name": "auto"}]}, 'gateway_policies has "auto" more than once'),
        ({"policies": [{"name": "auto", "aliases": ["big"]}]}, '"auto" is called "big", as a model'),
        ({"policies": [{"name": "auto", "models": ["gone"]}]}, '"auto" names the model "gone"'),
        (
            {"policies": [{"name": "auto", "rules": [{"name": "r", "models": ["gone"]}]}]},
            'rule "r" names the model "gone"',
        ),
        (
            {"policies": [{"name": "auto", "rules": [{"name": "r", "models": ["*"], "when": {"tiers": ["gold"]}}]}]},
            'rule "r" names the tier "gold"',
        ),
        ({"users": [{"id": "a"}, {"id": "a"}]}, 'gateway_users has "a" more than once'),
        ({"users": [{"id": "a b"}]}, 'gateway_users has the id "a b"'),
        ({"users": [{"id": "a", "tier": "gold"}]}, '"a" has the tier "gold"'),
        ({"peers": [{"name": "other", "sha256": "key"}]}, 'gateway_peers: sha256 of "other"'),
        ({"models": [MODELS[1] | {"fallback": ["small"]}, MODELS[0]]}, '"small" falls back to "small"'),
        ({"redis_url": "redis://user:secret@host:1"}, "write redis://USER@HOST:PORT/0"),
        ({"redis_password_file": ""}, "neither gateway_redis_password nor gateway_redis_password_file"),
        ({"database_url": "postgresql://host/name"}, "write postgresql+psycopg://USER@HOST:PORT/NAME"),
        ({"database_password": ""}, "gateway_database_password is empty: put it into the vault"),
    ],
)
def test_each_fault_names_variable_value_and_remedy(change: dict[str, Any], words: str) -> None:
    found = gateway_problems(GIVEN | change)
    assert any(words in line for line in found), found


REFUSED_BY_BOTH = [
    {"default_tier": "gold"},
    {"tiers": [{"name": "basic"}, {"name": "basic"}, {"name": "premium"}]},
    {"tiers": [*GIVEN["tiers"], {"name": "x", "overage": "degrade"}]},
    {"redis_url": ""},
    {"policies": [{"name": "big"}]},
    {"policies": [{"name": "auto", "models": ["gone"]}]},
    {"users": [{"id": "a"}, {"id": "a"}]},
    {"users": [{"id": "a", "tier": "gold"}]},
]


def gateway_says(folder: Path, given: dict[str, Any]) -> list[str]:
    """What the gateway finds wrong with the same values in its files."""
    files = {
        "models.json": {"models": given["models"]},
        "keys.json": {"keys": [], "users": given["users"]},
        "policies.json": {name: given[name] for name in ("tiers", "default_tier", "policies")},
        "gateway.json": {
            "host": "h",
            "listen": {"port": 1},
            "workers": given["workers"],
            **{name: f"{folder}/{name}" for name in ("control_socket", "run_dir", "state_dir")},
            **{f"{name}_file": f"{folder}/{name}.json" for name in ("models", "keys", "policies")},
            "redis": {"url": given["redis_url"], "password_file": given["redis_password_file"]},
            "database": {"url": given["database_url"]},
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return problems(folder / "gateway.json")


@pytest.mark.parametrize("change", [{}, *REFUSED_BY_BOTH])
def test_the_gateway_refuses_the_same(tmp_path: Path, change: dict[str, Any]) -> None:
    assert bool(gateway_says(tmp_path, GIVEN | change)) == bool(change)
    assert bool(gateway_problems(GIVEN | change)) == bool(change)
