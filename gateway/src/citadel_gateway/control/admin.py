"""Administration over HTTP: users, keys, tiers, policies, run-time changes, and the log of who did what.

Every path wants the scope `admin`, and every change leaves a line in the audit log.
"""

from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Depends, Path, Query
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from sqlalchemy import select

from citadel_gateway.control import people
from citadel_gateway.control.auth import Admin, Control, Scoped
from citadel_gateway.control.changes import Change, remove_changes, set_changes, standings
from citadel_gateway.control.sql.tables import audit
from citadel_gateway.errors import Refusal
from citadel_gateway.overrides import Kind, Standing, plain
from citadel_gateway.settings import Policy, Scope, Tier

router = APIRouter(prefix="/admin", tags=["admin"], dependencies=[Depends(Scoped("admin"))])

YEARS = 10 * 366 * 86_400.0


def printable(text: str) -> str:
    """No control, format or unassigned characters: what is shown in a list must not rearrange it."""
    if not text.isprintable():
        raise ValueError("only printable characters")
    return text


UserId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")]
KeyId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
ModelName = Annotated[str, Field(pattern=r"^(\*|[A-Za-z0-9][A-Za-z0-9._:/-]{0,127})$")]
Word = Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]{0,63})?$")]
Title = Annotated[str, Field(max_length=200), AfterValidator(printable)]
Named = Annotated[str, Field(max_length=128), AfterValidator(printable)]
PathUser = Annotated[UserId, Path()]
PathKey = Annotated[KeyId, Path()]
PathWord = Annotated[str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}$")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class UserEntry(BaseModel):
    """A user. `declared`: in keys.json; no tier is the default one."""

    id: str
    name: str
    tier: str
    use_case: str
    enabled: bool
    created_at: float
    created_by: str
    updated_at: float
    declared: bool


class NewUser(Strict):
    id: UserId
    name: Title = ""
    tier: Word = ""
    use_case: Word = ""


class UserChange(Strict):
    """What is not given stays as it is."""

    name: Title | None = None
    tier: Word | None = None
    use_case: Word | None = None
    enabled: bool | None = None


class KeyEntry(BaseModel):
    """A key without the key. `state` disabled: taken back for now, or its user is."""

    id: str
    user: str
    scopes: list[str]
    models: list[str]
    use_case: str
    expires_at: float
    created_at: float
    created_by: str
    revoked_at: float
    revoked_by: str
    rotated_from: str
    declared: bool
    state: Literal["valid", "expired", "revoked", "disabled"]


class NewKey(Strict):
    """`expires_in`: seconds; 0 is never. `new_user`: make the user, if there is none."""

    user: UserId
    id: KeyId | None = None
    scopes: Annotated[list[Scope], Field(min_length=1, max_length=8)] = ["inference"]
    models: Annotated[list[ModelName], Field(min_length=1, max_length=200)] = ["*"]
    expires_in: Annotated[float, Field(ge=0, le=YEARS, allow_inf_nan=False)] = 0.0
    use_case: Word = ""
    new_user: bool = False


class Rotation(Strict):
    """`grace`: for so many seconds the old key is valid on; 0 ends it at once."""

    grace: Annotated[float, Field(ge=0, le=90 * 86_400.0, allow_inf_nan=False)] = people.GRACE


class ShownKey(BaseModel):
    """The only time that the key itself is shown."""

    key: str
    entry: KeyEntry


class ChangeEntry(BaseModel):
    """A run-time change. `declared`: what the files said when it was made."""

    kind: Kind
    name: str
    field: str
    value: Any
    declared: Any
    at: float
    who: str
    host: str
    status: str
    note: str


class NewChange(Strict):
    """`here`: on this host only."""

    kind: Kind
    name: Named
    field: Named = ""
    value: Any = None
    here: bool = False


