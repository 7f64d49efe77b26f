"""Why a request went as it did: `GET /v1/requests/{id}/why`, from the ledger or, before that, from the journal."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException

from citadel_gateway.control.auth import Control, Scoped
from citadel_gateway.control.settler import Live, Settler
from citadel_gateway.control.sql import Database, reports
from citadel_gateway.records import Candidate, Opened, Settled, Why
from citadel_gateway.settings import Key

router = APIRouter(tags=["requests"])

Explanation = dict[str, Any]
Asking = Annotated[Key, Depends(Scoped("inference", "read", "admin"))]

NOTES = {
    "best": "the smallest score",
    "affinity": "has the prompt's beginning in its cache",
    "session": "serves this conversation",
    "second_choice": "looked at, not better",
    "down": "was down",
    "open": "its circuit was open",
    "draining": "was draining",
    "tried": "had been tried",
    "full": "had no free slot",
    "slow_start": "had just come back",
    "only": "there was no other",
    "too_loaded": "knows the prompt, but had too much to do",
    "suspect": "had not answered of late",
    "weight_0": "serves only when no other can",
}
OUTCOMES = {
    "ok": "It was answered",
    "error": "It failed",
    "refused": "It was refused",
    "limited": "It was refused by a limit",
    "unavailable": "There was nobody to serve it",
    "client_closed": "The client went away",
    "timeout": "It took too long",
    "upstream_error": "The engine failed",
    "cut": "It was cut off",
    "lost": "Its worker died",
}


@router.get("/v1/requests/{name:path}/why")
def why(name: str, control: Control, key: Asking) -> Explanation:
    """By the gateway's id or by the X-Request-ID. Own requests only, unless the key may administer."""
    user = None if "admin" in key.scopes else key.user or key.id
    found = explain(control.database, control.parts.get("settler"), name, user)
    if found is None:
        raise HTTPException(404, f"There is no request {name[:128]!r}")
    return found


def explain(database: Database, settler: Settler | None, name: str, user: str | None) -> Explanation | None:
    """`user`: only theirs. Raises `DatabaseAwayError` when only the database could know."""
    found = settler.find(name) if settler is not None else None
    if isinstance(found, Settled) and user in (None, found.user):
        return settled(found, "waiting")
    if isinstance(found, Live) and user in (None, found.opened.user):
        return opened(found)
    with database.read() as connection:
        known = reports.find(connection, name, user)
    return settled(known, "settled") if known is not None else None


def opened(live: Live) -> Explanation:
    """What is known of a request that is running."""
    one, running = live.opened, live.running
    used = {"input": running.input_tokens, "output": running.output_tokens} if running is not None else {}
    story = [f"{one.user} asked for {one.asked or one.model}; it is running on {one.model}."]
    return {
        **common(one),
        "state": "open",
        "limits": {"reserved_tokens": one.reserved},
        "tokens": used,
        "story": story,
    }


def common(one: Opened | Settled) -> Explanation:
    names = ("id", "request_id", "at", "host", "worker", "user", "key", "tier", "endpoint", "stream", "session")
    found = {name: getattr(one, name) for name in names}
    return {**found, "use_case": one.use_case, "asked": one.asked, "model": one.model, "backend": one.backend}


def settled(one: Settled, state: str) -> Explanation:
    """`state`: waiting (not in the ledger yet) or settled."""
    decision = one.why
    return {
        **common(one),
        "state": state,
        "outcome": one.outcome,
        "status": one.status,
        "code": one.code,
        "decision": {
            "policy": decision.policy,
            "rule": decision.rule,
            "choose": decision.choose,
            "fallback_from": decision.fallback_from,
            "degraded_from": decision.degraded_from,
            "prompt_tokens": decision.prompt_tokens,
            "language": decision.language,
            "tag": decision.tag,
            "tools": decision.tools,
            "budget_usd": decision.budget_usd,
            "candidates": [
                {
                    "model": candidate.model,
                    "backend": candidate.backend,
                    "score": candidate.score,
                    "note": candidate.note,
                    "taken": (candidate.model, candidate.backend) == (one.model, one.backend),
                }
                for candidate in decision.candidates
            ],
        },
        "limits": {
            "refused_by": decision.limit,
            "remaining": decision.remaining,
            "reserved_tokens": one.reserved,
            "overage": one.overage,
        },
        "queue": {"seconds": one.queue_seconds, "length": decision.queue_length},
        "retry_after": decision.retry_after,
        "seconds": {
            "queue": one.queue_seconds,
            "first_byte": one.first_byte_seconds,
            "total": one.total_seconds,
            "engine": one.engine_seconds,
        },
        "tokens": {
            "input": one.input_tokens,
            "output": one.output_tokens,
            "cached": one.cached_tokens,
            "exact": one.exact,
        },
        "tries": one.tries,
        "bytes": {"in": one.bytes_in, "out": one.bytes_out},
        "cost": {"usd": one.cost_usd, "parts": one.cost},
        "story": story(one),
    }


def story(one: Settled) -> list[str]:
    """The same for people."""
    lines = [f"{one.user} asked for {one.asked or one.model}."]
    lines += choice(one, one.why)
    if one.why.limit:
        lines.append(f"The limit {one.why.limit} stood against it.")
    if one.queue_seconds >= 0.001:
        lines.append(f"It waited {one.queue_seconds:.3f} s, {one.why.queue_length} others before it.")
    end = OUTCOMES.get(one.outcome, f"It ended as {one.outcome}")
    code = f" ({one.code})" if one.code and not one.code.isdecimal() else ""
    lines.append(f"{end}{code} after {one.total_seconds:.3f} s, {one.tries} {'try' if one.tries == 1 else 'tries'}.")
    if one.why.retry_after:
        lines.append(f"It was told to come back in {one.why.retry_after:.0f} s.")
    sure = "" if one.exact or not (one.input_tokens or one.output_tokens) else ", as far as was seen"
    lines.append(f"{one.input_tokens} tokens in, {one.output_tokens} out{sure}: {one.cost_usd:.6f} USD.")
    return lines


def choice(one: Settled, decision: Why) -> list[str]:
    lines = []
    if decision.policy:
        rule = f", rule {decision.rule}" if decision.rule else ""
        lines.append(f"The policy {decision.policy}{rule} chose {one.model} by {decision.choose or 'name'}.")
    if decision.degraded_from:
        lines.append(f"The quota was spent, so {one.model} served in the place of {decision.degraded_from}.")
    if decision.fallback_from:
        lines.append(f"{one.model} took over from {decision.fallback_from}.")
    lines += [looked_at(candidate, one) for candidate in decision.candidates]
    return lines


def looked_at(candidate: Candidate, one: Settled) -> str:
    """A candidate without a backend is a model among models."""
    note = NOTES.get(candidate.note, candidate.note)
    if not candidate.backend:
        return f"{candidate.model}: score {candidate.score:g}, {note}."
    taken = "taken" if (candidate.model, candidate.backend) == (one.model, one.backend) else "not taken"
    return f"{candidate.model} at {candidate.backend}: {taken}, score {candidate.score:g}, {note}."
