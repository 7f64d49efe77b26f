"""The arithmetic of one model, held against measured and published figures."""

from typing import Any

import pytest
from module_utils.capacity_model import (
    GIB,
    INT4,
    KIB,
    MIB,
    Architecture,
    Model,
    PlanError,
    activation_bytes,
    batch_rate,
    decode_rate,
    format_cpus,
    gib,
    instruction_set,
    kv_bytes_per_token,
    kv_context_bytes,
    memory_of,
    need_bytes,
    parse_cpus,
    parse_size,
    prefill_rate,
    required_flags,
    step_bytes,
    supported_quantisations,
    weights_bytes,
)

MIXTRAL = Architecture("moe", 46702792704, 32, 8, 128, 4096, 14336, 32000, 8, 2, 32768)
HERMES = Architecture("dense", 7241994240, 32, 8, 128, 4096, 14336, 32032, max_position_embeddings=32768)
OPENCHAT = Architecture("dense", 7241748480, 32, 8, 128, 4096, 14336, 32002, max_position_embeddings=8192)
PHI = Architecture("dense", 3821079552, 32, 32, 96, 3072, 8192, 32064, max_position_embeddings=4096)
ALL = {"mixtral": MIXTRAL, "hermes": HERMES, "openchat": OPENCHAT, "phi": PHI}

AVX2 = frozenset({"avx2"})
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
AVX512_BF16 = AVX512 | {"avx512_bf16"}
AMX = AVX512_BF16 | {"amx_tile", "amx_bf16", "amx_int8"}


@pytest.mark.parametrize("architecture", ALL.values(), ids=ALL)
def test_the_shape_adds_up_to_the_published_count(architecture: Architecture) -> None:
    assert architecture.shape_parameters == architecture.parameters


@pytest.mark.parametrize(
    ("name", "bf16", "int8", "int4"),
    [
        ("mixtral", 86.99, 43.76, 22.96),
        ("hermes", 13.49, 6.99, 3.87),
        ("openchat", 13.49, 6.99, 3.87),
        ("phi", 7.12, 3.74, 2.12),
    ],
)
def test_weights_in_gib(name: str, bf16: float, int8: float, int4: float) -> None:
    architecture = ALL[name]
    assert weights_bytes(architecture, "bf16") / GIB == pytest.approx(bf16, abs=0.006)
    assert weights_bytes(architecture, "w8a8") / GIB == pytest.approx(int8, abs=0.006)
    for quantisation in INT4:
        assert weights_bytes(architecture, quantisation) / GIB == pytest.approx(int4, abs=0.006)


@pytest.mark.parametrize(
    ("architecture", "quantisation", "file_gb"),
    [(OPENCHAT, "awq-int4", 4.15), (HERMES, "awq-int4", 4.15), (MIXTRAL, "awq-int4", 24.65), (OPENCHAT, "w8a8", 7.52)],
)
def test_weights_are_those_of_published_files(architecture: Architecture, quantisation: str, file_gb: float) -> None:
    assert weights_bytes(architecture, quantisation) / 1e9 == pytest.approx(file_gb, rel=0.004)


@pytest.mark.parametrize(
    ("architecture", "per_token_kib", "context", "full_gib"),
    [(MIXTRAL, 128, 32768, 4.0), (HERMES, 128, 8192, 1.0), (OPENCHAT, 128, 8192, 1.0), (PHI, 384, 4096, 1.5)],
)
def test_kv_cache(architecture: Architecture, per_token_kib: int, context: int, full_gib: float) -> None:
    assert kv_bytes_per_token(architecture) == per_token_kib * KIB
    assert kv_context_bytes(architecture, context) == full_gib * GIB
    assert kv_context_bytes(architecture, context, 3) == 3 * full_gib * GIB


