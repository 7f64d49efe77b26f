"""Facts from /proc, /sys and units, and the two modules around the plan, on a folder that looks like a host."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from module_utils import capacity, capacity_host, capacity_model, model_files
from module_utils.capacity_cores import Host
from module_utils.capacity_host import read_allocated, read_facts

CPUS = frozenset(range(8))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four cores with two threads each, in two memory nodes."""
    files = {
        "proc/meminfo": "MemTotal:       16777216 kB\nMemFree:  1 kB\n",
        "proc/cpuinfo": "processor: 0\nflags\t\t: fpu avx2 avx512f\n\nprocessor: 1\nflags\t\t: fpu avx2\n",
        "sys/devices/system/cpu/online": "0-7\n",
        "sys/devices/system/node/node0/cpulist": "0-1,4-5\n",
        "sys/devices/system/node/node0/meminfo": "Node 0 MemTotal:       8388608 kB\n",
        "sys/devices/system/node/node1/cpulist": "2-3,6-7\n",
        "etc/systemd/system/citadel-llm@a.service.d/limits.conf": "[Service]\nAllowedCPUs=2-3 6\nMemoryMax=1\n",
        "etc/systemd/system/citadel-llm@b.service.d/order.conf": "[Unit]\nAfter=x.service\n",
    }
    for n in range(8):
        files[f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list"] = f"{n % 4},{n % 4 + 4}\n"
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "opt").mkdir()
    return tmp_path


def test_facts_of_a_host(root: Path) -> None:
    facts = read_facts("/opt/models", root, CPUS)
    assert facts["memory_bytes"] == 16 * 1024**3
    assert (facts["cores"], facts["threads_per_core"]) == (4, 2)
    assert facts["topology"] == ["0,4", "1,5", "2,6", "3,7"]
    assert facts["numa"] == [
        {"cpus": "0-1,4-5", "memory_bytes": 8 * 1024**3},
        {"cpus": "2-3,6-7", "memory_bytes": 0},
    ]
    assert facts["cpu_flags"] == ["fpu", "avx2", "avx512f"]
    assert facts["models_disk_free_bytes"] > 0
    host = Host.of(facts)
    assert [(core.cpus, core.node) for core in host.cores] == [((0, 4), 0), ((1, 5), 0), ((2, 6), 1), ((3, 7), 1)]
    assert dict(host.node_memory_bytes) == {0: 8 * 1024**3}


def test_cpus_that_a_container_may_not_use_do_not_count(root: Path) -> None:
    assert read_facts("/opt/models", root, frozenset({0, 1, 4}))["topology"] == ["0,4", "1"]


def test_a_machine_that_hides_its_topology(root: Path) -> None:
    for file in root.glob("sys/devices/system/cpu/cpu*/topology/*"):
        file.unlink()
    assert read_facts("/opt/models", root, CPUS)["cores"] == 8


def test_cpus_that_models_have(root: Path) -> None:
    assert read_allocated(root) == {"a": "2-3,6"}
    assert read_allocated(root / "opt") == {}


# ---- Files of a model ----

REVISION = "ab" * 20


def entry(**source: Any) -> dict[str, Any]:
    return {"name": "tiny", "source": {"type": "hub", "repository": "some/tiny", "revision": REVISION, **source}}


def fetched(folder: Path, repository: str = "some/tiny", revision: str = REVISION) -> None:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    (folder / "config.json").write_bytes(b"{}")
    files = {"model.safetensors": {"size": 100, "sha256": "a"}, "config.json": {"size": 2, "sha256": "b"}}
    (folder / "manifest.json").write_text(json.dumps({"repository": repository, "revision": revision, "files": files}))


def test_a_model_that_is_there(tmp_path: Path) -> None:
    fetched(tmp_path / "tiny" / REVISION)
    files = model_files.look(entry(), tmp_path)
    assert (files.state, files.reason, files.bytes, files.weights_bytes) == ("ready", "", 102, 100)
    assert files.directory == str(tmp_path / "tiny" / REVISION)
    assert files.source["patterns"] == model_files.PATTERNS


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "not fetched yet"),
        (lambda folder: (folder / "manifest.json").write_text("x"), "its manifest cannot be read"),
        (lambda folder: (folder / "config.json").unlink(), "config.json of its manifest is not there"),
        (lambda folder: (folder / "config.json").write_text("{} "), "config.json has 3 bytes, its manifest says 2"),
    ],
)
def test_a_model_that_is_to_be_fetched(tmp_path: Path, spoil: Callable[[Path], None], reason: str) -> None:
    fetched(tmp_path / "tiny" / REVISION)
    spoil(tmp_path / "tiny" / REVISION)
    files = model_files.look(entry(), tmp_path)
    assert files.state == "missing"
    assert files.reason.startswith(reason)


def test_a_manifest_of_something_else(tmp_path: Path) -> None:
    fetched(tmp_path / "tiny" / REVISION, repository="some/other")
    assert model_files.look(entry(), tmp_path).reason == f"its manifest is of some/other at {REVISION}"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ({"revision": ""}, "source.revision of some/tiny is empty; set it to the commit that this prints:"),
        ({"revision": "main"}, "source.revision must be a commit of 40 hex digits, it is 'main'"),
        ({"repository": "tiny"}, "source.repository must be OWNER/NAME, it is 'tiny'"),
        ({"type": "ftp"}, "source.type must be hub, mirror or local, it is 'ftp'"),
        ({"type": "mirror"}, "source.url must be the http(s) address of the mirror"),
        ({"type": "local", "revision": "a b"}, "source.revision 'a b' is not one plain word"),
        ({"type": "local", "revision": "", "path": "/no/such"}, "source.path '/no/such' is not a folder on this host"),
    ],
)
def test_sources_that_cannot_be_used(tmp_path: Path, source: dict[str, Any], reason: str) -> None:
    files = model_files.look(entry(**source), tmp_path)
    assert files.state == "unresolved"
    assert files.reason.startswith(f"tiny: {reason}")


