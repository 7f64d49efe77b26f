"""What operators change at run time, laid over what the files declare.

Pure: files and changes in, files and a verdict on each change out. A change remembers what the files declared when it
was made. It holds as long as they still declare that: when a deploy declares something new for the same thing, the
newer decision counts, and the change is `undone`. Nothing is applied that the files themselves could not say: the
problems functions of `settings` judge both.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from math import isfinite
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from citadel_gateway.settings import (
    Amount,
    ConfigError,
    Gateway,
    Key,
    Keys,
    Model,
    Models,
    Name,
    Policies,
    Policy,
    Tier,
    User,
    counting_problems,
    key_problems,
    model_problems,
    policy_problems,
    read,
    read_policies,
    user_problems,
)

Entry = TypeVar("Entry", Policy, Tier)
Kind = Literal["drain", "weight", "aliases", "policy", "tier", "user", "key"]
Status = Literal["holds", "same", "undone", "gone", "collides", "elsewhere"]
NOTES: dict[str, str] = {
    "holds": "in force",
    "same": "the files say the same; it can be removed",
    "undone": "the files have changed since; theirs counts",
    "gone": "there is nothing of this name any more",
    "elsewhere": "made for another host",
}


class Override(Struct, frozen=True, omit_defaults=True):
    """One change. `field`: the backend of a weight, the setting of a tier or a user. `host`: the only one it is for."""

    kind: Kind
    name: str
    field: str = ""
    value: Any = None
    declared: Any = None
    at: float = 0.0
    who: str = ""
    host: str = ""


class Standing(Struct, frozen=True):
    """A change and what has become of it."""

    override: Override
    status: Status
    note: str


class Files(Struct, frozen=True):
    """What is declared. Each key names its user, and each user is there."""

    models: tuple[Model, ...]
    keys: tuple[Key, ...]
    users: tuple[User, ...]
    policies: Policies
    created: int = 0  # when the list of models was written
    drained: tuple[str, ...] = ()  # by a change; no file drains


class GoneError(Exception):
    """What a change is about is not declared."""


class WrongError(Exception):
    """A change that cannot be made, and why."""


def read_files(gateway: Gateway) -> Files:
    """models.json, keys.json and policies.json; `ConfigError` when they cannot be used."""
    models = read(gateway.models_file, Models)
    keys = read(gateway.keys_file, Keys)
    policies = read_policies(gateway)
    found = model_problems(models, gateway.models_file) + key_problems(keys, None, gateway.keys_file)
    found += policy_problems(policies, models, gateway.policies_file)
    found += user_problems(keys, policies, gateway.keys_file) + counting_problems(gateway, policies, "gateway.json")
    if found:
        raise ConfigError(*found)
    return declared_files(models, keys, policies, int(Path(gateway.models_file).stat().st_mtime))


def declared_files(models: Models, keys: Keys, policies: Policies, created: int = 0) -> Files:
    """A key without a user belongs to one of its own name."""
    owned = tuple(key if key.user else replace(key, user=key.id) for key in keys.keys)
    known = {user.id for user in keys.users}
    implied = dict.fromkeys(key.user for key in owned if key.user not in known)
    return Files(models.models, owned, (*keys.users, *map(User, implied)), policies, created)


def plain(value: Any) -> Any:
    """As JSON has it, so that what was stored and what is declared compare."""
    return msgspec.json.decode(msgspec.json.encode(value))


# what is declared -----------------------------------------------------------------------------------------------------
def named(entries: Sequence[Any], name: str, attribute: str = "name") -> Any:
    found = next((entry for entry in entries if getattr(entry, attribute) == name), None)
    if found is None:
        raise GoneError(name)
    return found


def declared_drain(files: Files, name: str, field: str) -> Any:
    named(files.models, name)


def declared_weight(files: Files, name: str, field: str) -> Any:
    for backend in named(files.models, name).backends:
        if f"{backend.host}:{backend.port}" == field:
            return backend.weight
    raise GoneError(f"{name} {field}")


def declared_aliases(files: Files, name: str, field: str) -> Any:
    return plain(named(files.models, name).aliases)


def declared_policy(files: Files, name: str, field: str) -> Any:
    return plain(next((policy for policy in files.policies.policies if policy.name == name), None))


def declared_tier(files: Files, name: str, field: str) -> Any:
    if not field:  # a whole tier; of one that is declared, fields are changed
        return plain(next((tier for tier in files.policies.tiers if tier.name == name), None))
    return attribute_of(named(files.policies.tiers, name), field)


def declared_user(files: Files, name: str, field: str) -> Any:
    return attribute_of(named(files.users, name, "id"), field)


def declared_key(files: Files, name: str, field: str) -> Any:
    named(files.keys, name, "id")
    return True


def attribute_of(entry: Struct, field: str) -> Any:
    if field not in entry.__struct_fields__ or field in ("id", "name"):
        raise GoneError(field)
    return plain(getattr(entry, field))


# putting a change over it ---------------------------------------------------------------------------------------------
def put_drain(files: Files, change: Override) -> Files:
    return replace(files, drained=(*files.drained, change.name))


def put_weight(files: Files, change: Override) -> Files:
    weight = msgspec.convert(change.value, Amount)
    if not isfinite(weight):
        raise WrongError("a weight is a finite number")

    def weighed(model: Model) -> Model:
        backends = (
            replace(one, weight=weight) if f"{one.host}:{one.port}" == change.field else one for one in model.backends
        )
        return replace(model, backends=tuple(backends))

    return with_model(files, change.name, weighed)


def put_aliases(files: Files, change: Override) -> Files:
    aliases = msgspec.convert(change.value, tuple[Name, ...])
    return with_model(files, change.name, lambda model: replace(model, aliases=aliases))


def with_model(files: Files, name: str, edit: Callable[[Model], Model]) -> Files:
    return replace(files, models=tuple(edit(model) if model.name == name else model for model in files.models))


def put_policy(files: Files, change: Override) -> Files:
    policy = msgspec.convert(with_name(change), Policy)
    return replace(files, policies=replace(files.policies, policies=placed(files.policies.policies, policy)))


def put_tier(files: Files, change: Override) -> Files:
    if change.field:
        entry = plain(named(files.policies.tiers, change.name)) | {change.field: change.value}
    elif any(tier.name == change.name for tier in files.policies.tiers):
        raise WrongError(f"tier {change.name!r} is declared: change its fields")
    else:
        entry = with_name(change)
    return replace(
        files, policies=replace(files.policies, tiers=placed(files.policies.tiers, msgspec.convert(entry, Tier)))
    )


def with_name(change: Override) -> dict[str, Any]:
    if not isinstance(change.value, dict):
        raise WrongError(f"a {change.kind} is an object")
    if change.value.get("name", change.name) != change.name:
        raise WrongError(f"the {change.kind} {change.name!r} cannot be called {change.value['name']!r} inside")
    return change.value | {"name": change.name}


def placed(entries: tuple[Entry, ...], new: Entry) -> tuple[Entry, ...]:
    if any(entry.name == new.name for entry in entries):
        return tuple(new if entry.name == new.name else entry for entry in entries)
    return tuple(chain(entries, [new]))


def put_user(files: Files, change: Override) -> Files:
    entry = plain(named(files.users, change.name, "id")) | {change.field: change.value}
    user = msgspec.convert(entry, User)
    return replace(files, users=tuple(user if one.id == user.id else one for one in files.users))


def put_key(files: Files, change: Override) -> Files:
    if change.field != "enabled" or change.value is not False:
        raise WrongError("a declared key can only be disabled")
    return replace(files, keys=tuple(key for key in files.keys if key.id != change.name))


DECLARED: dict[Kind, Callable[[Files, str, str], Any]] = {
    "drain": declared_drain,
    "weight": declared_weight,
    "aliases": declared_aliases,
    "policy": declared_policy,
    "tier": declared_tier,
    "user": declared_user,
    "key": declared_key,
}
PUT: dict[Kind, Callable[[Files, Override], Files]] = {
    "drain": put_drain,
    "weight": put_weight,
    "aliases": put_aliases,
    "policy": put_policy,
    "tier": put_tier,
    "user": put_user,
    "key": put_key,
}


def declared(files: Files, kind: Kind, name: str, field: str) -> Any:
    """What the files say of it now; None: nothing (a new policy or tier). `GoneError` when there is no such thing."""
    return DECLARED[kind](files, name, field)


def put(files: Files, change: Override, gateway: Gateway) -> Files:
    """The files with the change; `WrongError` says why it cannot be made."""
    try:
        changed = PUT[change.kind](files, change)
    except GoneError as error:
        raise WrongError(f"there is no {error}") from None
    except msgspec.ValidationError as error:
        raise WrongError(str(error)) from None
    found = problems_of(changed, gateway)
    if found:
        raise WrongError("; ".join(found))
    return changed


def problems_of(files: Files, gateway: Gateway) -> list[str]:
    """Judged as the files are."""
    models, keys = Models(files.models), Keys(files.keys, files.users)
    found = model_problems(models, "models") + policy_problems(files.policies, models, "policies")
    return found + user_problems(keys, files.policies, "users") + counting_problems(gateway, files.policies, "policies")


def apply(files: Files, changes: Sequence[Override], gateway: Gateway) -> tuple[Files, list[Standing]]:
    """All changes over the files, in the order in which they were made. One that needs another first (an alias that
    moves from model to model) is tried again after it.
    """
    standings: dict[int, Standing] = {}
    waiting = []
    for number, change in enumerate(sorted(changes, key=lambda one: one.at)):
        status = before(files, change, gateway)
        if status == "holds":
            waiting.append((number, change))
        else:
            standings[number] = Standing(change, status, NOTES[status])
    progress = True
    while waiting and progress:
        progress = False
        for number, change in tuple(waiting):
            try:
                files = put(files, change, gateway)
            except WrongError as error:
                standings[number] = Standing(change, "collides", str(error))
                continue
            standings[number] = Standing(change, "holds", NOTES["holds"])
            waiting.remove((number, change))
            progress = True
    return files, [standings[number] for number in sorted(standings)]


def before(files: Files, change: Override, gateway: Gateway) -> Status:
    """By what the files alone say."""
    if change.host and change.host != gateway.host:
        return "elsewhere"
    try:
        now = declared(files, change.kind, change.name, change.field)
    except GoneError:
        return "gone"
    if change.kind == "drain":
        return "holds"
    if now == change.value:
        return "same"
    return "holds" if now == change.declared else "undone"
