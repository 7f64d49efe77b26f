"""Size and speed of one model: pure functions of its shape, its precision and the machine's instruction set.

Units: bytes (int), tokens a second (float), bandwidth in GB/s (10^9). Sizes that people write ("90G") are base 1024, as
systemd's. What is marked [measured] was fitted to runs of full-size models on an AMX machine and an AVX2 machine;
docs/models.md says what was run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

KIB, MIB, GIB = 1024, 1024**2, 1024**3

# ---- Quantisation ----

BF16 = "bf16"
INT4 = frozenset({"awq-int4", "gptq-int4", "ct-w4a16"})
# Stored bytes of one linear weight. int4 in groups of 128: 4 bits, and for each group a 2-byte scale and a 4-bit zero
# point. fp8 in blocks of 128 x 128 with a 4-byte scale. Embeddings, lm_head, norms and the router stay in bf16.
# Within 0.2 % of published checkpoints.
LINEAR_WEIGHT_BYTES: dict[str, float] = {
    BF16: 2.0,
    "w8a8": 1.0,
    "fp8-block": 1.0 + 4 / (128 * 128),
    **dict.fromkeys(INT4, 0.5 + 2 / 128 + 0.5 / 128),
}
QUANTISATIONS = tuple(LINEAR_WEIGHT_BYTES)

_AVX2 = frozenset({"avx2"})
_AVX512 = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})
_AMX = frozenset({"avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"})
AMX_FLAGS = _AMX

# ---- Memory besides weights and KV cache ----

# API server, engine core and worker, besides activations: 2.4 GiB with full-size bf16 and W8A8 models, 2.7 with int4
# [measured].
PROCESS_BYTES = int(2.4 * GIB)
PROCESS_BYTES_INT4 = int(2.7 * GIB)
ACTIVATION_FLOOR_BYTES = int(0.3 * GIB)
KV_BLOCK_TOKENS = 128  # block size of vLLM's CPU backend
# Headroom between need and limit: 5 % of what is estimated. Weights are constant once loaded (the high-water mark is
# the steady state [measured]): 1 % of them covers what a declared parameter count does not say.
HEADROOM = 0.05
HEADROOM_WEIGHTS = 0.01
# ---- Speed [measured] ----

CORE_BANDWIDTH_GB_S = 13.1  # read bandwidth of one core
BANDWIDTH_SHARE = {BF16: 0.75, "w8a8": 0.75, "fp8-block": 0.75}  # of the bandwidth that decoding reaches; int4: 0.6
BANDWIDTH_SHARE_INT4 = 0.6
PREFILL_TFLOPS_A_CORE = (("amx_tile", 0.60), ("avx512_bf16", 0.095), ("avx512f", 0.032), ("avx2", 0.015))


class PlanError(ValueError):
    """A value of a model entry or of the facts that cannot be read; the text says which and how to write it."""


# ---- Words ----

_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(?:i?B)?\s*")
_UNIT = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": 1024 * GIB}


def parse_size(value: str | int) -> int:
    """Bytes of "90G", "64M", "1.5G" or a plain number (base 1024, like systemd)."""
    if isinstance(value, int):
        return value
    found = _SIZE.fullmatch(value)
    if not found:
        raise PlanError(f"{value!r} is not a size: write 90G, 64M or 1.5G (base 1024)")
    return int(float(found[1]) * _UNIT[found[2]])


def gib(value: float) -> str:
    """Bytes as GiB with two decimals, for tables and sentences."""
    return f"{value / GIB:.2f}"


def parse_cpus(text: str) -> tuple[int, ...]:
    """CPU numbers of a list such as "0-3,8" (ascending, without doubles)."""
    numbers: set[int] = set()
    for part in filter(None, (p.strip() for p in text.split(","))):
        first, _, last = part.partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise PlanError(f"{text!r} is not a CPU list: write 0-3,8")
        numbers.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(numbers))


def format_cpus(numbers: Iterable[int]) -> str:
    """The shortest list text for CPU numbers: (0, 1, 2, 8) is "0-2,8"."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and runs[-1][1] == n - 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


