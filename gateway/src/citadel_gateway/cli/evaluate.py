"""`citadel-gateway evaluate FILE`: ask golden prompts through the gateway and check the answers."""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from citadel_gateway.cli.client import Client as Local
from citadel_gateway.cli.client import Failed, add_key_options, given_key, read_key
from citadel_gateway.cli.commands import Commands
from citadel_gateway.control.golden import Case, judge, load
from citadel_gateway.settings import ConfigError, Gateway, local_key_path

TOKENS = 256  # of an answer, for a prompt that does not say
KEPT = 2000  # letters of what is sent along
RETRIES = 3
PATIENCE = 30.0  # seconds that a refusal may ask to wait


def add(commands: Commands) -> None:
    parser = commands.add(
        "evaluate",
        "Ask golden prompts through the gateway, check the answers, keep the result. Exit status 1 when too many fail.",
        run,
    )
    parser.add_argument("file", metavar="FILE", help="one JSON object a line: messages, expect, name, model")
    add_key_options(parser)
    parser.add_argument("--model", default="", metavar="MODEL", help="for prompts that name none (default: auto)")
    parser.add_argument("--concurrency", type=int, default=4, metavar="N", help="asked at a time (default: 4)")
    parser.add_argument(
        "--pass",
        dest="share",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="of the prompts that must pass (default: 1)",
    )
    parser.add_argument(
        "--run", dest="run_name", default="", metavar="NAME", help="of this run (default: date and time)"
    )
    parser.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="for one answer (default: 120)")
    parser.add_argument("--url", default="", metavar="URL", help="of another gateway (default: this host's)")
    parser.add_argument("--no-record", action="store_true", help="check only; keep and count nothing")
    parser.add_argument("--json", dest="as_json", action="store_true", help="print the results as JSON")


def run(options: argparse.Namespace, settings: Gateway) -> int:
    cases = load(options.file)
    key = given_key(options)
    if not key:
        raise ConfigError("evaluate: a key of scope inference is needed: --key-file or $CITADEL_GATEWAY_KEY")
    if options.concurrency < 1 or not 0 <= options.share <= 1:
        raise ConfigError("evaluate: --concurrency is at least 1, --pass is between 0 and 1")
    found = asyncio.run(ask_all(settings, options, key, cases))
    name = options.run_name or f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid4().hex[:6]}"
    if not options.no_record and not options.url:
        record(settings, name, options.file, found)
    return tell(name, found, options)


class Outcome(NamedTuple):
    """One prompt and what came of it."""

    case: Case
    verdict: str
    reason: str
    model: str = ""
    request_id: str = ""
    seconds: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0

    def sent(self) -> dict[str, Any]:
        """For the control process: what was wanted and what was missing, never the answer."""
        wanted = json.dumps({name: value for name in self.case.expect.__struct_fields__
                             if (value := getattr(self.case.expect, name)) not in ([], None, False)})  # fmt: skip
        fields = self._asdict()
        del fields["case"]
        return fields | {"name": self.case.name, "reason": self.reason[:KEPT], "expected": wanted[:KEPT]}


async def ask_all(settings: Gateway, options: argparse.Namespace, key: str, cases: Sequence[Case]) -> list[Outcome]:
    """A few at a time, in the order of the file; a line on standard error for each that is done."""
    from citadel_gateway.control.client import Client  # aiohttp is for this command alone

    client = Client(options.url.rstrip("/")) if options.url else Client.of(settings)
    turn = asyncio.Semaphore(options.concurrency)
    done = 0

    async def one(case: Case) -> Outcome:
        nonlocal done
        async with turn:
            found = await ask(client, key, case, options.model, options.timeout)
        done += 1
        note = f": {found.reason}" if found.reason else ""
        print(f"{done}/{len(cases)} {case.name}: {found.verdict}{note}", file=sys.stderr)
        return found

    async with client:
        return await asyncio.gather(*(one(case) for case in cases))


async def ask(client: Any, key: str, case: Case, model: str, timeout: float) -> Outcome:  # noqa: ASYNC109  # passed on
    """One prompt. A gateway that is busy says when to come again, and is asked again a few times."""
    from citadel_gateway.control.client import Unreachable

    body = {"max_tokens": TOKENS, "temperature": 0, **case.parameters, "messages": case.messages, "stream": False}
    body["model"] = case.model or model or "auto"
    headers = {"x-use-case": case.use_case} if case.use_case else {}
    started = time.monotonic()
    for tried in range(RETRIES + 1):
        try:
            async with (
                asyncio.timeout(timeout),
                client.ask("POST", "/v1/chat/completions", key, json.dumps(body).encode(), headers) as reply,
            ):
                answer = await reply.body()
        except (Unreachable, TimeoutError) as error:
            return Outcome(case, "incorrect", f"no answer: {error or 'timeout'}", seconds=time.monotonic() - started)
        wait = float(reply.headers.get("retry-after", "0") or 0)
        if reply.status not in (429, 503) or tried == RETRIES or not 0 < wait <= PATIENCE:
            break
        await asyncio.sleep(wait)
    return outcome_of(case, reply.status, reply.headers, answer, time.monotonic() - started)


def outcome_of(case: Case, status: int, headers: Any, answer: bytes, seconds: float) -> Outcome:
    request_id = headers.get("x-request-id", "")
    try:
        whole = json.loads(answer)
        if status != 200:
            reason = f"{status} {whole['error']['code']}: {whole['error']['message']}"
            return Outcome(case, "incorrect", reason, request_id=request_id, seconds=seconds)
        text = whole["choices"][0]["message"]["content"] or ""
        usage = whole.get("usage") or {}
        model = str(headers.get("x-citadel-model", "") or whole["model"])
    except (ValueError, KeyError, TypeError, IndexError):
        return Outcome(case, "incorrect", f"{status}: no chat completion", request_id=request_id, seconds=seconds)
    verdict, reason = judge(case.expect, text)
    tokens = (int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
    return Outcome(case, verdict, reason, model, request_id, seconds, *tokens)


def record(settings: Gateway, name: str, file: str, found: Sequence[Outcome]) -> None:
    """Hand the run to the control process, with the local key."""
    client = Local(settings, read_key(local_key_path(settings)))
    run = {"run": name, "file": Path(file).name[:256], "results": [one.sent() for one in found]}
    try:
        client.ask("POST", "/admin/evaluations", run)
    except Failed as error:
        raise Failed(f"the run is not kept: {error}") from None


def tell(name: str, found: Sequence[Outcome], options: argparse.Namespace) -> int:
    """The result on standard output; the exit status."""
    passed = sum(one.verdict == "correct" for one in found)
    tokens = sum(one.output_tokens for one in found)
    good = passed >= options.share * len(found)
    if options.as_json:
        whole = {"run": name, "prompts": len(found), "passed": passed, "results": [one.sent() for one in found]}
        print(json.dumps(whole, indent=2))
    else:
        for one in found:
            if one.verdict != "correct":
                print(f"{one.case.name}: {one.verdict}: {one.reason}")
        print(f"{name}: {passed} of {len(found)} passed, {tokens} tokens, {sum(one.seconds for one in found):.1f} s")
    return 0 if good else 1
