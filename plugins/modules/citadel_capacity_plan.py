#!/usr/bin/python
"""Compute whether the models fit on a host, and what each of them may use."""

from __future__ import annotations

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.capacity import Settings, plan
from ansible.module_utils.capacity_host import read_allocated, read_facts
from ansible.module_utils.capacity_model import PlanError, parse_size
from ansible.module_utils.model_files import look

DOCUMENTATION = r"""
module: citadel_capacity_plan
short_description: Compute whether the models fit on a host, and what each of them may use
description:
  - Weights at the chosen precision, KV cache, processes and activations against the limits and the host's memory;
    cores, disk, instruction set and context length. What does not fit is one sentence in C(refusals), with the
    arithmetic and the setting that would fix it.
  - Changes nothing and never reports a change, in check mode or not.
  - Before a model is fetched its declared architecture counts, afterwards the bytes in its manifest.
options:
  models:
    description: Model entries, merged with their defaults.
    type: list
    elements: dict
    required: true
  facts:
    description:
      - What is known of the host. Keys are C(memory_bytes), C(cores), C(threads_per_core), C(cpu_flags),
        C(models_disk_free_bytes), C(memory_bandwidth_gb_s), C(topology) and C(numa); sizes may be written like 125G.
      - What is left out is read from the host, unless C(read_host) is false.
    type: dict
    default: {}
  read_host:
    description: Read what C(facts) leaves out, fetched models, and allocated cores, from the host the module runs on.
    type: bool
    default: true
  core_mode:
    description: Disjoint cores for each model, or all cores for every model.
    type: str
    choices: [dedicated, shared]
    default: dedicated
  reserved_cores:
    description: Cores left to the system and the gateway, in dedicated mode.
    type: int
    default: 2
  reserved_memory:
    description: Memory left to everything but the models.
    type: str
    default: 8G
  allocated:
    description: CPU lists that models have now, by name; they are kept. Default is what the host's units say.
    type: dict
  models_dir:
    description: Folder of the models.
    type: path
    default: /opt/models
  target_output_tokens:
    description: Length of the answer that latency and throughput targets are held against.
    type: int
    default: 64
author: [Citadel LLM]
"""

EXAMPLES = r"""
- name: Plan for a host that is not there yet
  citadel_capacity_plan:
    models: "{{ vllm_models }}"
    facts: "{{ lookup('ansible.builtin.file', 'inventory/production/facts/amx.json') | from_json }}"
    read_host: false
  register: __capacity
"""

RETURN = r"""
plan:
  description: >-
    fits, refusals, warnings, notes, totals, table, files (by model; where its files are or will be), and models by name
    with memory_max, kv_cache_bytes, cpus, omp_cpus, threads, need_bytes, weights_bytes, predicted_tokens_per_second.
  type: dict
  returned: always
"""


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "models": {"type": "list", "elements": "dict", "required": True},
            "facts": {"type": "dict", "default": {}},
            "read_host": {"type": "bool", "default": True},
            "core_mode": {"type": "str", "choices": ["dedicated", "shared"], "default": "dedicated"},
            "reserved_cores": {"type": "int", "default": 2},
            "reserved_memory": {"type": "str", "default": "8G"},
            "allocated": {"type": "dict"},
            "models_dir": {"type": "path", "default": "/opt/models"},
            "target_output_tokens": {"type": "int", "default": 64},
        },
        supports_check_mode=True,
    )
    p = module.params
    try:
        settings = Settings(
            p["core_mode"], p["reserved_cores"], parse_size(p["reserved_memory"]), p["target_output_tokens"]
        )
    except PlanError as error:
        module.fail_json(msg=f"llm_reserved_memory: {error}")
    facts, allocated = dict(p["facts"]), p["allocated"] or {}
    # A folder that cannot be there: without a host, nothing is fetched yet.
    models_dir = Path(p["models_dir"]) if p["read_host"] else Path("/dev/null")
    files = {str(entry.get("name")): look({"name": "?", **entry}, models_dir) for entry in p["models"]}
    if p["read_host"]:
        read = read_facts(p["models_dir"])
        if "cores" in facts or "topology" in facts:
            read = {key: value for key, value in read.items() if key not in {"topology", "numa", "threads_per_core"}}
        facts = read | facts
        allocated = read_allocated() if p["allocated"] is None else allocated
    manifests = {name: model.weights_bytes for name, model in files.items()}
    result = plan(p["models"], facts, settings, allocated, manifests)
    # What has no revision cannot be fetched: on a host that is a refusal, for a plan on paper a note.
    unresolved = [model.reason for model in files.values() if model.state == "unresolved"]
    if not p["read_host"]:
        unresolved = [reason for reason in unresolved if "source.path" not in reason]
    result["notes"] = [] if p["read_host"] else unresolved
    if p["read_host"] and unresolved:
        result["refusals"] += unresolved
        result["fits"] = False
    result["files"] = {name: model.as_dict() for name, model in files.items()}
    module.exit_json(changed=False, plan=result)


if __name__ == "__main__":
    main()