def test_a_mirror_and_an_absent_model(tmp_path: Path) -> None:
    assert model_files.look(entry(type="mirror", url="http://mirror"), tmp_path).state == "missing"
    assert model_files.look({**entry(), "state": "absent"}, tmp_path).state == "absent"


def test_a_folder_is_named_after_what_is_in_it(tmp_path: Path) -> None:
    source = tmp_path / "usb"
    source.mkdir()
    (source / "model.safetensors").write_bytes(b"a" * (3 * model_files.SAMPLE))
    local = entry(type="local", path=str(source), revision="", repository="")
    first = model_files.look(local, tmp_path / "models").revision
    assert first.startswith("local-")
    assert model_files.look(local, tmp_path / "models").revision == first
    (source / "model.safetensors").write_bytes(b"a" * (3 * model_files.SAMPLE - 1) + b"b")
    assert model_files.look(local, tmp_path / "models").revision != first
    assert model_files.look(entry(type="local", path=str(source), revision="v2"), tmp_path).revision == "v2"


def test_a_folder_with_a_manifest_is_named_after_its_checksums(tmp_path: Path) -> None:
    fetched(tmp_path / "usb")
    named = model_files.fingerprint(tmp_path / "usb")
    (tmp_path / "usb/model.safetensors").write_bytes(b"y" * 100)
    assert model_files.fingerprint(tmp_path / "usb") == named


def test_a_medium_that_was_taken_away(tmp_path: Path) -> None:
    fetched(tmp_path / "tiny/local-0123", repository="", revision="local-0123")
    files = model_files.look(entry(type="local", path="/no/such", revision="", repository=""), tmp_path)
    assert (files.state, files.revision) == ("ready", "local-0123")


# ---- The modules ----


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Run a module's main() as Ansible would; returns what it answers."""
    for utils in (capacity, capacity_host, capacity_model, model_files):
        monkeypatch.setitem(sys.modules, f"ansible.module_utils.{utils.__name__.rpartition('.')[2]}", utils)

    def call(name: str, **arguments: Any) -> dict[str, Any]:
        from ansible.module_utils.testing import patch_module_args

        module: ModuleType = __import__(f"modules.{name}", fromlist=["main"])
        with patch_module_args(arguments), pytest.raises(SystemExit):
            module.main()
        answer: dict[str, Any] = json.loads(capsys.readouterr().out)
        return answer

    return call


TINY = {
    **entry(),
    "context": 64,
    "architecture": {"layers": 1, "kv_heads": 1, "head_dim": 8, "hidden": 8, "ffn": 8, "vocab": 8},
}
PAPER = {"memory_bytes": "32G", "cores": 4, "cpu_flags": "avx2"}


def test_the_plan_module_on_paper(run: Callable[..., dict[str, Any]]) -> None:
    unfilled = {**TINY, "source": {"repository": "some/tiny"}}
    answer = run("citadel_capacity_plan", models=[unfilled], facts=PAPER, read_host=False)
    assert answer["changed"] is False
    assert answer["plan"]["fits"]
    assert answer["plan"]["models"]["tiny"]["cpus"] == "2"
    assert answer["plan"]["notes"][0].startswith("tiny: source.revision of some/tiny is empty")
    local = {**TINY, "source": {"type": "local", "path": "/no/such"}}
    answer = run("citadel_capacity_plan", models=[local], facts=PAPER, read_host=False)
    assert (answer["plan"]["fits"], answer["plan"]["notes"]) == (True, [])


def test_the_plan_module_on_a_host(
    run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    from modules import citadel_capacity_plan

    monkeypatch.setattr(citadel_capacity_plan, "read_facts", lambda folder: read_facts(folder, root, CPUS))
    monkeypatch.setattr(citadel_capacity_plan, "read_allocated", lambda: {"tiny": "3,7"})
    fetched(tmp_path / "models/tiny" / REVISION)
    models_dir = str(tmp_path / "models")
    plan = run("citadel_capacity_plan", models=[TINY], models_dir=models_dir)["plan"]
    assert plan["fits"], plan["refusals"]
    assert plan["models"]["tiny"]["cpus"] == "3,7"
    assert plan["models"]["tiny"]["weights_bytes"] == 100
    assert plan["files"]["tiny"]["state"] == "ready"
    plan = run("citadel_capacity_plan", models=[TINY], models_dir=models_dir, facts={"cores": 8}, allocated={})["plan"]
    assert plan["models"]["tiny"]["cpus"] == "2"
    unfilled = {**TINY, "source": {"repository": "some/tiny"}}
    plan = run("citadel_capacity_plan", models=[unfilled], models_dir=models_dir)["plan"]
    assert not plan["fits"]
    assert plan["refusals"][-1].startswith("tiny: source.revision of some/tiny is empty")


def test_the_plan_module_names_a_setting_that_is_no_size(run: Callable[..., dict[str, Any]]) -> None:
    answer = run("citadel_capacity_plan", models=[], facts=PAPER, read_host=False, reserved_memory="some")
    assert answer["failed"]
    assert answer["msg"].startswith("llm_reserved_memory: 'some' is not a size")