@pytest.mark.parametrize(
    ("name", "context", "activation", "needs"),
    [
        ("mixtral", 32768, 1.5, {"bf16": 93.8, "w8a8": 50.6, "awq-int4": 29.8}),
        ("hermes", 8192, 0.3, {"bf16": 16.1, "w8a8": 9.6, "awq-int4": 6.5}),
        ("openchat", 8192, 0.3, {"bf16": 16.1, "w8a8": 9.6, "awq-int4": 6.5}),
        ("phi", 4096, 0.3, {"bf16": 10.3, "w8a8": 6.9, "awq-int4": 5.3}),
    ],
)
def test_smallest_need_for_one_full_request(
    name: str, context: int, activation: float, needs: dict[str, float]
) -> None:
    """A table made with tiny models, whose processes take 1.35 GiB."""
    for quantisation, expected in needs.items():
        weights = weights_bytes(ALL[name], quantisation)
        kv = kv_context_bytes(ALL[name], context)
        need = need_bytes(weights, kv, int(1.35 * GIB), int(activation * GIB))
        assert need / GIB == pytest.approx(expected, abs=0.06)


def test_activations_of_8k_batched_tokens_and_of_few() -> None:
    assert activation_bytes(MIXTRAL, 8192, 128) / GIB == pytest.approx(1.58, abs=0.01)
    assert activation_bytes(PHI, 256, 8) == int(0.3 * GIB)


@pytest.mark.parametrize(
    ("name", "gb"),
    [("mixtral", (25.5, 12.9, 6.8)), ("hermes", (14.2, 7.3, 3.9)), ("phi", (7.5, 3.8, 2.1))],
)
def test_bytes_read_for_a_token(name: str, gb: tuple[float, float, float]) -> None:
    for quantisation, expected in zip(("bf16", "w8a8", "awq-int4"), gb, strict=True):
        assert step_bytes(ALL[name], quantisation) / 1e9 == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize(
    ("architecture", "quantisation", "bandwidth", "measured"),
    [
        (PHI, "bf16", 13.1, 1.33),
        (PHI, "bf16", 22.9, 2.34),
        (PHI, "w8a8", 13.1, 2.48),
        (PHI, "w8a8", 22.9, 4.69),
        (PHI, "gptq-int4", 22.9, 6.73),
        (HERMES, "bf16", 22.9, 1.36),
        (HERMES, "w8a8", 22.9, 2.63),
    ],
)
def test_predicted_tokens_are_near_the_measured(
    architecture: Architecture, quantisation: str, bandwidth: float, measured: float
) -> None:
    assert decode_rate(architecture, quantisation, bandwidth) == pytest.approx(measured, rel=0.13)


@pytest.mark.parametrize(
    ("quantisation", "streams", "amx", "measured"),
    [
        ("bf16", 4, True, 9.53),
        ("bf16", 8, True, 18.5),
        ("w8a8", 4, True, 14.0),
        ("w8a8", 8, True, 33.3),
        ("gptq-int4", 4, True, 23.8),
        ("gptq-int4", 8, True, 29.8),
        ("bf16", 4, False, 8.77),
        ("bf16", 8, False, 12.6),
    ],
)
def test_predicted_batches_are_near_the_measured(quantisation: str, streams: int, amx: bool, measured: float) -> None:
    assert batch_rate(PHI, quantisation, 22.9, streams, amx=amx) == pytest.approx(measured, rel=0.13)


def test_a_batch_of_experts_gains_little() -> None:
    assert MIXTRAL.linear_parameters_of_a_step(1) == pytest.approx(12.6e9, rel=0.01)
    touched = (MIXTRAL.linear_parameters_of_a_step(4) - MIXTRAL.attention_parameters) / MIXTRAL.ffn_parameters * 8
    assert touched == pytest.approx(5.5, abs=0.05)
    dense, experts = (batch_rate(a, "bf16", 100, 8, amx=True) / decode_rate(a, "bf16", 100) for a in (HERMES, MIXTRAL))
    assert dense > 7
    assert experts < 2.5
    assert batch_rate(HERMES, "bf16", 100, 1, amx=True) == decode_rate(HERMES, "bf16", 100)
    assert batch_rate(HERMES, "bf16", 100, 99, amx=True) == batch_rate(HERMES, "bf16", 100, 8, amx=True)