# ---- Model ----


@dataclass(frozen=True)
class Architecture:
    """The shape of a model, as its config.json has it. `parameters` 0 means: computed from the shape."""

    type: str
    parameters: int
    layers: int
    kv_heads: int
    head_dim: int
    hidden: int
    ffn: int
    vocab: int
    experts: int = 0
    experts_per_token: int = 0
    max_position_embeddings: int = 0

    @property
    def is_moe(self) -> bool:
        return self.type == "moe"

    @property
    def embedding_parameters(self) -> int:
        """Input embedding and lm_head, both vocab x hidden."""
        return 2 * self.vocab * self.hidden

    @property
    def small_parameters(self) -> int:
        """Norms (two a layer and the last one) and the router of a mixture of experts: never quantised."""
        return (2 * self.layers + 1) * self.hidden + self.layers * self.experts * self.hidden

    @property
    def attention_parameters(self) -> int:
        """q and o (hidden x hidden), k and v (hidden x kv_heads * head_dim) of all layers."""
        return self.layers * (2 * self.hidden * self.hidden + 2 * self.hidden * self.kv_heads * self.head_dim)

    @property
    def ffn_parameters(self) -> int:
        """Three matrices hidden x ffn for each layer, for each expert if there are experts."""
        return self.layers * 3 * self.hidden * self.ffn * (self.experts or 1)

    @property
    def shape_parameters(self) -> int:
        """What the shape adds up to: exact for Mixtral, Mistral and Phi-3."""
        return self.embedding_parameters + self.small_parameters + self.attention_parameters + self.ffn_parameters

    @property
    def linear_parameters(self) -> int:
        """What a quantisation shrinks."""
        return (self.parameters or self.shape_parameters) - self.embedding_parameters - self.small_parameters

    @property
    def output_channels(self) -> int:
        """Rows of all linear matrices: W8A8 stores a scale for each."""
        attention = 2 * self.hidden + 2 * self.kv_heads * self.head_dim
        return self.layers * (attention + (self.experts or 1) * (2 * self.ffn + self.hidden))

    def linear_parameters_of_a_step(self, streams: int = 1) -> float:
        """Linear weights that a decoding step of `streams` tokens reads: of the experts only those that were chosen.

        With k of E experts a token, a step of B tokens touches E * (1 - (1 - k/E)^B) of them on average.
        """
        if not self.experts:
            return self.linear_parameters
        touched = 1 - (1 - self.experts_per_token / self.experts) ** streams
        return self.linear_parameters - self.ffn_parameters * (1 - touched)


