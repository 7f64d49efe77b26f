"""What a role asks about model entries before it changes anything."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

# Settings of vLLM that a key of the model entry, or the role itself, decides.
MANAGED = {
    "model": "source",
    "served-model-name": "name and aliases",
    "port": "port",
    "dtype": "dtype",
    "max-model-len": "context",
    "max-num-seqs": "max_num_seqs",
    "max-num-batched-tokens": "max_num_batched_tokens",
    "max-num-queued-reqs": "max_queued_requests",
    "enable-prefix-caching": "prefix_caching",
    "enforce-eager": "enforce_eager",
    "kv-cache-memory-bytes": "kv_cache",
    "override-generation-config": "sampling",
    "chat-template": "chat_template",
    "tool-call-parser": "tool_call_parser",
    "enable-auto-tool-choice": "tool_call_parser",
    "shutdown-timeout": "drain_timeout",
    "host": "nothing: engines listen on 127.0.0.1, the gateway serves others",
    "uds": "nothing: engines listen on 127.0.0.1, the gateway serves others",
    "config": "nothing: the role writes it",
    "api-key": "nothing: the key is a file, never an argument",
    "disable-uvicorn-access-log": "nothing: the gateway logs requests",
    "disable-fastapi-docs": "nothing: only the gateway reaches an engine",
    "enable-log-requests": "nothing: prompts are not logged",
    "enable-log-outputs": "nothing: answers are not logged",
    "gpu-memory-utilization": "kv_cache, in bytes: a share of the whole host is not seen by the memory limit",
    "trust-remote-code": "nothing: code of a model's repository is not run",
}
NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}")


def engine_problems(models: Sequence[Mapping[str, Any]], taken: Mapping[int, str]) -> list[str]:
    """A sentence for each entry that fits no host; ``taken``: ports of the platform that are no model's."""
    found: list[str] = []
    present = [model for model in models if model.get("state", "present") == "present"]
    owners: dict[str, str] = {}
    for model in models:
        name = str(model.get("name", ""))
        if not NAME.fullmatch(name):
            found.append(
                f"name {name!r}: use lower-case letters, digits, dots and dashes: it names the unit and the folders"
            )
    for model in present:
        name = model["name"]
        found += [
            f"{name}: {word!r} is a name or alias of {owners[word]} already; give each its own"
            for word in (name, *model.get("aliases", []))
            if owners.setdefault(word, name) != name
        ]
        for setting in model.get("extra_args", {}):
            plain = str(setting).lstrip("-").replace("_", "-").removeprefix("no-")
            if plain in MANAGED:
                found.append(f"{name}: extra_args has {setting}, which is decided by {MANAGED[plain]}; remove it there")
        if (other := taken.get(int(model["port"]))) is not None:
            found.append(f"{name}: port {model['port']} is {other}'s; choose another port for the model")
    counts: dict[str, int] = {}
    for model in models:
        counts[str(model.get("name"))] = counts.get(str(model.get("name")), 0) + 1
    found += [f"{name}: the name is used {n} times; give each model its own" for name, n in counts.items() if n > 1]
    ports: dict[int, list[str]] = {}
    for model in present:
        ports.setdefault(int(model["port"]), []).append(model["name"])
    found += [f"port {port}: used by {' and '.join(n)}; give each its own" for port, n in ports.items() if len(n) > 1]
    return found


def engine_unknown_settings(models: Sequence[Mapping[str, Any]], known: Mapping[str, Any]) -> list[str]:
    """A sentence for each of ``extra_args`` that the vLLM of the environment does not have."""
    found = []
    for model in models:
        for setting in model.get("extra_args", {}):
            plain = str(setting).lstrip("-").replace("_", "-")
            if plain not in known["settings"]:
                near = difflib.get_close_matches(plain, known["settings"], 1)
                hint = f" (it has {near[0]})" if near else ""
                found.append(
                    f"{model['name']}: vLLM {known['version']} has no setting {setting}{hint}; correct extra_args"
                )
    return found


def engine_taken_ports(sockets: Sequence[str], models: Sequence[Mapping[str, Any]], uid: int) -> list[str]:
    """A sentence for each model's port on which somebody else listens; ``sockets``: lines of ``ss -Hltnpe``."""
    found = []
    for line in sockets:
        fields = line.split()
        port = int(fields[3].rsplit(":", 1)[1])
        owner = int(match[1]) if (match := re.search(r"\buid:(\d+)", line)) else 0
        for model in models:
            if int(model["port"]) == port and owner != uid:
                program = (
                    match[1] if (match := re.search(r'users:\(\("([^"]+)"', line)) else f"a process of uid {owner}"
                )
                found.append(f"{model['name']}: port {port} is taken by {program}; stop it, or choose another port")
    return sorted(set(found))


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {
            "engine_problems": engine_problems,
            "engine_taken_ports": engine_taken_ports,
            "engine_unknown_settings": engine_unknown_settings,
        }
