"""The plan of a whole host: what is shipped fits, what cannot fit is refused with the arithmetic."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from module_utils.capacity import Settings, plan
from module_utils.capacity_cores import Host
from module_utils.capacity_model import GIB, PlanError

ROOT = Path(__file__).resolve().parent.parent.parent
PRODUCTION = ROOT / "inventory/production"
GROUP = PRODUCTION / "group_vars/llm_servers"


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def shipped(kind: str) -> list[dict[str, Any]]:
    """The entries of one of production's model files, merged as the wiring does."""
    defaults = load(PRODUCTION / "group_vars/all/models.yml")["llm_model_defaults"]
    shapes = load(GROUP / "host.yml")["llm_architectures"]
    entries = load(GROUP / f"models_{kind}.yml")[f"llm_models_{kind}"]
    for entry in entries:
        named = re.fullmatch(r"\{\{ llm_architectures\['(.+)'\] \}\}", entry["architecture"])
        assert named
        entry["architecture"] = shapes[named[1]]
    return [defaults | entry for entry in entries]


def facts(kind: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((PRODUCTION / f"facts/{kind}.json").read_text())
    return value


def tiny(name: str, cores: int = 2, **other: Any) -> dict[str, Any]:
    shape = {"layers": 2, "kv_heads": 2, "head_dim": 32, "hidden": 128, "ffn": 256, "vocab": 259}
    return {"name": name, "architecture": shape, "context": 1024, "cores": cores, **other}


def server(**other: Any) -> dict[str, Any]:
    flags = "avx2 avx512f avx512bw avx512dq avx512vl"
    return {"memory_bytes": "64G", "cores": 8, "cpu_flags": flags, "models_disk_free_bytes": "100G", **other}


# ---- What is shipped ----


@pytest.mark.parametrize("kind", ["amx", "avx512"])
def test_the_shipped_models_fit_the_given_server(kind: str) -> None:
    result = plan(shipped(kind), facts(kind))
    assert result["refusals"] == []
    assert result["fits"]
    assert result["totals"]["host_cores"] == 16
    assert result["totals"]["cores"] + result["totals"]["reserved_cores"] == 16
    cpus = [model["cpus"] for model in result["models"].values()]
    assert cpus == ["2-7", "8-10", "11-13", "14-15"]


def test_the_avx512_models_also_run_on_amx_and_not_the_other_way_round() -> None:
    assert plan(shipped("avx512"), facts("amx"))["fits"]
    (refusal,) = plan(shipped("amx"), facts("avx512"))["refusals"]
    assert refusal == (
        "mixtral-8x7b: awq-int4 for a mixture of experts needs the CPU flags amx_bf16, amx_int8, amx_tile, avx512_bf16,"
        " which this host (AVX-512, no AMX) lacks; set quantisation to one of bf16"
    )


@pytest.mark.parametrize("kind", ["amx", "avx512"])
def test_the_plan_documents_own_figures_are_refused_with_the_arithmetic(kind: str) -> None:
    result = plan(shipped("seed"), facts(kind))
    assert not result["fits"]
    mixtral, hermes, openchat, phi, cores = result["refusals"]
    assert mixtral.startswith("mixtral-8x7b: needs 96.24 GiB, memory allows 90.00: 6.24 GiB too little (weights 86.99")
    assert "(46.70 B parameters at bf16) + KV cache 4.02 + processes 2.40 + activations 1.56 = 94.97" in mixtral
    assert 'set memory: "97G"' in mixtral
    assert "quantisation: w8a8 (needs 10.96)" in hermes
    assert 'quantisation: awq-int4 with memory: "9G"' in openchat
    assert phi.startswith("phi-3-mini: needs 11.65 GiB, memory allows 4.00: 7.65 GiB too little")
    assert cores == (
        "cores: 8 + 4 + 4 + 2 = 18 for the models and 2 reserved make 20, this host has 16: 4 too many;"
        " lower cores of a model, or set llm_core_mode: shared"
    )
    assert "REFUSED" in result["table"]


def test_targets_that_memory_bandwidth_cannot_reach_are_said() -> None:
    warnings = plan(shipped("amx"), facts("amx"))["warnings"]
    assert any(line.startswith("phi-3-mini: an answer of 64 tokens takes 8.5 s at 7.6 tokens/s") for line in warnings)
    assert any(line.startswith("openchat-3.5: 120 requests/min of 64 tokens are 128 tokens/s") for line in warnings)
    assert any("one step of max_num_batched_tokens 8192" in w for w in plan(shipped("seed"), facts("amx"))["warnings"])


def test_the_labs_models_fit_a_small_machine_without_avx512() -> None:
    lab = load(ROOT / "inventory/lab/group_vars/all/models.yml")
    models = [lab["llm_model_defaults"] | entry for entry in lab["llm_models"]]
    settings = Settings(lab["llm_core_mode"], lab["llm_reserved_cores"], 4 * GIB)
    small = {"memory_bytes": "23G", "cores": 2, "cpu_flags": ["avx2"], "models_disk_free_bytes": "20G"}
    result = plan(models, small, settings)
    assert (result["fits"], result["warnings"]) == (True, [])
    assert {model["cpus"] for model in result["models"].values()} == {"0-1"}
    assert {model["omp_cpus"] for model in result["models"].values()} == {"nobind"}
    fifth = {**models[-1], "name": "fifth", "port": 11404}
    assert plan([*models, fifth], small, settings)["fits"]


def test_the_table_has_a_row_for_each_model_and_the_sums() -> None:
    lines = plan(shipped("amx"), facts("amx"))["table"].splitlines()
    assert [line.split()[0] for line in lines[2:6]] == ["mixtral-8x7b", "hermes-2", "openchat-3.5", "phi-3-mini"]
    assert "memory   85.00 models + 8.00 reserved = 93.00 of 125.00 GiB" in lines
    assert "cores    14 models + 2 reserved = 16 of 16" in lines
    assert lines[-1] == "verdict  fits"
    assert max(map(len, lines)) < 160


# ---- What is refused ----


def test_memory_of_all_models_together() -> None:
    (refusal,) = plan([tiny("a", memory="30G"), tiny("b", memory="30G")], server())["refusals"]
    assert refusal.startswith(
        "memory: 30.00 + 30.00 = 60.00 GiB for the models and 8.00 reserved make 68.00, this host has 64.00:"
        " 4.00 GiB too much;"
    )


def test_a_limit_that_is_not_given_is_computed() -> None:
    result = plan([tiny("a")], server())
    assert result["fits"]
    assert result["models"]["a"]["memory_max"] == 3 * GIB


def test_a_context_beyond_the_models_own() -> None:
    entry = tiny("a")
    entry["architecture"] = {**entry["architecture"], "max_position_embeddings": 512}
    (refusal,) = plan([entry], server())["refusals"]
    assert refusal == (
        "a: context 1024 is 512 tokens above what the model was made for (max_position_embeddings 512);"
        " set context: 512 or less"
    )


def test_a_kv_cache_below_one_full_context() -> None:
    (refusal,) = plan([tiny("a", context=4096, full_context_requests=2, kv_cache="1M")], server())["refusals"]
    assert refusal == (
        "a: kv_cache 0.00 GiB holds 2048 tokens, but 2 x 4096 tokens of 0.5 KiB need 0.00: 0.00 GiB too little;"
        ' set kv_cache: "4M", or context: 1024'
    )
    assert plan([tiny("a", context=4096, full_context_requests=2, kv_cache="4M")], server())["fits"]


def test_int4_without_avx512() -> None:
    (refusal,) = plan([tiny("a", quantisation="awq-int4")], server(cpu_flags=["avx2"]))["refusals"]
    assert refusal == (
        "a: awq-int4 for a dense model needs the CPU flags avx512bw, avx512dq, avx512f, avx512vl, which this host"
        " (AVX2) lacks; set quantisation to one of bf16, w8a8"
    )
    (refusal,) = plan([tiny("a")], server(cpu_flags=["sse2"]))["refusals"]
    assert refusal.endswith("use another host: vLLM needs AVX2")


def test_a_disk_too_small_for_what_is_still_to_be_fetched() -> None:
    entries = shipped("avx512")
    host = facts("avx512") | {"models_disk_free_bytes": "200G"}
    (refusal,) = plan(entries, host)["refusals"]
    assert refusal.startswith("disk: 86.99 + 3.87 + 3.87 + 2.12 GiB of weights to fetch (mixtral-8x7b, hermes-2,")
    assert "13.06 GiB too little" in refusal
    assert (
        plan(entries, host, manifests={"hermes-2": int(3.9 * GIB)})["models"]["hermes-2"]["weights_source"]
        == "manifest"
    )
    assert plan(entries, host, manifests={"hermes-2": int(3.9 * GIB), "phi-3-mini": 2 * GIB})["fits"]
    unknown = {key: value for key, value in host.items() if key != "models_disk_free_bytes"}
    assert "free space not known" in plan(entries, unknown)["table"]


def test_more_bytes_in_the_manifest_than_declared() -> None:
    (refusal,) = plan([tiny("a", memory="4G")], server(), manifests={"a": 2 * GIB})["refusals"]
    assert "weights 2.00 (bytes in the manifest)" in refusal


def test_a_smaller_context_is_proposed_where_it_would_do() -> None:
    (entry,) = [entry for entry in shipped("amx") if entry["name"] == "phi-3-mini"]
    (refusal,) = plan([entry | {"memory": "6G", "kv_cache": "", "full_context_requests": 1}], facts("amx"))["refusals"]
    proposed = re.search(r"context: (\d+) with kv_cache left empty", refusal)
    assert proposed
    smaller = {"memory": "6G", "kv_cache": "", "full_context_requests": 1, "context": int(proposed[1])}
    assert plan([entry | smaller], facts("amx"))["fits"]


def test_batched_tokens_below_the_sequences() -> None:
    (refusal,) = plan([tiny("a", max_num_seqs=64, max_num_batched_tokens=32)], server())["refusals"]
    assert refusal.endswith("which vLLM refuses; set max_num_batched_tokens: 64 or more")


def test_a_name_used_twice_and_values_that_cannot_be_read() -> None:
    result = plan([tiny("a"), tiny("a"), tiny("b", memory="lots")], server())
    assert result["refusals"] == [
        "b: memory: 'lots' is not a size: write 90G, 64M or 1.5G (base 1024)",
        "a: the name is used 2 times; give each model its own",
    ]


@pytest.mark.parametrize(
    ("host", "settings", "message"),
    [
        ({"cores": 4}, Settings(), "facts: memory_bytes, cpu_flags missing"),
        (server(), Settings("some"), "llm_core_mode must be dedicated or shared, it is 'some'"),
        (server(memory_bytes="much"), Settings(), "'much' is not a size: write 90G, 64M or 1.5G (base 1024)"),
    ],
)
def test_facts_and_settings_that_cannot_be_read(host: dict[str, Any], settings: Settings, message: str) -> None:
    result = plan([tiny("a")], host, settings)
    assert (result["fits"], result["refusals"], result["table"]) == (False, [message], "")


def test_a_parameter_count_that_contradicts_the_shape() -> None:
    entry = tiny("a")
    entry["architecture"] = {**entry["architecture"], "parameters": 10**9}
    assert any("architecture.parameters says 1.00 B" in line for line in plan([entry], server())["warnings"])


# ---- Cores ----


def cpus(result: dict[str, Any]) -> dict[str, str]:
    return {name: model["cpus"] for name, model in result["models"].items()}


def test_cores_of_models_that_run_are_never_moved() -> None:
    three = [tiny("a"), tiny("b"), tiny("c")]
    first = plan(three, server())
    assert cpus(first) == {"a": "2-3", "b": "4-5", "c": "6-7"}
    without_b = plan([three[0], tiny("b", state="absent"), three[2]], server(), allocated=cpus(first))
    assert cpus(without_b) == {"a": "2-3", "c": "6-7"}
    with_d = plan([tiny("d"), three[0], three[2]], server(), allocated={"a": "2-3", "c": "6-7"})
    assert cpus(with_d) == {"d": "4-5", "a": "2-3", "c": "6-7"}


def test_a_model_that_grows_or_shrinks_keeps_what_it_can() -> None:
    held = {"a": "2-3", "b": "4-5"}
    assert cpus(plan([tiny("a", 3), tiny("b")], server(), allocated=held)) == {"a": "2-3,6", "b": "4-5"}
    assert cpus(plan([tiny("a", 1), tiny("b")], server(), allocated=held)) == {"a": "2", "b": "4-5"}


def test_leaving_shared_mode_gives_each_its_own() -> None:
    held = {"a": "0-7", "b": "0-7"}
    assert cpus(plan([tiny("a"), tiny("b")], server(), allocated=held)) == {"a": "2-3", "b": "4-5"}


def test_cores_of_a_model_that_is_not_in_the_inventory_are_taken() -> None:
    result = plan([tiny("a", 4)], server(), allocated={"stranger": "2-3"})
    assert cpus(result) == {"a": "4-7"}
    (refusal,) = plan([tiny("a", 5)], server(), allocated={"stranger": "2-3"})["refusals"]
    assert refusal.startswith("cores: 5 = 5 for the models, 2 of models that are not in the inventory and 2 reserved")


def test_the_last_of_three_cores_is_for_what_does_not_compute() -> None:
    result = plan([tiny("a", 3), tiny("b", 2)], server())["models"]
    assert (result["a"]["cpus"], result["a"]["omp_cpus"], result["a"]["threads"]) == ("2-4", "2-3", 2)
    assert (result["b"]["cpus"], result["b"]["omp_cpus"], result["b"]["threads"]) == ("5-6", "5-6", 2)


def test_hyper_threads_belong_to_their_core() -> None:
    result = plan([tiny("a", 3), tiny("b", 3)], server(threads_per_core=2))["models"]
    assert (result["a"]["cpus"], result["a"]["omp_cpus"], result["a"]["threads"]) == ("2-4,10-12", "2-4", 3)
    assert result["b"]["cpus"] == "5-7,13-15"


def test_a_model_stays_inside_a_memory_node() -> None:
    numa = [{"cpus": "0-3", "memory_bytes": "32G"}, {"cpus": "4-7", "memory_bytes": "32G"}]
    result = plan([tiny("a", 3), tiny("b", 2)], server(numa=numa))
    assert cpus(result) == {"a": "4-6", "b": "2-3"}
    assert [model["numa_node"] for model in result["models"].values()] == [1, 0]
    spread = plan([tiny("a", 6, memory="40G")], server(numa=numa))
    assert any("lie in several memory nodes" in line for line in spread["warnings"])
    full = plan([tiny("a", 3, memory="40G")], server(numa=numa))
    assert "memory node 1: its models may use 40.00 GiB, it has 32.00" in full["warnings"][0]


def test_explicit_cpus() -> None:
    result = plan([tiny("a", cpus="0-2"), tiny("b", 2)], server())
    assert cpus(result) == {"a": "0-2", "b": "3-4"}
    assert result["models"]["a"]["omp_cpus"] == "0-1"
    refusals = plan([tiny("a", cpus="0-2"), tiny("b", cpus="2-3"), tiny("c", cpus="9")], server())["refusals"]
    assert refusals == [
        "b: cpus 2-3 shares the core of CPU 2 with a; give each model cores of its own in cpus, or leave cpus empty",
        "c: cpus names CPU 9, this host has 0-7: correct cpus",
    ]
    shared = plan([tiny("a", cpus="1"), tiny("c", cpus="9")], server(), Settings("shared"))
    assert shared["refusals"] == ["c: cpus names CPU 9, this host has 0-7: correct cpus"]
    assert cpus(shared)["a"] == "1"


def test_explicit_cpus_of_a_hyper_thread_take_the_whole_core() -> None:
    refusals = plan([tiny("a", cpus="2"), tiny("b", cpus="10")], server(threads_per_core=2))["refusals"]
    assert refusals[0].startswith("b: cpus 10 shares the core of CPU 2,10 with a")


def test_an_allocation_that_cannot_be_read() -> None:
    assert plan([tiny("a")], server(), allocated={"a": "x"})["refusals"] == ["'x' is not a CPU list: write 0-3,8"]


def test_bandwidth_is_shared_when_all_are_busy() -> None:
    models = [tiny("a", 2), tiny("b", 4)]
    model = plan(models, server(memory_bandwidth_gb_s=30))["models"]["a"]
    assert model["predicted_tokens_per_second_all_busy"] < model["predicted_tokens_per_second"]
    assumed = Host.of(server())
    assert assumed.bandwidth(2) == pytest.approx(26.2)
    with pytest.raises(PlanError, match="cores missing"):
        Host.of(server(cores=0))