@dataclass(frozen=True)
class Model:
    """One entry of llm_models, merged with the defaults, as far as the plan needs it."""

    name: str
    architecture: Architecture
    quantisation: str
    context: int
    full_context_requests: int
    memory: int  # bytes; 0 = what the plan computes
    kv_cache: int  # bytes; 0 = what the plan computes
    cores: int
    cpus: tuple[int, ...]
    max_num_seqs: int
    max_num_batched_tokens: int
    latency_ms: float
    requests_per_minute: float
    weights_bytes: int = 0  # from the manifest of the fetched revision; 0 = not fetched, take the declared parameters

    @staticmethod
    def of(entry: Mapping[str, Any], weights_bytes: int = 0) -> Model:
        """Read an entry; PlanError names the model and the key."""
        name = str(entry.get("name", "?"))

        def number(key: str, source: Mapping[str, Any], default: int | None = None) -> int:
            value = source.get(key, default)
            try:
                return int(value)
            except (TypeError, ValueError):
                raise PlanError(f"{name}: {key} must be a whole number, it is {value!r}") from None

        def size(key: str) -> int:
            try:
                return parse_size(entry.get(key) or 0)
            except PlanError as error:
                raise PlanError(f"{name}: {key}: {error}") from None

        shape = entry.get("architecture") or {}
        kind = shape.get("type", "dense")
        if kind not in {"dense", "moe"}:
            raise PlanError(f"{name}: architecture.type must be dense or moe, it is {kind!r}")
        architecture = Architecture(
            type=kind,
            parameters=number("parameters", shape, 0),
            layers=number("layers", shape),
            kv_heads=number("kv_heads", shape),
            head_dim=number("head_dim", shape),
            hidden=number("hidden", shape),
            ffn=number("ffn", shape),
            vocab=number("vocab", shape),
            experts=number("experts", shape, 0) if kind == "moe" else 0,
            experts_per_token=number("experts_per_token", shape, 0) if kind == "moe" else 0,
            max_position_embeddings=number("max_position_embeddings", shape, 0),
        )
        quantisation = str(entry.get("quantisation", BF16))
        if quantisation not in LINEAR_WEIGHT_BYTES:
            raise PlanError(f"{name}: quantisation {quantisation!r} is unknown: use one of {', '.join(QUANTISATIONS)}")
        try:
            cpus = parse_cpus(str(entry.get("cpus") or ""))
        except PlanError as error:
            raise PlanError(f"{name}: cpus: {error}") from None
        targets = entry.get("targets") or {}
        return Model(
            name=name,
            architecture=architecture,
            quantisation=quantisation,
            context=number("context", entry),
            full_context_requests=max(1, number("full_context_requests", entry, 1)),
            memory=size("memory"),
            kv_cache=size("kv_cache"),
            cores=len(cpus) or number("cores", entry, 1),
            cpus=cpus,
            max_num_seqs=number("max_num_seqs", entry, 128),
            max_num_batched_tokens=number("max_num_batched_tokens", entry, 2048),
            latency_ms=float(targets.get("latency_ms") or 0),
            requests_per_minute=float(targets.get("requests_per_minute") or 0),
            weights_bytes=weights_bytes,
        )


# ---- Memory of one model ----


def weights_bytes(architecture: Architecture, quantisation: str) -> int:
    """Bytes of the checkpoint (and of the loaded weights) at a precision, from the declared shape."""
    a = architecture
    scales = 2 * a.output_channels if quantisation == "w8a8" else 0
    rest = 2 * (a.embedding_parameters + a.small_parameters)
    return round(a.linear_parameters * LINEAR_WEIGHT_BYTES[quantisation]) + scales + rest


def kv_bytes_per_token(architecture: Architecture) -> int:
    """Keys and values of one token in bf16, all layers."""
    return 2 * architecture.layers * architecture.kv_heads * architecture.head_dim * 2


def kv_context_bytes(architecture: Architecture, context: int, requests: int = 1) -> int:
    """KV cache for `requests` requests that fill the whole context; vLLM refuses to start with less than one."""
    return kv_bytes_per_token(architecture) * context * max(1, requests)


def activation_bytes(architecture: Architecture, max_num_batched_tokens: int, max_num_seqs: int) -> int:
    """Working memory of one step: values of the batched tokens (bf16) and logits of the sequences (float32)."""
    a = architecture
    width = max(1, a.experts_per_token) * 3 * a.ffn + 4 * a.hidden
    return max(ACTIVATION_FLOOR_BYTES, max_num_batched_tokens * width * 2 + max_num_seqs * a.vocab * 4)


def process_bytes(quantisation: str) -> int:
    """Memory of the processes themselves; int4 keeps repacking buffers."""
    return PROCESS_BYTES_INT4 if quantisation in INT4 else PROCESS_BYTES


def need_bytes(weights: int, kv: int, processes: int, activation: int) -> int:
    """What one model holds when it is busy."""
    return weights + kv + processes + activation


def limit_bytes(weights: int, others: int) -> int:
    """The smallest limit that leaves headroom above the need."""
    return math.ceil(weights * (1 + HEADROOM_WEIGHTS) + others * (1 + HEADROOM))


@dataclass(frozen=True)
class Memory:
    """The memory of one model, in bytes."""

    weights: int
    kv: int
    processes: int
    activation: int

    @property
    def need(self) -> int:
        return need_bytes(self.weights, self.kv, self.processes, self.activation)

    @property
    def limit(self) -> int:
        return limit_bytes(self.weights, self.kv + self.processes + self.activation)


