"""The capacity plan: do these models fit on this host, and what may each of them use?

Pure functions, no I/O. `plan()` takes the model entries of the inventory and the facts of one host and returns limits,
core lists, predicted speed, and one sentence for everything that does not fit. The arithmetic of one model is in
`capacity_model`, hosts and cores are in `capacity_cores`, `capacity_host` reads the facts of the host it runs on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .capacity_cores import Cores, Host, allocate_cores, shared_cores
from .capacity_model import (
    AMX_FLAGS,
    CORE_BANDWIDTH_GB_S,
    GIB,
    HEADROOM,
    HEADROOM_WEIGHTS,
    INT4,
    KIB,
    KV_BLOCK_TOKENS,
    MIB,
    Memory,
    Model,
    PlanError,
    batch_rate,
    decode_rate,
    gib,
    instruction_set,
    kv_bytes_per_token,
    kv_context_bytes,
    memory_of,
    parse_cpus,
    prefill_rate,
    required_flags,
    supported_quantisations,
)

# Free disk for each model that is still to be fetched, in multiples of its weights: this revision, and later the next
# one beside it.
DISK_FACTOR = 2.2
# One prefill step longer than this holds up every other stream of the model for too long.
STEP_SECONDS = 10.0


@dataclass(frozen=True)
class Settings:
    """What the operator decides for the host as a whole."""

    core_mode: str = "dedicated"  # dedicated: disjoint core sets; shared: every model may use every CPU
    reserved_cores: int = 2
    reserved_memory: int = 8 * GIB
    target_output_tokens: int = 64  # the length of answer that the latency and throughput targets are held against


def plan(
    entries: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any],
    settings: Settings | None = None,
    allocated: Mapping[str, str] | None = None,
    manifests: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The plan of one host.

    entries: llm_models, merged with their defaults; those with `state: absent` are left out. facts: see `Host.of`.
    allocated: the CPU lists that models on the host have now. manifests: bytes of the fetched weights, by model.

    Returns `fits`, `refusals` and `warnings` (sentences), `models` (by name, see `_result`), `totals` and `table`.
    Nothing in `models` may be used while `refusals` is not empty.
    """
    settings = settings or Settings()
    refusals: list[str] = []
    present = [entry for entry in entries if entry.get("state", "present") != "absent"]
    absent = {str(entry.get("name")) for entry in entries} - {str(entry.get("name")) for entry in present}
    models: list[Model] = []
    for entry in present:
        try:
            models.append(Model.of(entry, int((manifests or {}).get(str(entry.get("name")), 0))))
        except PlanError as error:
            refusals.append(str(error))
    try:
        if settings.core_mode not in {"dedicated", "shared"}:
            raise PlanError(f"llm_core_mode must be dedicated or shared, it is {settings.core_mode!r}")
        host = Host.of(facts)
        held = {name: text for name, text in (allocated or {}).items() if name not in absent and parse_cpus(text)}
    except PlanError as error:
        refusals.append(str(error))
        return {"fits": False, "refusals": refusals, "warnings": [], "models": {}, "totals": {}, "table": ""}

    refusals += _doubles(models)
    memory = {model.name: memory_of(model) for model in models}
    for model in models:
        refusals += _model_refusals(model, memory[model.name], host)
    if settings.core_mode == "shared":
        cores, core_refusals = shared_cores(models, host)
    else:
        cores, core_refusals = allocate_cores(models, host, settings.reserved_cores, held)
    refusals += core_refusals
    limits = {model.name: limit_of(model, memory[model.name]) for model in models}
    refusals += _memory_sum_refusals(limits, settings, host)
    disk_need, disk_refusals = _disk(models, memory, host)
    refusals += disk_refusals

    computing = sum(own.threads for own in cores.values())
    speeds = {model.name: _speed(model, host, cores.get(model.name), computing) for model in models}
    warnings = [line for model in models for line in _model_warnings(model, speeds[model.name], settings)]
    result = {
        model.name: _result(model, memory[model.name], limits[model.name], cores.get(model.name), speeds[model.name])
        for model in models
    }
    if settings.core_mode == "dedicated":
        warnings += _node_warnings(result, host)
    totals = {
        "memory_bytes": sum(limits.values()),
        "reserved_memory_bytes": settings.reserved_memory,
        "host_memory_bytes": host.memory_bytes,
        "cores": sum(model.cores for model in models),
        "reserved_cores": settings.reserved_cores,
        "host_cores": len(host.cores),
        "disk_bytes": disk_need,
        "disk_free_bytes": host.disk_free_bytes,
        "instruction_set": instruction_set(host.flags),
        "bandwidth_gb_s": round(host.bandwidth(len(host.cores)), 1),
        "bandwidth_known": bool(host.bandwidth_gb_s),
    }
    return {
        "fits": not refusals,
        "refusals": refusals,
        "warnings": warnings,
        "models": result,
        "totals": totals,
        "table": table(models, result, totals, settings, refusals),
    }


