"""What the gateway would refuse of tiers, policies, users and stores, in the words of the role's variables."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

Given = dict[str, Any]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
USER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
REDIS = re.compile(r"(redis|rediss)://[^\s@/:]+@[^\s@/]+(/\d+)?|unix://[^\s@/:]+@/[^\s?]+(\?db=\d+)?")
DATABASE = re.compile(r"(postgresql\+psycopg://[^\s@/:]+@[^\s@/]+/[^\s/]+|sqlite:///.+)?")
LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrency", "tokens_per_day", "tokens_per_month")
KEEPS = "gateway_redis_url is empty: each worker counts for itself. Name a Redis, or set gateway_workers to 1."


def model_names(given: Given) -> set[str]:
    """Every name that a client may ask for."""
    return {name for model in given["models"] for name in (model["name"], *model.get("aliases", []))}


def twice(entries: list[Any], variable: str, field: str = "name") -> Iterator[str]:
    for name, count in Counter(str(entry[field]) for entry in entries).items():
        if count > 1:
            yield f'{variable} has "{name}" more than once: rename or remove one.'


def tier_problems(given: Given) -> Iterator[str]:
    tiers, known = given["tiers"], model_names(given)
    yield from twice(tiers, "gateway_tiers")
    names = [tier["name"] for tier in tiers]
    default = given["default_tier"]
    if default and default not in names:
        there = ", ".join(names) or "none"
        yield f'gateway_default_tier is "{default}", and gateway_tiers has {there}: take one of them.'
    for tier in tiers:
        who = f'gateway_tiers: "{tier["name"]}"'
        if not NAME.fullmatch(str(tier["name"])):
            yield f"{who} is no name: take letters, digits and . _ : / -, a letter or digit first."
        if tier.get("overage", "block") == "degrade" and not tier.get("degrade_to"):
            yield f"{who} has overage degrade: name the cheaper model in degrade_to."
        for name in (*tier.get("models", []), tier.get("degrade_to", "")):
            if name and name != "*" and name not in known:
                yield f'{who} names the model "{name}", which is not in gateway_models: correct the name.'
        limited = any(int(tier.get(field) or 0) for field in LIMITS)
        if limited and int(given["workers"]) > 1 and not given["redis_url"]:
            yield f"{who} has limits and {KEEPS}"


def policy_problems(given: Given) -> Iterator[str]:
    policies, known = given["policies"], model_names(given)
    yield from twice(policies, "gateway_policies")
    tiers = {tier["name"] for tier in given["tiers"]}
    for policy in policies:
        who = f'gateway_policies: "{policy["name"]}"'
        for name in (policy["name"], *policy.get("aliases", [])):
            if name in known:
                yield f'{who} is called "{name}", as a model of gateway_models is: rename the policy.'
        named = [(who, policy.get("models", []))]
        for rule in policy.get("rules", []):
            named.append((f'{who}, rule "{rule["name"]}"', rule.get("models", [])))
            for tier in (rule.get("when") or {}).get("tiers", []):
                if tier not in tiers:
                    yield f'{who}, rule "{rule["name"]}" names the tier "{tier}", which is not in gateway_tiers.'
        for whose, names in named:
            for name in names:
                if name != "*" and name not in known:
                    yield f'{whose} names the model "{name}", which is not in gateway_models: correct the name.'


def people_problems(given: Given) -> Iterator[str]:
    yield from twice(given["users"], "gateway_users", "id")
    yield from twice(given["peers"], "gateway_peers")
    tiers = {tier["name"] for tier in given["tiers"]}
    for user in given["users"]:
        if not USER.fullmatch(str(user["id"])):
            yield f'gateway_users has the id "{user["id"]}": take letters, digits and . _ @ -, a letter or digit first.'
        if user.get("tier") and user["tier"] not in tiers:
            yield f'gateway_users: "{user["id"]}" has the tier "{user["tier"]}", which is not in gateway_tiers.'
    for peer in given["peers"]:
        if not re.fullmatch(r"[0-9a-f]{64}", str(peer["sha256"])):
            yield f'gateway_peers: sha256 of "{peer["name"]}" is not 64 lower-case hexadecimal digits.'


def model_problems(given: Given) -> Iterator[str]:
    known = {model["name"] for model in given["models"]}
    for model in given["models"]:
        for name in model.get("fallback", []):
            if name not in known or name == model["name"]:
                yield f'gateway_models: "{model["name"]}" falls back to "{name}": name another model of the list.'


def store_problems(given: Given) -> Iterator[str]:
    url = given["redis_url"]
    if url and not REDIS.fullmatch(url):
        yield (
            f"gateway_redis_url is {url}: write redis://USER@HOST:PORT/0, rediss://… or unix://USER@/PATH?db=0; "
            "the password is in gateway_redis_password or gateway_redis_password_file."
        )
    if url and not given["redis_password"] and not given["redis_password_file"]:
        yield "gateway_redis_url is set, but neither gateway_redis_password nor gateway_redis_password_file: set one."
    url = given["database_url"]
    if not DATABASE.fullmatch(url):
        yield (
            f"gateway_database_url is {url}: write postgresql+psycopg://USER@HOST:PORT/NAME without a password, "
            "or leave it empty for SQLite."
        )
    if url.startswith("postgresql") and not given["database_password"]:
        yield "gateway_database_url is set, and gateway_database_password is empty: put it into the vault."


def gateway_problems(given: Given) -> list[str]:
    """One sentence each: variable, value, remedy; empty when the gateway can use what is given.

    ``given`` holds the variables of the role without their prefix.
    """
    checks = (model_problems, tier_problems, policy_problems, people_problems, store_problems)
    return [line for check in checks for line in check(given)]


class FilterModule:
    """Ansible's way in."""

    def filters(self) -> dict[str, Any]:
        return {"gateway_problems": gateway_problems}