def memory_of(model: Model, quantisation: str = "") -> Memory:
    """Memory of a model, or of the same model at another precision.

    An unset KV cache gets the contexts asked for and one block more, since vLLM keeps one block to itself.
    """
    other = quantisation and quantisation != model.quantisation
    precision = quantisation or model.quantisation
    a = model.architecture
    spare = kv_bytes_per_token(a) * KV_BLOCK_TOKENS
    kv = model.kv_cache or kv_context_bytes(a, model.context, model.full_context_requests) + spare
    return Memory(
        weights=(0 if other else model.weights_bytes) or weights_bytes(a, precision),
        kv=math.ceil(kv / MIB) * MIB,
        processes=process_bytes(precision),
        activation=activation_bytes(a, model.max_num_batched_tokens, model.max_num_seqs),
    )


# ---- Instruction set ----


def required_flags(quantisation: str, *, is_moe: bool) -> frozenset[str]:
    """Flags of /proc/cpuinfo without which vLLM's CPU backend cannot serve this precision.

    Dense int4 without AVX-512 comes up healthy and dies at the first request; quantised experts and block FP8 refuse
    to load without AMX.
    """
    if quantisation == "fp8-block" or (is_moe and quantisation != BF16):
        return _AMX
    return _AVX512 if quantisation in INT4 else _AVX2


def instruction_set(flags: frozenset[str]) -> str:
    """The name people use for what the flags allow."""
    if flags >= _AMX:
        return "AMX"
    if flags >= _AVX512:
        return "AVX-512 with bf16, no AMX" if "avx512_bf16" in flags else "AVX-512, no AMX"
    return "AVX2" if flags >= _AVX2 else "less than AVX2"


def supported_quantisations(flags: frozenset[str], *, is_moe: bool) -> list[str]:
    return [q for q in QUANTISATIONS if required_flags(q, is_moe=is_moe) <= flags]


# ---- Speed ----


def step_bytes(architecture: Architecture, quantisation: str, streams: int = 1) -> float:
    """Bytes that one decoding step reads: the linear weights in use as stored, and lm_head in bf16."""
    linear = architecture.linear_parameters_of_a_step(streams) * LINEAR_WEIGHT_BYTES[quantisation]
    return linear + architecture.embedding_parameters  # half of them (lm_head) at two bytes


def decode_rate(architecture: Architecture, quantisation: str, bandwidth_gb_s: float) -> float:
    """Tokens a second of one stream: memory bandwidth is the bound."""
    share = BANDWIDTH_SHARE.get(quantisation, BANDWIDTH_SHARE_INT4)
    return share * bandwidth_gb_s * 1e9 / step_bytes(architecture, quantisation)


def batch_efficiency(quantisation: str, streams: int, *, amx: bool) -> float:
    """What of the ideal gain of a batch is left (measured at 4 and 8 streams)."""
    if streams <= 1:
        return 1.0
    at_four, at_eight = (0.93, 0.93) if amx else (0.95, 0.69)
    if quantisation in INT4:
        at_four, at_eight = 0.88, 0.55
    elif quantisation != BF16:
        at_four, at_eight = 0.75, 0.88
    return at_four if streams <= 4 else at_eight


def batch_rate(
    architecture: Architecture, quantisation: str, bandwidth_gb_s: float, streams: int, *, amx: bool
) -> float:
    """Tokens a second of `streams` streams together (up to 8: beyond it nothing was measured)."""
    n = max(1, min(8, streams))
    one = decode_rate(architecture, quantisation, bandwidth_gb_s)
    more_bytes = step_bytes(architecture, quantisation, n) / step_bytes(architecture, quantisation)
    return one * n / more_bytes * batch_efficiency(quantisation, n, amx=amx)


def prefill_rate(architecture: Architecture, flags: frozenset[str], threads: int) -> float:
    """Prompt tokens a second, from the arithmetic throughput of the instruction set."""
    tflops = next((rate for flag, rate in PREFILL_TFLOPS_A_CORE if flag in flags), 0.01)
    return tflops * threads * 1e12 / (2 * architecture.linear_parameters_of_a_step())