def test_prefill_follows_the_instruction_set() -> None:
    assert prefill_rate(PHI, AMX, 2) == pytest.approx(160, rel=0.1)
    assert prefill_rate(PHI, AVX512_BF16, 2) == pytest.approx(26, rel=0.1)
    assert prefill_rate(PHI, AVX2, 2) == pytest.approx(4, rel=0.1)
    assert prefill_rate(PHI, frozenset(), 2) < prefill_rate(PHI, AVX2, 2)


@pytest.mark.parametrize(
    ("flags", "dense", "experts"),
    [
        (AVX2, {"bf16", "w8a8"}, {"bf16"}),
        (AVX512, {"bf16", "w8a8", *INT4}, {"bf16"}),
        (AVX512_BF16, {"bf16", "w8a8", *INT4}, {"bf16"}),
        (AMX, {"bf16", "w8a8", "fp8-block", *INT4}, {"bf16", "w8a8", "fp8-block", *INT4}),
        (frozenset(), set(), set()),
    ],
)
def test_what_each_instruction_set_can_serve(flags: frozenset[str], dense: set[str], experts: set[str]) -> None:
    assert set(supported_quantisations(flags, is_moe=False)) == dense
    assert set(supported_quantisations(flags, is_moe=True)) == experts


def test_instruction_sets_have_names() -> None:
    names = [instruction_set(flags) for flags in (AMX, AVX512_BF16, AVX512, AVX2, frozenset())]
    assert names == ["AMX", "AVX-512 with bf16, no AMX", "AVX-512, no AMX", "AVX2", "less than AVX2"]
    assert required_flags("awq-int4", is_moe=False) == frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})


@pytest.mark.parametrize(
    ("text", "value"),
    [("90G", 90 * GIB), ("64M", 64 * MIB), ("8.25G", 8 * GIB + 256 * MIB), ("1 GiB", GIB), ("512", 512), (7, 7)],
)
def test_sizes(text: str | int, value: int) -> None:
    assert parse_size(text) == value


@pytest.mark.parametrize("text", ["90X", "", "G", "-1G"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(PlanError, match="is not a size"):
        parse_size(text)


def test_cpu_lists() -> None:
    assert parse_cpus("0-3,8, 10") == (0, 1, 2, 3, 8, 10)
    assert parse_cpus("") == ()
    assert format_cpus([8, 0, 1, 2, 3, 10]) == "0-3,8,10"
    assert format_cpus([]) == ""
    with pytest.raises(PlanError, match="is not a CPU list"):
        parse_cpus("0-x")


ENTRY: dict[str, Any] = {
    "name": "tiny",
    "context": 1024,
    "architecture": {"layers": 2, "kv_heads": 2, "head_dim": 32, "hidden": 128, "ffn": 256, "vocab": 259},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": "long"}, "tiny: context must be a whole number, it is 'long'"),
        ({"architecture": {"layers": 2}}, "tiny: kv_heads must be a whole number, it is None"),
        ({"architecture": {"type": "sparse"}}, "tiny: architecture.type must be dense or moe, it is 'sparse'"),
        ({"quantisation": "int3"}, "tiny: quantisation 'int3' is unknown: use one of bf16"),
        ({"memory": "lots"}, "tiny: memory: 'lots' is not a size"),
        ({"cpus": "all"}, "tiny: cpus: 'all' is not a CPU list"),
    ],
)
def test_entries_that_cannot_be_read(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Model.of({**ENTRY, **change})


def test_an_unset_kv_cache_has_room_for_the_contexts_and_a_block() -> None:
    model = Model.of({**ENTRY, "full_context_requests": 2})
    per_token = kv_bytes_per_token(model.architecture)
    assert memory_of(model).kv == MIB * -(-per_token * (2 * 1024 + 128) // MIB)


def test_the_manifest_counts_once_there_is_one() -> None:
    model = Model.of(ENTRY, weights_bytes=123456)
    assert memory_of(model).weights == 123456
    assert memory_of(model, "w8a8").weights == weights_bytes(model.architecture, "w8a8")


def test_gib_for_people() -> None:
    assert gib(1.5 * GIB) == "1.50"
