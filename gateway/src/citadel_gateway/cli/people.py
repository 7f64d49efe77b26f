"""Users, keys, tiers and policies, what was changed at run time, and the log of who did what."""

import argparse
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import msgspec

from citadel_gateway.cli.client import Failed, add_key_options, client_of
from citadel_gateway.cli.commands import Commands, Run
from citadel_gateway.cli.show import brief, document, table, when
from citadel_gateway.overrides import NOTES, Files, Override, Standing, apply, read_files
from citadel_gateway.settings import ConfigError, Gateway
from citadel_gateway.snapshot import load_people

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400, "y": 365 * 86_400}
FILES = {"models.json": "models_file", "keys.json": "keys_file", "policies.json": "policies_file"}
KINDS = ("drain", "weight", "aliases", "policy", "tier", "user", "key")


def add(commands: Commands) -> None:
    add_users(commands.group("users", "Whom limits belong to."))
    add_keys(commands.group("keys", "Make, list, rotate and revoke keys."))
    tiers = commands.group("tiers", "What the users of a tier may.")
    one(tiers, "list", "All tiers as they are in force.", list_tiers)
    parser = one(tiers, "set", "Change a tier until it is reset, or make one.", set_tier, "tier")
    parser.add_argument("fields", nargs="+", metavar="FIELD=VALUE", help="for example tokens_per_minute=20000")
    one(tiers, "reset", "What the files say of a tier counts again.", reset_entry("tiers"), "tier")
    policies = commands.group("policies", "How auto and aliases become a model.")
    one(policies, "list", "All policies as they are in force.", list_policies)
    parser = one(policies, "set", "Change a policy until it is reset, or make one.", set_policy, "policy")
    parser.add_argument("value", metavar="JSON", help="the policy as policies.json has it, or @FILE")
    one(policies, "reset", "What the files say of a policy counts again.", reset_entry("policies"), "policy")
    add_overrides(commands)
    parser = one(commands, "audit", "Who changed what, the newest first.", list_audit)
    parser.add_argument("--limit", type=int, default=50, metavar="N")
    parser.add_argument("--target", default="", metavar="NAME", help="only what concerns this user, key, model or tier")


def one(commands: Commands, name: str, text: str, run: Run, *words: str) -> argparse.ArgumentParser:
    parser = commands.add(name, text, run)
    for word in words:
        parser.add_argument(word, metavar=word.upper())
    add_key_options(parser)
    parser.add_argument("--json", action="store_true", help="print what the control process answers")
    return parser


def add_users(users: Commands) -> None:
    one(users, "list", "All users.", list_users)
    for name, text, run in (
        ("create", "Make a user.", create_user),
        ("change", "Change a user; what is not given stays.", change_user),
    ):
        parser = one(users, name, text, run, "user")
        parser.add_argument("--name", help="for people to read")
        parser.add_argument("--tier", help="none: the default tier")
        parser.add_argument("--use-case", metavar="NAME", help="what the user's requests count as")
    one(users, "disable", "Let none of a user's keys open anything.", switch_user(enabled=False), "user")
    one(users, "enable", "Let the keys of a disabled user open again.", switch_user(enabled=True), "user")


def add_keys(keys: Commands) -> None:
    parser = one(keys, "list", "Keys that are valid or disabled.", list_keys)
    parser.add_argument("--user", default="", help="only this user's")
    parser.add_argument("--all", action="store_true", help="also those that are revoked or expired")
    parser = one(keys, "create", "Make a key and print it, this once.", create_key)
    parser.add_argument("--user", required=True, help="to whom it belongs")
    parser.add_argument("--new-user", action="store_true", help="make the user if there is none")
    parser.add_argument("--if-none", action="store_true", help="only if no key made here has these scopes yet")
    parser.add_argument("--id", metavar="NAME", help="what logs and lists call it (default: made up)")
    parser.add_argument("--admin", action="store_true", help="scope admin, read and metrics; implies --new-user")
    parser.add_argument("--scope", action="append", metavar="SCOPE", help="again for each (default: inference)")
    parser.add_argument("--model", action="append", metavar="MODEL", help="again for each (default: all)")
    parser.add_argument(
        "--expires", type=duration, default=0.0, metavar="TIME", help="for example 90d (default: never)"
    )
    parser.add_argument("--use-case", default="", metavar="NAME")
    parser = one(keys, "rotate", "Make a key in the place of another and print it.", rotate_key, "key")
    parser.add_argument(
        "--grace", type=duration, default=86_400.0, metavar="TIME", help="the old one is valid so long (default: 1d)"
    )
    one(keys, "revoke", "End a key everywhere, for ever; a declared one is disabled.", revoke_key, "key")
    one(keys, "enable", "Let a declared key that was disabled open again.", enable_key, "key")