def limit_of(model: Model, memory: Memory) -> int:
    """The memory limit of a model: what the entry says, else the smallest sufficient whole GiB."""
    return model.memory or math.ceil(memory.limit / GIB) * GIB


def _result(model: Model, memory: Memory, limit: int, cores: Cores | None, speed: Speed) -> dict[str, Any]:
    return {
        "memory_max": limit,
        "kv_cache_bytes": memory.kv,
        "kv_cache_tokens": memory.kv // kv_bytes_per_token(model.architecture),
        "cpus": cores.cpus if cores else "",
        "omp_cpus": cores.omp_cpus if cores else "",
        "threads": cores.threads if cores else model.cores,
        "numa_node": cores.node if cores else None,
        "need_bytes": memory.need,
        "needed_limit_bytes": memory.limit,
        "weights_bytes": memory.weights,
        "weights_source": "manifest" if model.weights_bytes else "declared",
        "process_bytes": memory.processes,
        "activation_bytes": memory.activation,
        "predicted_tokens_per_second": round(speed.alone, 2),
        "predicted_tokens_per_second_all_busy": round(speed.all_busy, 2),
        "predicted_tokens_per_second_batch": round(speed.batch, 2),
        "predicted_prefill_tokens_per_second": round(speed.prefill, 1),
    }


# ---- Refusals ----


def _doubles(models: Sequence[Model]) -> list[str]:
    """Names that two entries share: the plan is by name."""
    names = [model.name for model in models]
    return [
        f"{name}: the name is used {names.count(name)} times; give each model its own"
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]


def _model_refusals(model: Model, memory: Memory, host: Host) -> list[str]:
    """What is wrong with one model on this host, whatever the others do."""
    a, name = model.architecture, model.name
    found: list[str] = []
    lacking = required_flags(model.quantisation, is_moe=a.is_moe) - host.flags
    if lacking:
        able = supported_quantisations(host.flags, is_moe=a.is_moe)
        cure = f"set quantisation to one of {', '.join(able)}" if able else "use another host: vLLM needs AVX2"
        found.append(
            f"{name}: {model.quantisation} for a {'mixture of experts' if a.is_moe else 'dense model'} needs the CPU"
            f" flags {', '.join(sorted(lacking))}, which this host ({instruction_set(host.flags)}) lacks; {cure}"
        )
    if 0 < a.max_position_embeddings < model.context:
        found.append(
            f"{name}: context {model.context} is {model.context - a.max_position_embeddings} tokens above what the"
            f" model was made for (max_position_embeddings {a.max_position_embeddings});"
            f" set context: {a.max_position_embeddings} or less"
        )
    per_token = kv_bytes_per_token(a)
    full = kv_context_bytes(a, model.context, model.full_context_requests)
    if model.kv_cache and model.kv_cache < full:
        tokens = model.kv_cache // per_token
        found.append(
            f"{name}: kv_cache {gib(model.kv_cache)} GiB holds {tokens} tokens, but {model.full_context_requests} x"
            f" {model.context} tokens of {per_token / KIB:g} KiB need {gib(full)}: {gib(full - model.kv_cache)} GiB too"
            f' little; set kv_cache: "{math.ceil(full / MIB)}M",'
            f" or context: {max(1, tokens // model.full_context_requests)}"
        )
    if model.max_num_batched_tokens < model.max_num_seqs:
        found.append(
            f"{name}: max_num_batched_tokens {model.max_num_batched_tokens} is below max_num_seqs {model.max_num_seqs},"
            f" which vLLM refuses; set max_num_batched_tokens: {model.max_num_seqs} or more"
        )
    if model.memory and memory.limit > model.memory:
        found.append(_memory_refusal(model, memory, host))
    return found


