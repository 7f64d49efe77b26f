"""A host as the capacity plan sees it, and the share of its cores that each model gets. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .capacity_model import CORE_BANDWIDTH_GB_S, Model, PlanError, format_cpus, parse_cpus, parse_size

# ---- Host ----


@dataclass(frozen=True)
class Core:
    """One physical core: its logical CPUs (the first computes, the others are hyper-threads) and its memory node."""

    cpus: tuple[int, ...]
    node: int = 0


@dataclass(frozen=True)
class Host:
    """What the plan needs to know about a host."""

    memory_bytes: int
    cores: tuple[Core, ...]
    flags: frozenset[str]
    disk_free_bytes: int | None = None  # None: not known, not checked
    bandwidth_gb_s: float = 0.0  # of the whole host; 0: not known, CORE_BANDWIDTH_GB_S for each core
    node_memory_bytes: Mapping[int, int] = field(default_factory=dict)

    @staticmethod
    def of(facts: Mapping[str, Any]) -> Host:
        """Read facts as the module and the files of facts have them (inventory/production/facts)."""
        missing = [key for key in ("memory_bytes", "cores", "cpu_flags") if not facts.get(key)]
        if missing:
            raise PlanError(f"facts: {', '.join(missing)} missing")
        flags = facts["cpu_flags"]
        topology = facts.get("topology")
        nodes = facts.get("numa") or []
        node_of = {cpu: index for index, node in enumerate(nodes) for cpu in parse_cpus(str(node["cpus"]))}
        if topology:
            siblings = [parse_cpus(str(core)) for core in topology]
        else:
            count, threads = int(facts["cores"]), int(facts.get("threads_per_core") or 1)
            siblings = [tuple(range(n, count * threads, count)) for n in range(count)]
        disk = facts.get("models_disk_free_bytes")
        return Host(
            memory_bytes=parse_size(facts["memory_bytes"]),
            cores=tuple(Core(cpus, node_of.get(cpus[0], 0)) for cpus in siblings),
            flags=frozenset(flags.split() if isinstance(flags, str) else flags),
            disk_free_bytes=None if disk is None else parse_size(disk),
            bandwidth_gb_s=float(facts.get("memory_bandwidth_gb_s") or 0),
            node_memory_bytes={
                n: parse_size(node["memory_bytes"]) for n, node in enumerate(nodes) if node.get("memory_bytes")
            },
        )

    @property
    def cpus(self) -> tuple[int, ...]:
        return tuple(sorted(cpu for core in self.cores for cpu in core.cpus))

    def bandwidth(self, cores: int) -> float:
        """GB/s that so many cores can draw when nobody else does."""
        drawn = CORE_BANDWIDTH_GB_S * cores
        return min(drawn, self.bandwidth_gb_s) if self.bandwidth_gb_s else drawn


# ---- Cores ----


@dataclass(frozen=True)
class Cores:
    """The CPUs of one model: all of them, and those that compute ("nobind": the scheduler decides)."""

    cpus: str
    omp_cpus: str
    threads: int
    node: int | None = None


def cores_of(cores: Sequence[Core], cpus: Sequence[int] = ()) -> Cores:
    """Binding for a set of cores, or for the listed CPUs of these cores only.

    API server and engine core need a place beside the computing threads: the hyper-threads if there are any, else the
    last core of a set of three or more. One or two cores all compute.
    """
    mine = [sorted(set(core.cpus) & set(cpus)) if cpus else list(core.cpus) for core in cores]
    first = [of_core[0] for of_core in mine]
    has_siblings = any(len(of_core) > 1 for of_core in mine)
    compute = first if has_siblings or len(first) < 3 else first[:-1]
    nodes = {core.node for core in cores}
    return Cores(
        cpus=format_cpus(cpu for of_core in mine for cpu in of_core),
        omp_cpus=format_cpus(compute),
        threads=len(compute),
        node=nodes.pop() if len(nodes) == 1 else None,
    )


def choose_cores(free: Sequence[Core], count: int) -> list[Core]:
    """Cores for one model: inside one memory node if one has room (the fullest such), else wherever they are."""
    by_node: dict[int, list[Core]] = {}
    for core in free:
        by_node.setdefault(core.node, []).append(core)
    fitting = sorted((len(cores), node) for node, cores in by_node.items() if len(cores) >= count)
    return (by_node[fitting[0][1]] if fitting else list(free))[:count]


def allocate_cores(
    models: Sequence[Model], host: Host, reserved_cores: int, allocated: Mapping[str, str]
) -> tuple[dict[str, Cores], list[str]]:
    """Disjoint cores for each model, and the refusals.

    An explicit `cpus` of a model is taken as it is. A model that has cores already keeps them: adding, removing or
    resizing another model never moves it. `allocated` may name models that are not planned (still on the host): their
    cores are taken. The first cores of the host are left to the system.
    """
    core_of = {cpu: core for core in host.cores for cpu in core.cpus}
    system = set(host.cores[:reserved_cores])
    planned = {model.name for model in models}
    owner: dict[Core, str] = {}
    chosen: dict[str, list[Core]] = {}
    refusals: list[str] = []

    def cores_with(cpus: Iterable[int]) -> list[Core]:
        return list(dict.fromkeys(core_of[cpu] for cpu in cpus if cpu in core_of))

    def take(name: str, cores: Sequence[Core]) -> None:
        chosen.setdefault(name, []).extend(cores)
        owner.update(dict.fromkeys(cores, name))

    for name in allocated.keys() - planned:
        take(name, cores_with(parse_cpus(allocated[name])))
    others = len(owner)
    for model in models:
        cores = cores_with(model.cpus)
        if unknown := set(model.cpus) - core_of.keys():
            refusals.append(_unknown_cpus(model, unknown, host))
        if both := [core for core in cores if core in owner]:
            refusals.append(
                f"{model.name}: cpus {format_cpus(model.cpus)} shares the core of CPU {format_cpus(both[0].cpus)} with"
                f" {owner[both[0]]}; give each model cores of its own in cpus, or leave cpus empty"
            )
        take(model.name, cores)
    for model in models:
        if model.name in allocated and not model.cpus:
            held = [core for core in cores_with(parse_cpus(allocated[model.name])) if core not in owner]
            if len(held) > model.cores:  # made smaller, or set free from shared mode: not on the system's cores
                held = [core for core in held if core not in system]
            take(model.name, held[: model.cores])
    missing = 0
    for model in models:
        if not model.cpus:
            free = [core for core in host.cores if core not in owner and core not in system]
            take(model.name, choose_cores(free, model.cores - len(chosen[model.name])))
            missing += model.cores - len(chosen[model.name])
    if missing:
        counts = [len(chosen[model.name]) if model.cpus else model.cores for model in models]
        extra = f", {others} of models that are not in the inventory" if others else ""
        total = sum(counts) + others + reserved_cores
        refusals.append(
            f"cores: {' + '.join(map(str, counts))} = {sum(counts)} for the models{extra} and {reserved_cores} reserved"
            f" make {total}, this host has {len(host.cores)}: {missing} too many; lower cores of a model,"
            f" or set llm_core_mode: shared"
        )
    return {model.name: cores_of(chosen[model.name], model.cpus) for model in models if chosen[model.name]}, refusals


def shared_cores(models: Sequence[Model], host: Host) -> tuple[dict[str, Cores], list[str]]:
    """In shared mode every model may use every CPU: its number of threads is bounded, the scheduler places them."""
    refusals = [
        _unknown_cpus(model, unknown, host) for model in models if (unknown := set(model.cpus) - set(host.cpus))
    ]
    return {
        model.name: Cores(
            cpus=format_cpus(model.cpus or host.cpus),
            omp_cpus="nobind",
            threads=max(1, min(model.cores, len(host.cores))),
        )
        for model in models
    }, refusals


def _unknown_cpus(model: Model, unknown: Iterable[int], host: Host) -> str:
    there = format_cpus(host.cpus)
    return f"{model.name}: cpus names CPU {format_cpus(unknown)}, this host has {there}: correct cpus"