class Line(BaseModel):
    """One line of the audit log."""

    id: int
    at: float
    who: str
    key_id: str
    via: str
    host: str
    request_id: str
    action: str
    target: str
    before: Any
    after: Any


# users ----------------------------------------------------------------------------------------------------------------
@router.get("/users")
def users(control: Control) -> list[UserEntry]:
    return [UserEntry(**row) for row in people.list_users(control)]


@router.post("/users", status_code=201)
def create_user(new: NewUser, control: Control, actor: Admin) -> UserEntry:
    row = people.create_user(control, actor, new.id, title=new.name, tier=new.tier, use_case=new.use_case)
    return UserEntry(**row)


@router.get("/users/{user}")
def user(user: PathUser, control: Control) -> UserEntry:
    return UserEntry(**people.get_user(control, user))


@router.patch("/users/{user}")
def change_user(user: PathUser, change: UserChange, control: Control, actor: Admin) -> UserEntry:
    """Disabled, none of the user's keys opens anything; it takes effect on every host within two seconds."""
    return UserEntry(**people.change_user(control, actor, user, change.model_dump(exclude_none=True)))


# keys -----------------------------------------------------------------------------------------------------------------
@router.get("/keys")
def keys(control: Control, user: Annotated[UserId | None, Query()] = None, *, gone: bool = False) -> list[KeyEntry]:
    """`gone`: also those that are revoked or expired."""
    return [KeyEntry(**row) for row in people.list_keys(control, user or "", gone=gone)]


@router.post("/keys", status_code=201)
def create_key(new: NewKey, control: Control, actor: Admin) -> ShownKey:
    row, token = people.create_key(
        control,
        actor,
        new.user,
        name=new.id or "",
        scopes=new.scopes,
        models=new.models,
        expires_in=new.expires_in,
        use_case=new.use_case,
        new_user=new.new_user,
    )
    return ShownKey(key=token, entry=KeyEntry(**row))


@router.get("/keys/{key}")
def key(key: PathKey, control: Control) -> KeyEntry:
    return KeyEntry(**people.get_key(control, key))


@router.post("/keys/{key}/rotate", status_code=201)
def rotate_key(key: PathKey, control: Control, actor: Admin, rotation: Rotation | None = None) -> ShownKey:
    row, token = people.rotate_key(control, actor, key, (rotation or Rotation()).grace)
    return ShownKey(key=token, entry=KeyEntry(**row))


@router.post("/keys/{key}/revoke")
def revoke_key(key: PathKey, control: Control, actor: Admin) -> KeyEntry:
    """For ever. A declared key is disabled until it is enabled again."""
    return KeyEntry(**people.revoke_key(control, actor, key))


@router.post("/keys/{key}/enable")
def enable_key(key: PathKey, control: Control, actor: Admin) -> KeyEntry:
    """Take back the revocation of a declared key."""
    return KeyEntry(**people.enable_key(control, actor, key))


# tiers and policies ---------------------------------------------------------------------------------------------------
def in_force(control: Control, kind: Literal["tier", "policy"]) -> list[dict[str, Any]]:
    """As they are now, with the run-time changes."""
    if control.snapshot is None:
        return []
    policies = control.snapshot.policies
    found: list[dict[str, Any]] = plain(policies.tiers if kind == "tier" else policies.policies)
    return found


def one_in_force(control: Control, kind: Literal["tier", "policy"], name: str) -> dict[str, Any]:
    found = next((entry for entry in in_force(control, kind) if entry["name"] == name), None)
    if found is None:
        raise people.unknown(kind, name)
    return found


def reset(control: Control, actor: Admin, kind: Literal["tier", "policy"], name: str) -> list[dict[str, Any]]:
    changed = [one.override for one in standings(control) if (one.override.kind, one.override.name) == (kind, name)]
    if not changed:
        raise Refusal(404, "change_not_found", f"The {kind} {name!r} has not been changed")
    remove_changes(control, actor, [(one.kind, one.name, one.field) for one in changed])
    return in_force(control, kind)


