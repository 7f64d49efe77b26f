"""citadel-engine: what it refuses, what it takes for alive, and how it starts and stops (with a fake vLLM)."""

import contextlib
import ctypes
import hashlib
import importlib.util
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from importlib.machinery import SourceFileLoader
from pathlib import Path
from socketserver import ThreadingUnixStreamServer
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "roles/vllm/files/citadel-engine"
FAKE = ROOT / "tests/unit/fake_vllm.py"
KEY = "k" * 64
NAME = "some-model"


def load_engine() -> ModuleType:
    loader = SourceFileLoader("citadel_engine", str(SOURCE))
    spec = importlib.util.spec_from_loader("citadel_engine", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["citadel_engine"] = module
    loader.exec_module(module)
    return module


sys.dont_write_bytecode = True
engine = load_engine()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Site:
    """A host in a folder: a deployed model, an environment whose Python is the fake vLLM, and room for the engine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.etc, self.weights, self.cache = root / "etc", root / "weights", root / "cache"
        for folder in (
            self.etc / "models",
            self.etc / "keys",
            self.weights,
            self.cache,
            root / "env/bin",
            root / "run",
        ):
            folder.mkdir(parents=True)
        (self.etc / "keys/engine").write_text(KEY + "\n")
        python = root / "env/bin/python"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} "$@"\n')
        python.chmod(0o755)
        (self.weights / "model.safetensors").write_bytes(b"w" * 100)
        self.manifest({"model.safetensors": b"w" * 100})
        self.vllm: dict[str, Any] = {
            "model": str(self.weights),
            "served-model-name": [NAME],
            "host": "127.0.0.1",
            "port": free_port(),
            "kv-cache-memory-bytes": 1,
            "enforce-eager": True,
            "shutdown-timeout": 1,
        }
        self.env = {
            "CITADEL_ENV": str(root / "env"),
            "CITADEL_SETTINGS": str(root / "settings.json"),
            "CITADEL_MANIFEST": str(self.weights / "manifest.json"),
            "CITADEL_ARCHITECTURE": "dense",
            "CITADEL_QUANTISATION": "bf16",
            "CITADEL_LOG": str(root / "vllm.log"),
            "CITADEL_CACHE": str(self.cache),
            "CITADEL_GATEWAY_SOCKET": str(root / "control.sock"),
            "CITADEL_GATEWAY_PAUSE": "0.1",
            "CITADEL_START_TIMEOUT": "5",
            "CITADEL_CANARY_INTERVAL": "0.1",
            "CITADEL_CANARY_TIMEOUT": "0.5",
            "OMP_NUM_THREADS": "3",
        }
        known = [*self.vllm, "max-num-seqs"]
        (root / "settings.json").write_text(json.dumps({"version": "0.0-fake", "settings": known}))
        self.write()

    def manifest(self, files: dict[str, bytes]) -> None:
        entries = {n: {"size": len(b), "sha256": hashlib.sha256(b).hexdigest()} for n, b in files.items()}
        (self.weights / "manifest.json").write_text(json.dumps({"files": entries}))

    def write(self) -> None:
        lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in self.vllm.items())
        (self.etc / f"models/{NAME}.yaml").write_text(f"# a comment\n{lines}\n")
        lines = "".join(f"{key}={value}\n" for key, value in self.env.items())
        (self.etc / f"models/{NAME}.env").write_text(f"# a comment\n\n{lines}")

    def behave(self, **how: Any) -> None:
        new = self.cache / "behaviour.new"
        new.write_text(json.dumps(how))
        new.replace(self.cache / "behaviour.json")

    def seen(self) -> Any:
        return json.loads((self.cache / "seen.json").read_text())

    def model(self) -> Any:
        return engine.load(NAME)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    made = Site(tmp_path)
    monkeypatch.setattr(engine, "CONFIG_DIR", made.etc)
    monkeypatch.setattr(engine, "SYSTEMD_DIR", tmp_path / "systemd")
    monkeypatch.setattr(engine, "RUNTIME_DIR", tmp_path / "run")
    monkeypatch.setattr(engine, "ACCESS_LOADED", tmp_path / "run/loaded.nft")
    return made


def refused(work: Callable[[], Any]) -> str:
    with pytest.raises(engine.Refusal) as caught:
        work()
    assert "\n" not in str(caught.value), "one line"
    return str(caught.value)


# --- files of a model ---


def test_a_model_is_what_its_two_files_say(site: Site) -> None:
    model = site.model()
    assert (model.port, model.environment, model.weights) == (site.vllm["port"], site.root / "env", site.weights)
    assert (model.cpu, model.number("CANARY_INTERVAL", 15), model.number("NO_SUCH", 15)) == (True, 0.1, 15)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: (s.etc / f"models/{NAME}.yaml").unlink(), "cannot read"),
        (lambda s: (s.etc / f"models/{NAME}.env").unlink(), "cannot read"),
        (lambda s: (s.etc / f"models/{NAME}.yaml").write_text("model: bare words\n"), "line 1: write it as"),
        (lambda s: (s.etc / f"models/{NAME}.yaml").write_text("model\n"), "line 1: write it as"),
        (lambda s: (s.etc / f"models/{NAME}.yaml").write_text('model: "x"\n'), "has no setting port"),
        (lambda s: (s.vllm.update(host="192.0.2.1"), s.write()), "set host to 127.0.0.1"),
        (lambda s: (s.env.pop("CITADEL_ENV"), s.write()), "has no CITADEL_ENV"),
    ],
)
def test_files_that_make_no_model_are_refused(site: Site, change: Callable[[Site], Any], words: str) -> None:
    change(site)
    assert words in refused(site.model)


# --- checks ---


def test_a_good_model_passes_every_check(site: Site) -> None:
    assert [line for line in engine.check(site.model(), hashes=True) if "tcmalloc" not in line] == []


def test_no_environment(site: Site) -> None:
    (site.root / "env/bin/python").unlink()
    assert "run playbooks/python_env.yml" in refused(lambda: engine.check(site.model()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: (s.weights / "model.safetensors").write_bytes(b"w" * 99), "has 99 bytes, its manifest says 100"),
        (lambda s: (s.weights / "model.safetensors").write_bytes(b"v" + b"w" * 99), "its manifest says"),
        (lambda s: (s.weights / "model.safetensors").unlink(), "of the manifest is not there"),
        (lambda s: (s.weights / "manifest.json").unlink(), "cannot read the manifest"),
        (lambda s: (s.weights / "manifest.json").write_text("{}"), "is not a manifest"),
        (lambda s: (s.weights / "manifest.json").write_text("["), "is not a manifest"),
    ],
)
def test_damaged_weights(site: Site, change: Callable[[Site], Any], words: str) -> None:
    change(site)
    assert words in refused(lambda: engine.check_weights(site.model(), hashes=True))


def test_a_flipped_bit_is_only_looked_for_on_demand(site: Site) -> None:
    (site.weights / "model.safetensors").write_bytes(b"v" + b"w" * 99)
    engine.check_weights(site.model())
    assert "sha256" in refused(lambda: engine.check_weights(site.model(), hashes=True))


def test_unreadable_weights_name_the_user(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def deny(path: Path, *args: Any, **more: Any) -> Any:
        if path.name == "model.safetensors":
            raise PermissionError(13, "Permission denied")
        return opened(path, *args, **more)

    monkeypatch.setattr(Path, "open", deny)
    said = refused(lambda: engine.check_weights(site.model()))
    assert f"as {engine.user()} (Permission denied)" in said


def test_libraries(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(ctypes, "CDLL", loaded.append)
    monkeypatch.setattr(engine, "tcmalloc", lambda: "")
    assert "libtcmalloc is not installed" in next(engine.check_libraries(site.model()))
    assert loaded == ["libnuma.so.1"]

    site.vllm["enforce-eager"] = False
    site.write()
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert "apt-get install g++" in refused(lambda: list(engine.check_libraries(site.model())))

    def missing(_name: str) -> None:
        raise OSError("cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert "apt-get install libnuma1" in refused(lambda: list(engine.check_libraries(site.model())))


def test_a_gpu_needs_neither_libraries_nor_instructions(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.env["CITADEL_DEVICE"] = "cuda"
    site.write()
    monkeypatch.setattr(ctypes, "CDLL", None)
    assert list(engine.check_libraries(site.model())) == []
    engine.check_instructions(site.model(), Path("/nonexistent"))


AVX2 = "avx2"
AVX512 = "avx2 avx512f avx512bw avx512dq avx512vl"
AMX = f"{AVX512} avx512_bf16 amx_tile amx_bf16 amx_int8"


@pytest.mark.parametrize(
    ("architecture", "quantisation", "flags", "fits"),
    [
        ("dense", "bf16", AVX2, True),
        ("dense", "bf16", "sse4_2", False),
        ("dense", "w8a8", AVX2, True),
        ("moe", "bf16", AVX2, True),
        ("dense", "awq-int4", AVX2, False),
        ("dense", "awq-int4", AVX512, True),
        ("dense", "gptq-int4", AVX2, False),
        ("dense", "ct-w4a16", AVX512, True),
        ("dense", "fp8-block", AVX512, False),
        ("dense", "fp8-block", AMX, True),
        ("moe", "w8a8", AVX512, False),
        ("moe", "w8a8", AMX, True),
        ("moe", "awq-int4", AVX512, False),
        ("moe", "fp8-block", AMX, True),
    ],
)
def test_instruction_sets(site: Site, architecture: str, quantisation: str, flags: str, fits: bool) -> None:
    site.env.update(CITADEL_ARCHITECTURE=architecture, CITADEL_QUANTISATION=quantisation)
    site.write()
    cpuinfo = site.root / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: fpu {flags}\n")
    if fits:
        engine.check_instructions(site.model(), cpuinfo)
    else:
        said = refused(lambda: engine.check_instructions(site.model(), cpuinfo))
        assert "set quantisation: " in said


def test_a_setting_that_this_vllm_does_not_know(site: Site) -> None:
    site.vllm["max-num-sequ"] = 4
    site.write()
    said = refused(lambda: engine.check_settings(site.model()))
    assert "vLLM 0.0-fake has no setting max-num-sequ (it has max-num-seqs)" in said
    (site.root / "settings.json").unlink()
    assert "no list of the settings" in refused(lambda: engine.check_settings(site.model()))


def test_a_port_that_is_taken_names_whose(site: Site) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", site.vllm["port"]))
        other.listen()
        said = refused(lambda: engine.check(site.model()))
        assert f"port {site.vllm['port']} is taken by a process of user {pwd.getpwuid(os.getuid()).pw_name}" in said
        engine.check(site.model(), port=False)


def test_an_address_that_cannot_be_used_is_an_error_of_its_own(site: Site) -> None:
    model = engine.load(NAME)
    model.vllm["host"] = "192.0.2.1"
    with pytest.raises(OSError, match="assign"):
        engine.check_port(model)


def test_a_port_of_root_is_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    class Closed(socket.socket):
        bind = deny

    monkeypatch.setattr(engine.socket, "socket", Closed)
    assert "choose one above 1023" in refused(lambda: engine.check_port(site.model()))


def test_listeners_of_unknown_users(tmp_path: Path) -> None:
    table = tmp_path / "tcp"
    table.write_text("  sl  local_address\n   0: 0100007F:2C88 00000000:0000 0A 0:0 0:0 0 4123456 0 1\n")
    assert engine.listener(11400, table) == "user 4123456"
    assert engine.listener(11401, table) == "somebody else"


def test_a_user_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 4123456)
    assert engine.user() == "4123456"


# --- the canary, with a clock of the test's own ---


class Vllm:
    """Answers of a vLLM, and the time they take."""

    def __init__(self) -> None:
        self.now = 0.0
        self.status = 200
        self.counters: tuple[float, ...] | None = (0.0,)

    def ask(self) -> tuple[int, str]:
        self.now += 5
        return self.status, "words"

    def canary(self) -> Any:
        return engine.Canary(self.ask, lambda: self.counters, lambda: self.now)


def test_a_canary_that_gets_a_token_is_well() -> None:
    vllm = Vllm()
    canary = vllm.canary()
    assert (canary.once(), canary.failures, canary.seconds, canary.silence) == ("ok", 0, 5, 0)


def test_a_failure_counts_only_while_nothing_moves() -> None:
    vllm = Vllm()
    canary = vllm.canary()
    canary.once()
    vllm.status = 0
    vllm.counters = (1.0,)
    assert (canary.once(), canary.failures) == ("slow", 0)
    assert (canary.once(), canary.failures) == ("still", 1)
    assert (canary.once(), canary.failures, canary.silence) == ("still", 2, 15)
    vllm.counters = (2.0,)
    assert (canary.once(), canary.failures) == ("slow", 0), "it was only slow"


def test_a_busy_engine_is_not_a_dead_one() -> None:
    vllm = Vllm()
    canary = vllm.canary()
    vllm.status = 503
    assert [canary.once() for _ in range(5)] == ["busy"] * 5
    assert canary.failures == 0


def test_counters_that_cannot_be_read_have_not_moved() -> None:
    vllm = Vllm()
    canary = vllm.canary()
    canary.once()
    vllm.status, vllm.counters = 0, None
    assert [canary.once(), canary.once()] == ["still", "still"]
    vllm.counters = (0.0,)
    assert canary.once() == "still", "the same as before the silence"


# --- talking ---


def test_notify_speaks_to_systemd_only_if_it_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    engine.notify("READY=1")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        engine.notify("READY=1", "STATUS=x")
        assert systemd.recv(100) == b"READY=1\nSTATUS=x"


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        (
            "0::/u\n",
            {"u/cpu.stat": "usage_usec 2500000\n", "u/memory.current": "7\n", "u/memory.events": "oom_kill 1\n"},
        ),
        (
            "5:memory:/u\n4:cpu,cpuacct:/u\n",
            {
                "cpuacct/u/cpuacct.usage": "2500000000\n",
                "memory/u/memory.usage_in_bytes": "7\n",
                "memory/u/memory.oom_control": "under_oom 0\noom_kill 1\n",
            },
        ),
    ],
    ids=["v2", "v1"],
)
def test_figures_of_the_whole_unit(tmp_path: Path, groups: str, files: dict[str, str]) -> None:
    (tmp_path / "own").write_text(groups)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    figures = engine.cgroup_figures(tmp_path, tmp_path / "own")
    assert figures == {"cpu_seconds_total": 2.5, "memory_bytes": 7, "oom_kills_total": 1}


def test_the_log_follows_when_its_file_is_moved_away(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    log = engine.Log(tmp_path / "vllm.log")
    log.write(b"one")
    (tmp_path / "vllm.log").rename(tmp_path / "vllm.log-1")
    log.write(b"(Worker pid=7) ERROR 11-23 15:53:59 [core.py:402] RuntimeError: cancelled")
    assert (tmp_path / "vllm.log-1").read_text().endswith(" one\n")
    assert "RuntimeError" in (tmp_path / "vllm.log").read_text()
    assert log.reason == "RuntimeError: cancelled"
    log.file.close()
    assert capfdbinary.readouterr().out.startswith(b"one\n(Worker")


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = engine.Log(tmp_path / "none/vllm.log")
    log.write(b"one")
    log.write(b"two")
    assert capsys.readouterr().err.count("no longer writing") == 1


# --- a whole run, with the fake vLLM ---


class Gateway:
    """A stand-in for the gateway's control socket: notes what it is told, and answers with ``status``."""

    def __init__(self, path: Path) -> None:
        self.told: list[str] = []
        self.status = 200
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.headers["Authorization"] == f"Bearer {KEY}"
                outer.told.append(self.path)
                self.send_response(outer.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

            def address_string(self) -> str:
                return "local"

        self.server = ThreadingUnixStreamServer(str(path), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Run:
    """``citadel-engine run`` as a process of its own, under a systemd of the test's."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.systemd = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.systemd.bind(str(site.root / "notify"))
        self.systemd.settimeout(0.1)
        self.told: list[str] = []
        credentials = site.root / "credentials"
        credentials.mkdir()
        (credentials / "engine-key").write_text(KEY)
        environment = {
            "PATH": os.environ["PATH"],
            "NOTIFY_SOCKET": str(site.root / "notify"),
            "CREDENTIALS_DIRECTORY": str(credentials),
            "RUNTIME_DIRECTORY": str(site.root / "run"),
            "CITADEL_CONFIG_DIR": str(site.etc),
            "CITADEL_SYSTEMD_DIR": str(site.root / "systemd"),
            **{name: value for name, value in os.environ.items() if name.startswith("COV")},  # it is measured too
        }
        self.output = (site.root / "output").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, str(SOURCE), "run", NAME], env=environment, stdout=self.output, stderr=subprocess.STDOUT
        )

    def listen(self) -> None:
        while True:
            try:
                self.told += self.systemd.recv(4096).decode().splitlines()
            except TimeoutError:
                return

    def until(self, condition: Callable[[], bool], patience: float = 20) -> None:
        end = time.monotonic() + patience
        while not condition():
            self.listen()
            assert time.monotonic() < end, f"{self.told}\n{self.said()}"

    def until_told(self, line: str, times: int = 1) -> None:
        self.until(lambda: self.told.count(line) >= times)

    def end(self) -> int:
        status = self.process.wait(20)
        self.listen()
        return status

    def said(self) -> str:
        return (self.site.root / "output").read_text()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.systemd.close()
        self.output.close()
        if (self.site.cache / "seen.json").exists():  # systemd would kill what is left of the unit
            pid = self.site.seen()["pid"]
            with contextlib.suppress(OSError):
                if b"fake_vllm" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)


@pytest.fixture
def start(site: Site) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def begin(**how: Any) -> Run:
        site.behave(**how)
        site.write()
        runs.append(Run(site))
        return runs[-1]

    yield begin
    for run in runs:
        run.close()


@pytest.fixture
def gateway(site: Site) -> Iterator[Gateway]:
    made = Gateway(site.root / "control.sock")
    yield made
    made.close()


def test_from_start_to_stop(site: Site, start: Callable[..., Run], gateway: Gateway) -> None:
    run = start()
    run.until_told("WATCHDOG=1", 3)
    assert run.told.index("READY=1") < len(run.told)
    assert gateway.told == [f"/internal/models/{NAME}/resume"], "before READY, once"
    assert "Loading weights of a fake model" in (site.root / "vllm.log").read_text()
    assert [line for line in run.told if line.startswith("STATUS=starting: ")] != []
    assert (site.root / "run/generation").read_text() == engine.fingerprint(site.model(), KEY)
    figures = (site.root / "run/metrics.prom").read_text()
    assert f'citadel_engine_canary_failures{{model="{NAME}"}} 0.000000' in figures
    # The one before READY, and each since; two tokens of a prompt for one of an answer.
    generated = re.search(rf'canary_generation_tokens_total\{{model="{NAME}"\}} (\d+)', figures)
    assert generated
    assert int(generated[1]) >= 2
    assert f'canary_prompt_tokens_total{{model="{NAME}"}} {2 * int(generated[1])}.0' in figures

    seen = site.seen()
    assert seen["argv"] == [
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--config",
        str(site.etc / f"models/{NAME}.yaml"),
    ]
    assert KEY not in json.dumps(seen["argv"])
    given = seen["environment"]
    assert (given["VLLM_API_KEY"], given["HF_HUB_OFFLINE"], given["OMP_NUM_THREADS"]) == (KEY, "1", "3")
    assert [name for name in given if name.startswith("CITADEL_") or "NOTIFY" in name or "CREDENTIALS" in name] == []

    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 0
    assert "STOPPING=1" in run.told
    assert gateway.told[-1] == f"/internal/models/{NAME}/drain"


def test_ready_only_after_a_real_token(site: Site, start: Callable[..., Run]) -> None:
    run = start(completion="busy")
    run.until(lambda: (site.cache / "seen.json").exists())
    time.sleep(1.5)
    run.listen()
    assert "READY=1" not in run.told
    site.behave(completion="ok")
    run.until_told("READY=1")


def test_a_vllm_that_is_up_but_does_not_generate_fails_the_start(start: Callable[..., Run]) -> None:
    run = start(completion="broken")
    assert run.end() == 1
    assert "vLLM is up but does not generate (500)" in run.said()
    assert "READY=1" not in run.told


def test_a_vllm_that_ends_during_the_start_says_why(start: Callable[..., Run]) -> None:
    run = start(exit_after=0.2, exit_status=3)
    assert run.end() == 1
    assert "vLLM ended with status 3" in run.said()
    assert "last error: RuntimeError: a fake reason" in run.said()


def test_a_hanging_vllm_is_given_up(site: Site, start: Callable[..., Run]) -> None:
    run = start()
    run.until_told("WATCHDOG=1", 2)
    site.behave(completion="hang", metrics="still")
    assert run.end() == 1
    assert "canary 2 of 2 failed" in run.said()
    told = run.told.count("WATCHDOG=1")
    assert told == len([line for line in run.told if line == "WATCHDOG=1"])


def test_a_slow_vllm_whose_counters_move_is_left_alone(site: Site, start: Callable[..., Run]) -> None:
    run = start()
    run.until_told("READY=1")
    site.behave(completion="hang", metrics="move")
    seen = run.told.count("WATCHDOG=1")
    run.until_told("WATCHDOG=1", seen + 3)
    assert any("last canary slow" in line for line in run.told)
    assert run.process.poll() is None


def test_sigterm_while_it_starts(site: Site, start: Callable[..., Run], gateway: Gateway) -> None:
    run = start(ready_after=60)
    run.until(lambda: (site.cache / "seen.json").exists())
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 0
    assert gateway.told == [], "there is nothing to drain"


def test_a_vllm_that_does_not_stop_is_killed(site: Site, start: Callable[..., Run]) -> None:
    run = start(stubborn=True, ready_after=60)
    run.until(lambda: (site.cache / "seen.json").exists())
    time.sleep(0.5)
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 0
    assert "did not end within 5 s" in run.said()


def test_a_gateway_that_comes_later_is_told_then(site: Site, start: Callable[..., Run]) -> None:
    run = start()
    run.until_told("WATCHDOG=1", 2)
    late = Gateway(site.root / "control.sock")
    run.until(lambda: late.told == [f"/internal/models/{NAME}/resume"])
    late.close()


def test_a_gateway_that_refuses_is_reported_and_told_again(
    site: Site, start: Callable[..., Run], gateway: Gateway
) -> None:
    gateway.status = 401
    run = start()
    run.until(lambda: len(gateway.told) > 1)
    assert "the gateway answered 401 to 'resume'" in run.said()
    gateway.status = 404  # it does not know the model yet: nothing to resume
    run.until_told("WATCHDOG=1", run.told.count("WATCHDOG=1") + 3)
    told = len(gateway.told)
    run.until_told("WATCHDOG=1", run.told.count("WATCHDOG=1") + 3)
    assert len(gateway.told) == told


def test_a_dead_socket_of_the_gateway_does_not_matter(site: Site, start: Callable[..., Run]) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(site.root / "control.sock"))
    run = start()
    run.until_told("READY=1")
    assert "the gateway did not take 'resume'" in run.said()


def test_a_refusal_is_one_line_and_status_78(site: Site, start: Callable[..., Run]) -> None:
    (site.weights / "model.safetensors").unlink()
    run = start()
    assert run.end() == 78
    assert "refused: " in run.said()
    assert any(line.startswith("STATUS=refused: ") for line in run.told)
    assert not (site.cache / "seen.json").exists(), "nothing was started"


# --- commands ---


@pytest.fixture
def up(site: Site) -> Iterator[Site]:
    """The fake vLLM alone."""
    command = [sys.executable, str(FAKE), "--config", str(site.etc / f"models/{NAME}.yaml")]
    server = subprocess.Popen(
        command, cwd=site.cache, env={"VLLM_API_KEY": KEY}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", site.vllm["port"])) == 0:
                break
        time.sleep(0.05)
    yield site
    server.kill()
    server.wait()


def test_ask(up: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert engine.main(["ask", NAME, "--as", engine.user()]) == 0
    answer = json.loads(capsys.readouterr().out)[NAME]
    assert (answer["status"], answer["text"]) == (200, "a fake token")
    assert engine.asked(up.root / "run") == (0, 0), "a model that has no folder there is no reason to fail"
    (up.root / "run" / NAME).mkdir()
    for _ in range(2):
        assert engine.main(["ask", NAME]) == 0
    assert engine.asked(up.root / "run" / NAME) == (4, 2)
    capsys.readouterr()
    (up.etc / "keys/engine").write_text("another key")
    assert engine.main(["ask", NAME]) == 1
    assert json.loads(capsys.readouterr().out)[NAME]["status"] == 401


@pytest.mark.parametrize(("how", "status"), [("busy", 503), ("broken", 500), ("odd", 0), ("hang", 0)])
def test_what_may_come_instead_of_a_token(up: Site, how: str, status: int) -> None:
    up.behave(completion=how)
    assert engine.Server(up.model(), KEY).generate(0.5)[0] == status


def test_progress(up: Site) -> None:
    server = engine.Server(up.model(), KEY)
    assert server.progress(2) == (7.0, 1.0, 0.25)
    up.behave(metrics="gone")
    assert server.progress(2) == (0.0, 0.0, 0.0)
    up.behave(metrics="hang")
    assert server.progress(0.2) is None


def test_check(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert engine.main(["check", NAME, "--hashes", "--running"]) == 0
    assert capsys.readouterr().out == f"{NAME}: ok\n"
    (site.weights / "manifest.json").unlink()
    assert engine.main(["check", NAME]) == 78
    assert capsys.readouterr().err.startswith("citadel-engine: refused: ")


def test_the_key(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine.credential(site.model()) == KEY
    (site.etc / "keys/engine").write_text("\n")
    assert "is empty" in refused(lambda: engine.credential(site.model()))
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(site.root / "none"))
    assert "cannot read the engine key" in refused(lambda: engine.credential(site.model()))


def test_become_somebody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    monkeypatch.setattr(engine.os, "setgroups", done.append)
    monkeypatch.setattr(engine.os, "setgid", done.append)
    monkeypatch.setattr(engine.os, "setuid", done.append)
    engine.become(None)
    engine.become(engine.user())
    assert done == []
    nobody = pwd.getpwnam("nobody")
    engine.become("nobody")
    assert done == [[], nobody.pw_gid, nobody.pw_uid]


def test_state(site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def units(active: str) -> str:
        block = "Id={}\nActiveState={}\nUnitFileState=enabled\nStatusText=serving\nMainPID=7\nNeedDaemonReload=no\n"
        ids = ("citadel-llm.target", "citadel-llm-access.service", f"citadel-llm@{NAME}.service")
        return "\n".join(block.format(name, active) for name in ids)

    def state(active: str) -> Any:
        out = subprocess.CompletedProcess([], 0, units(active), "")
        monkeypatch.setattr(engine.subprocess, "run", lambda *_, **__: out)
        assert engine.main(["state"]) == 0
        return json.loads(capsys.readouterr().out)

    said = state("active")
    assert said["models"][NAME] == {"active": "active", "current": False, "pid": 7, "status": "serving"}
    assert (said["access_current"], said["daemon_reload"], said["target_active"]) == (False, False, True)

    (site.root / f"run/{NAME}").mkdir()
    (site.root / f"run/{NAME}/generation").write_text(engine.fingerprint(site.model(), KEY))
    for name in ("etc/engines.nft", "run/loaded.nft"):
        (site.root / name).write_text("table")
    said = state("active")
    assert (said["models"][NAME]["current"], said["access_current"]) == (True, True)
    assert not state("failed")["models"][NAME]["current"]

    site.vllm["shutdown-timeout"] = 2
    site.write()
    assert not state("active")["models"][NAME]["current"], "started with other files"


def test_the_start_order_is_no_reason_to_restart(site: Site) -> None:
    before = engine.fingerprint(site.model(), KEY)
    folder = site.root / f"systemd/citadel-llm@{NAME}.service.d"
    folder.mkdir(parents=True)
    (folder / "order.conf").write_text("[Unit]\nAfter=another\n")
    assert engine.fingerprint(site.model(), KEY) == before
    (folder / "limits.conf").write_text("[Service]\nMemoryMax=1\n")
    assert engine.fingerprint(site.model(), KEY) != before
    assert engine.fingerprint(site.model(), "another key") != engine.fingerprint(site.model(), KEY)


FAKE_PACKAGE = {
    "vllm/__init__.py": "__version__ = '9.9-fake'\n",
    "vllm/utils/__init__.py": "",
    "vllm/utils/argparse_utils.py": "from argparse import ArgumentParser as FlexibleArgumentParser\n",
    "vllm/entrypoints/__init__.py": "",
    "vllm/entrypoints/openai/__init__.py": "",
    "vllm/entrypoints/openai/cli_args.py": (
        "def make_arg_parser(p):\n    p.add_argument('--max-num-seqs')\n"
        "    p.add_argument('--port', '-p')\n    return p\n"
    ),
}


def test_flags_are_asked_once_for_each_environment(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in FAKE_PACKAGE.items():
        (site.root / "package" / name).parent.mkdir(parents=True, exist_ok=True)
        (site.root / "package" / name).write_text(text)
    python = site.root / "env/bin/python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={site.root}/package exec {sys.executable} "$@"\n')
    arguments = ["flags", "--env", str(site.root / "env"), "--write", str(site.root / "asked.json")]
    assert engine.main(arguments) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {
        "environment": str(site.root / "env"),
        "version": "9.9-fake",
        "settings": ["max-num-seqs", "port"],
        "asked": True,
    }
    assert engine.main(arguments) == 0
    assert not json.loads(capsys.readouterr().out)["asked"]

    shutil.rmtree(site.root / "package/vllm/entrypoints")
    (site.root / "asked.json").unlink()
    assert engine.main(arguments) == 78
    assert "does not tell its settings: no make_arg_parser" in capsys.readouterr().err
    python.unlink()
    assert engine.main(arguments) == 78
    assert "run playbooks/python_env.yml" in capsys.readouterr().err


def test_help_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        engine.main(["--help"])
    assert ended.value.code == 0
    assert {"run", "check", "ask", "state", "flags"} <= set(capsys.readouterr().out.split())