def _memory_refusal(model: Model, memory: Memory, host: Host) -> str:
    """One model above its limit: the sum, and what would make it fit."""
    a = model.architecture
    if model.weights_bytes:
        origin = "bytes in the manifest"
    else:
        origin = f"{(a.parameters or a.shape_parameters) / 1e9:.2f} B parameters at {model.quantisation}"
    cures = [f'memory: "{math.ceil(memory.limit / GIB)}G"']
    others = [
        (memory_of(model, q).limit, q)
        for q in supported_quantisations(host.flags, is_moe=a.is_moe)
        if q not in INT4 or q == "awq-int4"  # the int4 formats weigh the same: name the usual one
    ]
    fitting = [(limit, q) for limit, q in sorted(others, reverse=True) if limit <= model.memory]
    if fitting:
        cures.append(f"quantisation: {fitting[0][1]} (needs {gib(fitting[0][0])})")
    elif others and min(others)[0] < memory.limit:
        cures.append(f'quantisation: {min(others)[1]} with memory: "{math.ceil(min(others)[0] / GIB)}G"')
    # What the limit leaves for the KV cache, in whole blocks besides the spare one.
    fixed = memory.weights * (1 + HEADROOM_WEIGHTS) + (memory.processes + memory.activation) * (1 + HEADROOM)
    blocks = int((model.memory - fixed) / (1 + HEADROOM) / kv_bytes_per_token(a)) // KV_BLOCK_TOKENS - 1
    if blocks >= 1:
        tokens = min(blocks * KV_BLOCK_TOKENS // model.full_context_requests, model.context)
        cures.append(f"context: {tokens} with kv_cache left empty")
    return (
        f"{model.name}: needs {gib(memory.limit)} GiB, memory allows {gib(model.memory)}:"
        f" {gib(memory.limit - model.memory)} GiB too little (weights {gib(memory.weights)} ({origin})"
        f" + KV cache {gib(memory.kv)} + processes {gib(memory.processes)} + activations {gib(memory.activation)}"
        f" = {gib(memory.need)}, with headroom {gib(memory.limit)}); set {', or '.join(cures)}"
    )


def _memory_sum_refusals(limits: Mapping[str, int], settings: Settings, host: Host) -> list[str]:
    total = sum(limits.values())
    over = total + settings.reserved_memory - host.memory_bytes
    if over <= 0:
        return []
    return [
        (
            f"memory: {' + '.join(map(gib, limits.values()))} = {gib(total)} GiB for the models and"
            f" {gib(settings.reserved_memory)} reserved make {gib(total + settings.reserved_memory)}, this host has"
            f" {gib(host.memory_bytes)}: {gib(over)} GiB too much; lower memory of a model (with kv_cache, context or"
            f" quantisation), or llm_reserved_memory"
        )
    ]


def _disk(models: Sequence[Model], memory: Mapping[str, Memory], host: Host) -> tuple[int, list[str]]:
    """Bytes of disk that the models still to be fetched need, and the refusal if there are fewer."""
    fetch = {model.name: memory[model.name].weights for model in models if not model.weights_bytes}
    need = math.ceil(DISK_FACTOR * sum(fetch.values()))
    if host.disk_free_bytes is None or need <= host.disk_free_bytes:
        return need, []
    return need, [
        (
            f"disk: {' + '.join(map(gib, fetch.values()))} GiB of weights to fetch ({', '.join(fetch)}) and room for a"
            f" next revision (x {DISK_FACTOR}) need {gib(need)}, {gib(host.disk_free_bytes)} are free:"
            f" {gib(need - host.disk_free_bytes)} GiB too little; enlarge the file system of platform_models_dir,"
            f" or remove revisions that are no longer used"
        )
    ]


# ---- Speed ----


@dataclass(frozen=True)
class Speed:
    """Predicted tokens a second of one model."""

    alone: float  # one stream, no other model at work
    all_busy: float  # one stream, every model decoding
    batch: float  # up to eight streams together
    prefill: float  # prompt tokens


def _speed(model: Model, host: Host, cores: Cores | None, computing: int) -> Speed:
    """`computing`: threads of all models together, among which the host's bandwidth is shared when all are busy."""
    a, q = model.architecture, model.quantisation
    threads = cores.threads if cores else model.cores
    alone = host.bandwidth(threads)
    shared = min(alone, host.bandwidth(len(host.cores)) * threads / max(1, computing))
    return Speed(
        alone=decode_rate(a, q, alone),
        all_busy=decode_rate(a, q, shared),
        batch=batch_rate(a, q, alone, model.max_num_seqs, amx=host.flags >= AMX_FLAGS),
        prefill=prefill_rate(a, host.flags, threads),
    )


def _model_warnings(model: Model, speed: Speed, settings: Settings) -> list[str]:
    """Targets out of reach, a step that stalls the others, a parameter count that contradicts the shape."""
    found = []
    a, name, tokens = model.architecture, model.name, settings.target_output_tokens
    target = model.latency_ms / 1000
    if target and tokens / speed.alone > target:
        found.append(
            f"{name}: an answer of {tokens} tokens takes {tokens / speed.alone:.1f} s at {speed.alone:.1f} tokens/s,"
            f" even alone and without the prompt; the target of {target:g} s holds for"
            f" {int(speed.alone * target)} tokens, or with {tokens / speed.alone / target:.1f} times the bandwidth"
            f" (more cores, fewer bits a weight)"
        )
    elif target and tokens / speed.all_busy > target:
        found.append(
            f"{name}: an answer of {tokens} tokens takes {tokens / speed.all_busy:.1f} s while all models are busy"
            f" ({speed.all_busy:.1f} tokens/s), the target is {target:g} s"
        )
    wanted = model.requests_per_minute * tokens / 60
    if wanted > speed.batch:
        found.append(
            f"{name}: {model.requests_per_minute:g} requests/min of {tokens} tokens are {wanted:.0f} tokens/s, a batch"
            f" of {min(8, model.max_num_seqs)} is predicted at {speed.batch:.0f}: expect"
            f" {speed.batch * 60 / tokens:.0f} requests/min"
        )
    step = model.max_num_batched_tokens / speed.prefill
    if step > STEP_SECONDS:
        bearable = max(model.max_num_seqs, int(speed.prefill * STEP_SECONDS))
        found.append(
            f"{name}: one step of max_num_batched_tokens {model.max_num_batched_tokens} is {step:.0f} s of prefill and"
            f" holds up the model's other streams so long; {bearable} tokens would take"
            f" {bearable / speed.prefill:.0f} s"
        )
    if a.parameters and abs(a.parameters / a.shape_parameters - 1) > 0.05:
        found.append(
            f"{name}: architecture.parameters says {a.parameters / 1e9:.2f} B, its shape adds up to"
            f" {a.shape_parameters / 1e9:.2f} B: correct whichever is wrong"
        )
    return found


def _node_warnings(result: Mapping[str, Mapping[str, Any]], host: Host) -> list[str]:
    """Models whose cores or memory reach over memory nodes."""
    if len({core.node for core in host.cores}) < 2:
        return []
    found = [
        f"{name}: its cores {m['cpus']} lie in several memory nodes, which slows decoding; lower cores or set cpus"
        for name, m in result.items()
        if m["cpus"] and m["numa_node"] is None
    ]
    for node, memory in host.node_memory_bytes.items():
        used = sum(m["memory_max"] for m in result.values() if m["numa_node"] == node)
        if used > memory:
            found.append(
                f"memory node {node}: its models may use {gib(used)} GiB, it has {gib(memory)}: the rest lies in"
                f" another node, which slows decoding"
            )
    return found


# ---- Table ----

COLUMNS = (
    ("model", str.ljust),
    ("precision", str.ljust),
    ("weights", str.rjust),
    ("from", str.ljust),
    ("KV cache", str.rjust),
    ("process", str.rjust),
    ("activ.", str.rjust),
    ("needs", str.rjust),
    ("limit", str.rjust),
    ("cores", str.rjust),
    ("CPUs", str.ljust),
    ("tok/s alone", str.rjust),
    ("all busy", str.rjust),
    ("batch", str.rjust),
)


def table(
    models: Sequence[Model],
    result: Mapping[str, Mapping[str, Any]],
    totals: Mapping[str, Any],
    settings: Settings,
    refusals: Sequence[str],
) -> str:
    """The plan for people: a row a model (sizes in GiB), then what the host has of each."""
    rows = [[title for title, _ in COLUMNS]]
    for model in models:
        m = result[model.name]
        sizes = [gib(m[key]) for key in ("kv_cache_bytes", "process_bytes", "activation_bytes", "needed_limit_bytes")]
        rates = [f"{m[f'predicted_tokens_per_second{kind}']:.1f}" for kind in ("", "_all_busy", "_batch")]
        weights = [gib(m["weights_bytes"]), m["weights_source"]]
        cores = [gib(m["memory_max"]), str(model.cores), m["cpus"] or "-"]
        rows.append([model.name, model.quantisation, *weights, *sizes, *cores, *rates])
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = [
        "  ".join(align(cell, width) for (_, align), cell, width in zip(COLUMNS, row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    t = totals
    used = t["memory_bytes"] + t["reserved_memory_bytes"]
    memory_used = f"{gib(t['memory_bytes'])} models + {gib(t['reserved_memory_bytes'])} reserved = {gib(used)}"
    disk = "free space not known" if t["disk_free_bytes"] is None else f"{gib(t['disk_free_bytes'])} free"
    assumed = "" if t["bandwidth_known"] else f" (assumed, {CORE_BANDWIDTH_GB_S} a core)"
    cores_used = f"{t['cores']} models + {t['reserved_cores']} reserved = {t['cores'] + t['reserved_cores']}"
    cores_used += f" of {t['host_cores']}"
    shared = f"shared: every model may use all {t['host_cores']}"
    return "\n".join(
        [
            *lines,
            "",
            f"memory   {memory_used} of {gib(t['host_memory_bytes'])} GiB",
            f"cores    {shared if settings.core_mode == 'shared' else cores_used}",
            f"disk     {gib(t['disk_bytes'])} GiB for what is still to be fetched, {disk}",
            f"CPU      {t['instruction_set']}; memory bandwidth {t['bandwidth_gb_s']} GB/s{assumed}",
            f"verdict  {'REFUSED' if refusals else 'fits'}",
        ]
    )