@router.get("/tiers")
def tiers(control: Control) -> list[dict[str, Any]]:
    return in_force(control, "tier")


@router.patch("/tiers/{tier}")
def change_tier(tier: PathWord, fields: dict[str, Any], control: Control, actor: Admin) -> dict[str, Any]:
    """Change fields of a tier; a tier that is not declared is made."""
    wrong = sorted(fields.keys() - set(Tier.__struct_fields__) - {"name"})
    if wrong or not fields or fields.pop("name", tier) != tier:
        raise Refusal(400, "invalid_request", f"A tier has no {wrong}" if wrong else "Give the fields to change")
    known = any(entry["name"] == tier for entry in in_force(control, "tier"))
    changes = [Change("tier", tier, field, value) for field, value in fields.items()]
    set_changes(control, actor, changes if known else [Change("tier", tier, "", fields)])
    return one_in_force(control, "tier", tier)


@router.delete("/tiers/{tier}")
def reset_tier(tier: PathWord, control: Control, actor: Admin) -> list[dict[str, Any]]:
    """What the files say counts again; a tier that was made at run time is gone."""
    return reset(control, actor, "tier", tier)


@router.get("/policies")
def policies(control: Control) -> list[dict[str, Any]]:
    return in_force(control, "policy")


@router.put("/policies/{policy}")
def set_policy(policy: PathWord, entry: dict[str, Any], control: Control, actor: Admin) -> dict[str, Any]:
    """Put a policy in the place of the declared one, or beside the others."""
    try:
        whole = plain(msgspec.convert(entry | {"name": policy}, Policy))
    except msgspec.ValidationError as error:
        raise Refusal(400, "invalid_request", str(error)) from None
    set_changes(control, actor, [Change("policy", policy, "", whole)])
    return one_in_force(control, "policy", policy)


@router.delete("/policies/{policy}")
def reset_policy(policy: PathWord, control: Control, actor: Admin) -> list[dict[str, Any]]:
    return reset(control, actor, "policy", policy)


# run-time changes -----------------------------------------------------------------------------------------------------
def shown(standing: Standing) -> ChangeEntry:
    names = standing.override.__struct_fields__
    entry = {name: getattr(standing.override, name) for name in names}
    return ChangeEntry(**entry, status=standing.status, note=standing.note)


@router.get("/overrides")
def overrides(control: Control) -> list[ChangeEntry]:
    """Everything that was changed at run time, by whom and when, and whether it is in force."""
    return [shown(one) for one in standings(control)]


@router.put("/overrides")
def set_override(new: NewChange, control: Control, actor: Admin) -> list[ChangeEntry]:
    """Change a weight (field: host:port), aliases, a policy, a tier (field: which setting), a declared user or key, or
    drain a model. Judged as the files are; what the files say already removes the change there was.
    """
    wanted = Change(new.kind, new.name, new.field, new.value, new.here)
    return [shown(one) for one in set_changes(control, actor, [wanted])]


@router.delete("/overrides", status_code=204)
def remove_override(
    control: Control,
    actor: Admin,
    kind: Kind,
    name: Annotated[Named, Query()],
    field: Annotated[Named, Query()] = "",
) -> None:
    """What the files say counts again."""
    remove_changes(control, actor, [(kind, name, field)])


# audit ----------------------------------------------------------------------------------------------------------------
@router.get("/audit")
def log_of_changes(
    control: Control,
    target: Annotated[Named, Query()] = "",
    before: Annotated[int, Query(ge=0, le=2**62)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> list[Line]:
    """The newest first. `before`: an id, to turn pages."""
    query = select(audit).order_by(audit.c.id.desc()).limit(limit)
    if target:
        query = query.where(audit.c.target == target)
    if before:
        query = query.where(audit.c.id < before)
    with control.database.read() as connection:
        return [Line(**row) for row in connection.execute(query).mappings()]