def add_overrides(commands: Commands) -> None:
    parser = one(commands, "overrides", "What was changed at run time: list, set, remove.", overrides)
    parser.add_argument("action", nargs="?", choices=("list", "set", "remove"), default="list")
    parser.add_argument("kind", nargs="?", choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("name", nargs="?", metavar="NAME", help="the model, policy, tier, user or key")
    parser.add_argument("value", nargs="?", metavar="JSON", help="the new value, or @FILE")
    parser.add_argument("--field", default="", help="HOST:PORT of a weight, the setting of a tier or a user")
    parser.add_argument("--here", action="store_true", help="on this host only")
    parser.add_argument(
        "--against",
        nargs="+",
        metavar="PATH",
        help="which changes would not survive these files (a folder, or models.json, keys.json, policies.json)",
    )


def duration(text: str) -> float:
    found = re.fullmatch(r"(\d+)([smhdwy]?)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: write 30m, 12h, 90d, 1y")
    return float(int(found[1]) * UNITS[found[2] or "s"])


# users ----------------------------------------------------------------------------------------------------------------
def list_users(options: argparse.Namespace, settings: Gateway) -> int:
    found = client_of(settings, options).ask("GET", "/admin/users")
    if options.json:
        document(found)
        return 0
    rows = [
        (row["id"], row["tier"] or "(default)", "yes" if row["enabled"] else "NO", origin(row), row["name"])
        for row in found
    ]
    table(rows, "USER", "TIER", "ENABLED", "FROM", "NAME")
    return 0


def origin(row: dict[str, Any]) -> str:
    return "keys.json" if row["declared"] else f"{row['created_by']} {when(row['created_at'])}"


def given(options: argparse.Namespace) -> dict[str, Any]:
    entries = {"name": options.name, "tier": options.tier, "use_case": options.use_case}
    return {name: value for name, value in entries.items() if value is not None}


def create_user(options: argparse.Namespace, settings: Gateway) -> int:
    found = client_of(settings, options).ask("POST", "/admin/users", {"id": options.user} | given(options))
    return done(options, found, f"user {found['id']} is there")


def change_user(options: argparse.Namespace, settings: Gateway) -> int:
    found = client_of(settings, options).ask("PATCH", f"/admin/users/{path(options.user)}", given(options))
    return done(options, found, f"user {found['id']}: tier {found['tier'] or '(default)'}, name {found['name']!r}")


def switch_user(*, enabled: bool) -> Run:
    def run(options: argparse.Namespace, settings: Gateway) -> int:
        change = {"enabled": enabled}
        found = client_of(settings, options).ask("PATCH", f"/admin/users/{path(options.user)}", change)
        return done(options, found, f"user {found['id']}: {'enabled' if found['enabled'] else 'disabled'}")

    return run


def path(name: str) -> str:
    return quote(name, safe="")


def done(options: argparse.Namespace, found: Any, text: str) -> int:
    if options.json:
        document(found)
    else:
        print(text)
    return 0


# keys -----------------------------------------------------------------------------------------------------------------
def list_keys(options: argparse.Namespace, settings: Gateway) -> int:
    query = urlencode({"gone": options.all} | ({"user": options.user} if options.user else {}))
    found = client_of(settings, options).ask("GET", f"/admin/keys?{query}")
    if options.json:
        document(found)
        return 0
    rows = [
        (
            row["id"], row["user"], row["state"], ",".join(row["scopes"]), ",".join(row["models"]),
            when(row["expires_at"]) or "never", origin(row),
        )
        for row in found
    ]  # fmt: skip
    table(rows, "KEY", "USER", "STATE", "SCOPES", "MODELS", "EXPIRES", "FROM")
    return 0


def create_key(options: argparse.Namespace, settings: Gateway) -> int:
    scopes = options.scope or (["admin", "read", "metrics"] if options.admin else ["inference"])
    entry = {
        "user": options.user, "scopes": scopes, "models": options.model or ["*"], "expires_in": options.expires,
        "use_case": options.use_case, "new_user": options.new_user or options.admin,
    }  # fmt: skip
    client = client_of(settings, options)
    if options.if_none:
        made = [key for key in client.ask("GET", "/admin/keys") if key["state"] == "valid" and not key["declared"]]
        if any(set(scopes) <= set(key["scopes"]) for key in made):
            return 0
    found = client.ask("POST", "/admin/keys", entry | ({"id": options.id} if options.id else {}))
    return show_key(options, found)


def show_key(options: argparse.Namespace, found: Any) -> int:
    """The key alone on standard output, so that a script can keep it."""
    return done(options, found, found["key"])


def rotate_key(options: argparse.Namespace, settings: Gateway) -> int:
    body = {"grace": options.grace}
    return show_key(options, client_of(settings, options).ask("POST", f"/admin/keys/{path(options.key)}/rotate", body))


def revoke_key(options: argparse.Namespace, settings: Gateway) -> int:
    found = client_of(settings, options).ask("POST", f"/admin/keys/{path(options.key)}/revoke")
    return done(options, found, f"key {found['id']}: {found['state']}")


def enable_key(options: argparse.Namespace, settings: Gateway) -> int:
    found = client_of(settings, options).ask("POST", f"/admin/keys/{path(options.key)}/enable")
    return done(options, found, f"key {found['id']}: {found['state']}")


# tiers and policies ---------------------------------------------------------------------------------------------------
def list_tiers(options: argparse.Namespace, settings: Gateway) -> int:
    found = client_of(settings, options).ask("GET", "/admin/tiers")
    if options.json:
        document(found)
        return 0
    heads = (
        "name", "priority", "requests_per_minute", "tokens_per_minute", "concurrency", "tokens_per_day",
        "tokens_per_month", "overage",
    )  # fmt: skip
    short = ("TIER", "PRIORITY", "REQUESTS/MIN", "TOKENS/MIN", "CONCURRENT", "TOKENS/DAY", "TOKENS/MONTH", "OVERAGE")
    table(([tier[head] if tier[head] != 0 or head == "priority" else "-" for head in heads] for tier in found), *short)
    return 0


def set_tier(options: argparse.Namespace, settings: Gateway) -> int:
    fields = {}
    for assignment in options.fields:
        field, equals, value = assignment.partition("=")
        if not equals:
            raise Failed(f"{assignment!r}: write FIELD=VALUE")
        fields[field] = lenient(value)
    found = client_of(settings, options).ask("PATCH", f"/admin/tiers/{path(options.tier)}", fields)
    return done(options, found, f"tier {found['name']}: " + ", ".join(f"{name}={found[name]}" for name in fields))


def lenient(text: str) -> Any:
    """JSON, or a bare word."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def value_of(text: str | None) -> Any:
    """JSON, in a file if it begins with @."""
    if text is None:
        return None
    try:
        raw = Path(text[1:]).read_text(encoding="utf-8") if text.startswith("@") else text
        return json.loads(raw)
    except (OSError, ValueError) as error:
        raise Failed(f"{text}: {error}") from None


def list_policies(options: argparse.Namespace, settings: Gateway) -> int:
    document(client_of(settings, options).ask("GET", "/admin/policies"))
    return 0


def set_policy(options: argparse.Namespace, settings: Gateway) -> int:
    value = value_of(options.value)
    found = client_of(settings, options).ask("PUT", f"/admin/policies/{path(options.policy)}", value)
    return done(options, found, f"policy {found['name']}: {brief(found)}")


def reset_entry(kind: str) -> Run:
    def run(options: argparse.Namespace, settings: Gateway) -> int:
        name = options.tier if kind == "tiers" else options.policy
        found = client_of(settings, options).ask("DELETE", f"/admin/{kind}/{path(name)}")
        return done(options, found, f"{name}: as the files say")

    return run


# run-time changes -----------------------------------------------------------------------------------------------------
def overrides(options: argparse.Namespace, settings: Gateway) -> int:
    if options.against:
        return against(options, settings)
    client = client_of(settings, options)
    if options.action == "list":
        found = client.ask("GET", "/admin/overrides")
        return list_overrides(options, found)
    if not options.kind or not options.name:
        raise Failed(f"overrides {options.action}: KIND and NAME are needed")
    if options.action == "remove":
        query = urlencode({"kind": options.kind, "name": options.name, "field": options.field})
        client.raw("DELETE", f"/admin/overrides?{query}")
        return done(options, [], f"{options.kind} {options.name}: as the files say")
    value = True if options.kind == "drain" and options.value is None else value_of(options.value)
    body = {"kind": options.kind, "name": options.name, "field": options.field, "value": value, "here": options.here}
    return list_overrides(options, client.ask("PUT", "/admin/overrides", body))


def list_overrides(options: argparse.Namespace, found: Any) -> int:
    if options.json:
        document(found)
        return 0
    if not found:
        print("nothing is changed: the files count")
        return 0
    rows = [
        (
            one["kind"], " ".join(filter(None, (one["name"], one["field"]))), brief(one["value"]),
            brief(one["declared"]), one["who"], when(one["at"]), one["host"] or "all", one["note"],
        )
        for one in found
    ]  # fmt: skip
    table(rows, "KIND", "NAME", "VALUE", "DECLARED", "WHO", "WHEN", "HOSTS", "STATE")
    return 0


def against(options: argparse.Namespace, settings: Gateway) -> int:
    """What a deploy of these files would do to the changes; works without the control process too."""
    new = read_files(with_files(settings, options.against))
    changes = known_changes(options, settings)
    try:
        now = {key(one.override): one for one in apply(read_files(settings), changes, settings)[1]}
    except ConfigError:  # the present files need not be there yet
        now = {}
    after = apply(new, changes, settings)[1]
    lost = [one for one in after if one.status in ("undone", "gone", "collides") and held(now, one)]
    if options.json:
        document([msgspec.to_builtins(one) for one in lost])
        return 0
    for one in lost:
        print(told(one, new))
    return 0


def key(change: Override) -> tuple[str, str, str]:
    return change.kind, change.name, change.field


def held(now: dict[tuple[str, str, str], Standing], standing: Standing) -> bool:
    before = now.get(key(standing.override))
    return before is None or before.status == "holds"


def told(standing: Standing, files: Files) -> str:
    from citadel_gateway.overrides import GoneError, declared

    change = standing.override
    name = " ".join(part for part in (change.kind, change.name, change.field) if part)
    said = f"{name} = {brief(change.value)}, set by {change.who} at {when(change.at)}"
    if standing.status == "undone":
        try:
            new = brief(declared(files, change.kind, change.name, change.field))
        except GoneError:  # cannot be: it would have that status
            new = "nothing"
        return f"undone: {said}; declared was {brief(change.declared)} and becomes {new}"
    return f"{standing.status}: {said}; {NOTES.get(standing.status, standing.note)}"


def with_files(settings: Gateway, paths: list[str]) -> Gateway:
    """The settings with these files instead of their own."""
    changed = {}
    for text in paths:
        found = Path(text)
        candidates = [found / name for name in FILES] if found.is_dir() else [found]
        for one in candidates:
            if one.name not in FILES:
                raise Failed(f"{one}: is none of {', '.join(FILES)}")
            if one.exists() or not found.is_dir():
                changed[FILES[one.name]] = str(one)
    return msgspec.structs.replace(settings, **changed)


def known_changes(options: argparse.Namespace, settings: Gateway) -> list[Override]:
    """From the control process, else as it last knew them."""
    try:
        found = client_of(settings, options).ask("GET", "/admin/overrides")
    except (Failed, ConfigError):
        return list(load_people(settings).overrides)
    names = Override.__struct_fields__
    return [Override(**{name: one[name] for name in names}) for one in found]


# audit ----------------------------------------------------------------------------------------------------------------
def list_audit(options: argparse.Namespace, settings: Gateway) -> int:
    query = urlencode({"limit": options.limit, "target": options.target})
    found = client_of(settings, options).ask("GET", f"/admin/audit?{query}")
    if options.json:
        document(found)
        return 0
    rows = [
        (
            when(one["at"]), one["who"], one["key_id"], one["action"], one["target"], brief(one["before"]),
            brief(one["after"]), one["request_id"],
        )
        for one in found
    ]  # fmt: skip
    table(rows, "WHEN", "WHO", "KEY", "ACTION", "TARGET", "BEFORE", "AFTER", "REQUEST")
    return 0
