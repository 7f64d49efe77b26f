"""citadel-unit-metrics: every tree of control groups, units that end while they are read, and lines of strangers."""

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "roles/exporters/files/citadel-unit-metrics"
MODEL = "citadel-llm@phi-3.service"
GATEWAY = "citadel-gateway@1.service"


def load() -> ModuleType:
    loader = SourceFileLoader("citadel_unit_metrics", str(SOURCE))
    spec = importlib.util.spec_from_loader("citadel_unit_metrics", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["citadel_unit_metrics"] = module
    loader.exec_module(module)
    return module


sys.dont_write_bytecode = True
metrics = load()


class Site:
    """A host in a folder: what ``systemctl show`` says, and its control groups."""

    def __init__(self, root: Path) -> None:
        self.cgroup = root / "cgroup"
        self.cgroup.mkdir()
        self.shown = root / "shown"
        self.shown.touch()
        self.systemctl = root / "systemctl"
        self.systemctl.write_text(f'#!/bin/sh\necho "$@" > {root}/asked\ncat {self.shown}\n')
        self.systemctl.chmod(0o755)
        self.asked = root / "asked"
        self.units = metrics.Units(
            ["citadel-llm@*.service"],
            ["citadel-gateway*.service"],
            cgroup=self.cgroup,
            systemctl=(str(self.systemctl),),
        )

    def show(self, *units: dict[str, str]) -> None:
        self.shown.write_text("\n\n".join("\n".join(f"{k}={v}" for k, v in unit.items()) for unit in units) + "\n")

    def write(self, path: str, text: str) -> Path:
        file = self.cgroup / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def read(self) -> dict[tuple[str, str], float]:
        """(metric without its prefix, unit) -> value."""
        found = self.units.samples()
        return {(name.removeprefix("citadel_unit_"), labels["unit"]): value for name, labels, value in found}


def unit(name: str = MODEL, **properties: str) -> dict[str, str]:
    return {
        "Id": name,
        "LoadState": "loaded",
        "ActiveState": "active",
        "ControlGroup": f"/citadel.slice/{name}",
        "InvocationID": "a1",
        "NRestarts": "2",
        "TasksCurrent": "7",
        "MemoryCurrent": "5000",
        "MemoryMax": "9000",
    } | properties


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


TREES = pytest.mark.parametrize(
    ("path", "text"),
    [
        (f"citadel.slice/{MODEL}/cpu.stat", "usage_usec 1500000\nuser_usec 1\n"),
        (f"unified/citadel.slice/{MODEL}/cpu.stat", "usage_usec 1500000\n"),
        (f"cpuacct/citadel.slice/{MODEL}/cpuacct.usage", "1500000000\n"),
        (f"cpu,cpuacct/citadel.slice/{MODEL}/cpuacct.usage", "1500000000\n"),
    ],
    ids=["v2", "hybrid", "v1", "v1-joint"],
)


@TREES
def test_a_unit_is_read_whole_in_every_tree(site: Site, path: str, text: str) -> None:
    site.show(unit())
    site.write(path, text)
    assert site.read() == {
        ("active", MODEL): 1,
        ("cpu_seconds_total", MODEL): 1.5,
        ("memory_bytes", MODEL): 5000,
        ("tasks", MODEL): 7,
        ("memory_limit_bytes", MODEL): 9000,
        ("restarts_total", MODEL): 2,
    }
    assert site.asked.read_text().split()[-3:] == ["--", "citadel-llm@*.service", "citadel-gateway*.service"]


def test_what_systemd_does_not_know_is_not_claimed(site: Site) -> None:
    site.show(unit(MemoryCurrent="[not set]", TasksCurrent=str(2**64 - 1), MemoryMax="infinity", NRestarts=""))
    assert site.read() == {("active", MODEL): 1}


def test_only_models_have_the_label_and_no_unit_is_there_that_is_not_loaded(site: Site) -> None:
    site.show(
        unit("citadel-llm@a\\x2fb.service"), unit(GATEWAY), unit("citadel-llm@gone.service", LoadState="not-found")
    )
    labels = [labels for name, labels, _ in site.units.samples() if name == "citadel_unit_active"]
    assert labels == [{"unit": "citadel-llm@a\\x2fb.service", "model": "a/b"}, {"unit": GATEWAY}]


def test_a_group_that_vanishes_keeps_its_last_figure_and_a_new_life_begins_anew(site: Site) -> None:
    file = site.write(f"citadel.slice/{MODEL}/cpu.stat", "usage_usec 9000000\n")
    site.show(unit())
    assert site.read()["cpu_seconds_total", MODEL] == 9
    file.unlink()
    assert site.read()["cpu_seconds_total", MODEL] == 9
    site.show(unit(ActiveState="inactive", ControlGroup="", MemoryCurrent="[not set]", TasksCurrent="[not set]"))
    told = site.read()
    assert (told["active", MODEL], told["cpu_seconds_total", MODEL]) == (0, 9)
    assert (told["memory_bytes", MODEL], told["tasks", MODEL]) == (0, 0)
    site.show(unit(InvocationID="a2", ControlGroup=""))
    assert ("cpu_seconds_total", MODEL) not in site.read()
    site.write(f"citadel.slice/{MODEL}/cpu.stat", "usage_usec 10000\n")
    site.show(unit(InvocationID="a2"))
    assert site.read()["cpu_seconds_total", MODEL] == 0.01


def test_within_a_life_cpu_never_goes_backwards(site: Site) -> None:
    site.show(unit())
    told = []
    for usec in (5_000_000, 4_000_000, 6_000_000):
        site.write(f"citadel.slice/{MODEL}/cpu.stat", f"usage_usec {usec}\n")
        told.append(site.read()["cpu_seconds_total", MODEL])
    assert told == [5, 5, 6]


@pytest.mark.parametrize("text", ["", "nonsense\n", "user_usec 7\n"])
def test_a_group_that_is_half_gone_gives_no_figure(site: Site, text: str) -> None:
    site.show(unit())
    site.write(f"citadel.slice/{MODEL}/cpu.stat", text)
    assert ("cpu_seconds_total", MODEL) not in site.read()


def test_the_root_of_all_groups_is_nobody_s(site: Site) -> None:
    site.write("cpu.stat", "usage_usec 5000000\n")
    assert metrics.cpu_seconds(site.cgroup, "/") is None
    assert metrics.cpu_seconds(site.cgroup, "") is None


def test_units_without_end_are_bounded_and_models_come_first(site: Site) -> None:
    site.units.limit = 2
    site.show(*(unit(f"citadel-gateway@{number}.service") for number in range(5)), unit())
    assert {name for _, name in site.read()} == {MODEL, "citadel-gateway@0.service"}
    assert site.units.left_out == 4
    assert "citadel_unit_collector_left_out 4.0" in metrics.collect(site.units, None)[0]


@pytest.mark.parametrize("script", ["echo no bus >&2; exit 1", "exit 3"])
def test_a_systemd_that_does_not_answer_leaves_no_figure(site: Site, script: str) -> None:
    site.systemctl.write_text(f"#!/bin/sh\n{script}\n")
    text, error = metrics.collect(site.units, None)
    assert error in {"no bus", "systemctl ended with 3"}
    assert "citadel_unit_collector_success 0.0" in text
    assert "citadel_unit_active" not in text


def test_no_systemctl_at_all(site: Site) -> None:
    site.systemctl.unlink()
    assert "No such file" in metrics.collect(site.units, None)[1]


def engine(folder: Path, model: str, text: str) -> None:
    (folder / model).mkdir(parents=True)
    (folder / model / "metrics.prom").write_text(text)
    os.utime(folder / model / "metrics.prom", (1_700_000_000, 1_700_000_000))


def test_the_figures_of_a_supervisor_are_taken_over(tmp_path: Path) -> None:
    engine(
        tmp_path,
        "phi-3",
        'citadel_unit_cpu_seconds_total{model="phi-3"} 1.0\ncitadel_engine_canary_seconds{model="phi-3"} 0.250000\n'
        'citadel_engine_canary_prompt_tokens_total{model="phi-3"} 12.000000\n',
    )
    samples, left_out = metrics.engine_samples(tmp_path)
    assert left_out == 0
    text = metrics.exposition(samples)
    assert '# TYPE citadel_engine_canary_seconds gauge\ncitadel_engine_canary_seconds{model="phi-3"} 0.25\n' in text
    assert "# TYPE citadel_engine_canary_prompt_tokens_total counter\n" in text
    assert 'citadel_engine_metrics_timestamp_seconds{model="phi-3"} 1700000000.0\n' in text
    assert "citadel_unit_" not in text


@pytest.mark.parametrize(
    "line",
    [
        'citadel_engine_canary_seconds{model="other"} 1',
        'citadel_engine_canary_seconds{model="phi-3",x="y"} 1',
        'citadel_engine_canary_seconds{model="phi-3"} one',
        'citadel_engine_metrics_timestamp_seconds{model="phi-3"} 1',
        'node_load1{model="phi-3"} 1',
        "citadel_engine_canary_seconds 1",
        "\x00\x01",
    ],
)
def test_a_line_of_a_stranger_is_left_out_and_counted(tmp_path: Path, line: str) -> None:
    engine(tmp_path, "phi-3", line + "\n")
    samples, left_out = metrics.engine_samples(tmp_path)
    assert left_out == 1
    assert [name for name, _, _ in samples] == ["citadel_engine_metrics_timestamp_seconds"]


def test_a_supervisor_cannot_flood_it(tmp_path: Path) -> None:
    many = "".join(f'citadel_engine_x{"a" * number}{{model="phi-3"}} 1\n' for number in range(1000))
    engine(tmp_path, "phi-3", many)
    engine(tmp_path, "odd name", 'citadel_engine_canary_seconds{model="odd name"} 1\n')
    samples, left_out = metrics.engine_samples(tmp_path)
    assert len(samples) == metrics.ENGINE_NAMES + 1
    assert left_out > 0
    (tmp_path / "unreadable").mkdir()
    (tmp_path / "unreadable/metrics.prom").mkdir()
    assert len(metrics.engine_samples(tmp_path)[0]) == len(samples)


def test_a_family_is_told_once_and_labels_are_escaped() -> None:
    text = metrics.exposition(
        [
            ("citadel_unit_tasks", {"unit": 'a"b\\c'}, 1.0),
            ("citadel_unit_active", {"unit": "x"}, 1.0),
            ("citadel_unit_tasks", {"unit": "d"}, 2.0),
        ]
    )
    assert text.count("# TYPE citadel_unit_tasks gauge") == 1
    assert '{unit="a\\"b\\\\c"} 1.0\ncitadel_unit_tasks{unit="d"} 2.0\n' in text


def test_the_file_is_replaced_in_one_step_and_readable(tmp_path: Path) -> None:
    target = tmp_path / "units.prom"
    metrics.replace(target, "one\n")
    before = target.stat().st_ino
    metrics.replace(target, "two\n")
    assert target.stat().st_ino != before
    assert (target.read_text(), target.stat().st_mode & 0o777) == ("two\n", 0o644)
    assert [path.name for path in tmp_path.iterdir()] == ["units.prom"]


def start(site: Site, *options: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(SOURCE), str(site.cgroup.parent / "units.prom"), *options]
    path = f"{site.cgroup.parent}:{os.environ['PATH']}"
    return subprocess.Popen(
        command,
        env={**os.environ, "PATH": path} | environment,
        text=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def test_once(site: Site) -> None:
    site.show(unit())
    run = start(site, "--once", "--models", "citadel-llm@*.service")
    _, said = run.communicate(timeout=20)
    assert (run.returncode, said) == (0, "")
    written = (site.cgroup.parent / "units.prom").read_text()
    assert f'citadel_unit_active{{unit="{MODEL}",model="phi-3"}} 1.0' in written
    assert all(re.fullmatch(r"# (HELP|TYPE) .*|\w+(\{.*\})? \S+", line) for line in written.splitlines())


def test_once_with_a_systemd_that_does_not_answer(site: Site) -> None:
    site.systemctl.write_text("#!/bin/sh\necho no bus >&2; exit 1\n")
    run = start(site, "--once", "--others", "x.service")
    _, said = run.communicate(timeout=20)
    assert (run.returncode, said) == (1, "citadel-unit-metrics: no bus\n")


def test_it_is_told_what_to_read(site: Site) -> None:
    run = start(site, "--once")
    _, said = run.communicate(timeout=20)
    assert run.returncode == 2
    assert "no pattern: nothing to read" in said


def test_it_tells_systemd_that_it_is_ready_and_ends_when_asked(site: Site) -> None:
    address = str(site.cgroup.parent / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as service_manager:
        service_manager.bind(address)
        service_manager.settimeout(20)
        site.show(unit())
        run = start(site, "--interval", "0.1", "--models", "citadel-llm@*.service", NOTIFY_SOCKET=address)
        try:
            assert service_manager.recv(200) == b"READY=1\nWATCHDOG=1"
            assert (site.cgroup.parent / "units.prom").exists(), "ready means that there is a first file"
            assert service_manager.recv(200) == b"READY=1\nWATCHDOG=1"
        finally:
            run.send_signal(signal.SIGTERM)
            _, said = run.communicate(timeout=20)
    assert (run.returncode, said) == (0, "")
