"""Run-time changes: made, listed, removed; and the drain, which also works without the database."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from msgspec import Struct
from sqlalchemy import Connection, and_, func, select

from citadel_gateway.control.sql import DatabaseAwayError
from citadel_gateway.control.sql.tables import overrides, users
from citadel_gateway.control.state import State
from citadel_gateway.control.stored import Actor, bump, note, read_overrides
from citadel_gateway.errors import Refusal
from citadel_gateway.overrides import Files, GoneError, Kind, Override, Standing, apply, declared, plain

Which = tuple[Kind, str, str]  # kind, name, field


class Change(Struct, frozen=True):
    """What somebody wants to be otherwise. `here`: on this host only."""

    kind: Kind
    name: str
    field: str
    value: Any
    here: bool = False


def which(change: Override) -> Which:
    return change.kind, change.name, change.field


def standings(state: State) -> list[Standing]:
    """All run-time changes, also those that are not in force. From memory: they can be seen without the database."""
    here = [
        Override("drain", name, at=mark.at, who=mark.who, host=state.settings.host, value=True)
        for name, marks in state.marks.items()
        for reason, mark in marks.items()
        if reason == "operator"
    ]
    return [*state.standings, *(Standing(change, "holds", "in force on this host") for change in here)]


def set_changes(state: State, actor: Actor, wanted: Sequence[Change]) -> list[Standing]:
    """All of them or none. A value that the files declare anyway removes the change there was."""

    def edit(files: Files, present: dict[Which, Override]) -> dict[Which, Override]:
        for one in wanted:
            change = made(state, actor, files, present, one)
            if change.kind != "drain" and change.value == change.declared:
                present.pop(which(change), None)
            else:
                present[which(change)] = change
        return present

    present = in_transaction(state, actor, "override.set", edit)
    touched = {(one.kind, one.name) for one in wanted}
    return [one for one in present if (one.override.kind, one.override.name) in touched]


def made(state: State, actor: Actor, files: Files, present: dict[Which, Override], wanted: Change) -> Override:
    """The change as it is kept: with what is declared now, who, and when."""
    host = state.settings.host if wanted.here else ""
    field, value = wanted.field, wanted.value
    whole = present.get(("tier", wanted.name, ""))
    if wanted.kind == "tier" and field and whole is not None:  # a tier made at run time is kept in one piece
        field, value = "", whole.value | {field: value}
    if (wanted.kind in ("weight", "user", "key")) != bool(field) and wanted.kind != "tier":
        raise Refusal(400, "invalid_request", f"{wanted.kind}: a field is {'not ' * bool(field)}needed", param="field")
    try:
        base = declared(files, wanted.kind, wanted.name, field)
    except GoneError as error:
        raise Refusal(404, "not_declared", f"{wanted.kind}: nothing is called {str(error)[:128]!r}") from None
    return Override(wanted.kind, wanted.name, field, value, base, time.time(), actor.who, host)


def remove_changes(state: State, actor: Actor, names: Sequence[Which]) -> None:
    """What the files declare counts again. 404 if there is no such change."""

    def edit(files: Files, present: dict[Which, Override]) -> dict[Which, Override]:
        for one in names:
            if present.pop(one, None) is None:
                raise Refusal(404, "change_not_found", f"{' '.join(one).strip()[:200]}: it has not been changed")
        return present

    in_transaction(state, actor, "override.remove", edit)


Edit = Callable[[Files, dict[Which, Override]], dict[Which, Override]]


def in_transaction(state: State, actor: Actor, action: str, edit: Edit) -> list[Standing]:
    """Edit the set of changes, judge the whole, and store it; nothing that held before may fall by it."""
    files = state.files
    if files is None:
        raise Refusal(503, "not_ready", "The gateway's files cannot be used; check-config says why", retry_after=5)
    with state.database.begin() as connection:
        bump(connection)
        old = {which(one): one for one in read_overrides(connection)}
        new = edit(files, dict(old))
        held = {which(one.override) for one in apply(files, list(old.values()), state.settings)[1] if holds(one)}
        judged = apply(files, list(new.values()), state.settings)[1]
        for one in judged:
            fresh = old.get(which(one.override)) != one.override
            if not holds(one) and (fresh or which(one.override) in held):
                raise Refusal(409 if not fresh else 400, "invalid_change", refusal_of(one, fresh=fresh))
        store(connection, state, actor, action, old, new)
    state.poll()
    return judged


def holds(standing: Standing) -> bool:
    return standing.status in ("holds", "elsewhere")


def refusal_of(standing: Standing, *, fresh: bool) -> str:
    change = standing.override
    name = " ".join(part for part in (change.kind, change.name, change.field) if part)
    return (
        f"{name}: {standing.note}"
        if fresh
        else f"{name}, changed by {change.who}, would no longer hold: {standing.note}"
    )


def store(
    connection: Connection,
    state: State,
    actor: Actor,
    action: str,
    old: dict[Which, Override],
    new: dict[Which, Override],
) -> None:
    for key, change in old.items():
        if key not in new:
            check_unused_tier(connection, change)
    for key in old.keys() | new.keys():
        before, after = old.get(key), new.get(key)
        if before == after:
            continue
        kind, name, field = key
        row = and_(overrides.c.kind == kind, overrides.c.name == name, overrides.c.field == field)
        connection.execute(overrides.delete().where(row))
        if after is not None:
            connection.execute(overrides.insert().values(row_of(after)))
        shown = [None if one is None else {"field": field, "value": one.value} for one in (before, after)]
        verb = action if after is not None else "override.remove"
        host = state.settings.host
        note(connection, actor, host, f"{verb}.{kind}", name, before=shown[0], after=shown[1])


def row_of(change: Override) -> dict[str, Any]:
    names = ("kind", "name", "field", "value", "declared", "at", "who", "host")
    return {name: plain(getattr(change, name)) for name in names}


def check_unused_tier(connection: Connection, change: Override) -> None:
    if change.kind == "tier" and not change.field:
        count = connection.execute(select(func.count()).where(users.c.tier == change.name)).scalar_one()
        if count:
            raise Refusal(409, "tier_in_use", f"The tier {change.name!r} has {count} users")


# drain ----------------------------------------------------------------------------------------------------------------
def drain(state: State, actor: Actor, model: str, *, here: bool = False) -> bool:
    """On all hosts, or `here` only: which is also what is done when the database is away."""
    if not here:
        try:
            set_changes(state, actor, [Change("drain", model, "", value=True)])
            return state.draining(model)
        except DatabaseAwayError:
            pass
    return state.change(model, "operator", drain=True, who=actor.who)


def resume(state: State, actor: Actor, model: str) -> bool:
    """Undo an operator's drain, here and everywhere. What was drained with the database cannot be resumed without."""
    state.change(model, "operator", drain=False, who=actor.who)
    if any(one.override.kind == "drain" and one.override.name == model for one in state.standings):
        remove_changes(state, actor, [("drain", model, "")])
    return state.draining(model)
