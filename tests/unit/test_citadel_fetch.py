"""citadel-fetch against a stand-in hub that speaks the real client's protocol, and against folders."""

import fcntl
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.unit.stand_in_hub import File, StandInHub

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAM = ROOT / "roles/vllm/files/citadel-fetch"
REPOSITORY = "someone/tiny"
REVISION = "ab" * 20
WEIGHTS = bytes(range(256)) * 4096  # a megabyte
CONFIG = b'{"model_type": "mistral"}'


def load() -> ModuleType:
    loader = SourceFileLoader("citadel_fetch", str(PROGRAM))
    spec = importlib.util.spec_from_loader("citadel_fetch", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["citadel_fetch"] = module
    dont_write = sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # else a citadel-fetchc lies beside the program
    loader.exec_module(module)
    sys.dont_write_bytecode = dont_write
    return module


fetch = load()


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the program sets for the hub's client is undone; the test's token is no other's; nobody waits."""
    for name in ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_IMPLICIT_TOKEN", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(fetch.time, "sleep", lambda _: None)
    monkeypatch.setattr(fetch, "KEPT", 100_000)


@pytest.fixture
def hub() -> Iterator[StandInHub]:
    files = {
        "model.safetensors": File(WEIGHTS, lfs=True),
        "config.json": File(CONFIG),
        "tokenizer_config.json": File(b"{}"),
        "pytorch_model.bin": File(b"a pickle", lfs=True),
        "modeling_tiny.py": File(b"print('mine')"),
        "README.md": File(b"hello"),
        "onnx/config.json": File(b"{}"),
    }
    with StandInHub(REPOSITORY, REVISION, files).running() as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "tiny" / REVISION


Get = Callable[..., None]


@pytest.fixture
def get(hub: StandInHub, folder: Path) -> Get:
    def run(*more: str, revision: str = REVISION) -> None:
        options = ["--repository", REPOSITORY, "--revision", revision, "--endpoint", hub.url, "--spare", "0"]
        fetch.main(["get", str(folder), *options, *more])

    return run


def refused(run: Callable[[], None], status: int, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the run ends with; its status is the expected one."""
    with pytest.raises(SystemExit) as ended:
        run()
    lines = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == status, lines
    assert len(lines) == 1
    return lines[0]


def manifest(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return value


def test_fetches_what_a_model_needs_and_nothing_that_holds_code(
    get: Get, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    get()
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer_config.json",
    ]
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    told = manifest(folder)
    assert told["repository"] == REPOSITORY
    assert told["revision"] == REVISION
    assert told["files"]["model.safetensors"] == {
        "size": len(WEIGHTS),
        "sha256": hashlib.sha256(WEIGHTS).hexdigest(),
    }
    assert told["files"]["config.json"]["sha256"] == hashlib.sha256(CONFIG).hexdigest()
    assert told["bytes"] == sum(entry["size"] for entry in told["files"].values())
    assert "left out, may hold code: modeling_tiny.py, pytorch_model.bin" in capsys.readouterr().out
    assert not list(folder.parent.glob(".fetch-*"))


def test_fetching_again_reads_nothing_anew(get: Get, hub: StandInHub, folder: Path) -> None:
    get()
    first = len(hub.ranges("model.safetensors"))
    get()
    assert len(hub.ranges("model.safetensors")) == first
    assert fetch.digest_of(folder / "model.safetensors", len(WEIGHTS)).sha256 == hashlib.sha256(WEIGHTS).hexdigest()


def test_a_connection_cut_in_the_middle_is_taken_up_again(get: Get, hub: StandInHub, folder: Path) -> None:
    weights = hub.files["model.safetensors"]
    weights.cut_after, weights.cuts = 300_000, 2
    get()
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    asked = [text for text in hub.ranges("large/model.safetensors") if text]
    assert [int(text.removeprefix("bytes=").rstrip("-")) for text in asked] == [300_000, 600_000]


def test_a_broken_download_goes_on_in_the_next_run(
    get: Get, hub: StandInHub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = hub.files["model.safetensors"]
    weights.cut_after, weights.cuts = 1, 10**6
    hub.files["model.safetensors"].errors = [500] * 5
    line = refused(lambda: get("--attempts", "1"), fetch.NETWORK, capsys)
    assert "run it again" in line
    part = fetch.Folder(folder).part("model.safetensors")
    part.write_bytes(WEIGHTS[:700_000])  # as much as came
    assert not (folder / "manifest.json").exists()
    weights.cuts = 0
    weights.errors = []
    hub.requests.clear()
    get()
    assert hub.ranges("large/model.safetensors") == ["bytes=700000-"]
    assert manifest(folder)["files"]["model.safetensors"]["size"] == len(WEIGHTS)


def test_a_server_in_trouble_is_asked_again(get: Get, hub: StandInHub, folder: Path) -> None:
    hub.files["model.safetensors"].errors = [500, 503]
    get()
    assert (folder / "manifest.json").exists()


def test_a_flipped_byte_is_noticed_and_the_file_removed(
    get: Get, hub: StandInHub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.files["model.safetensors"].flip = True
    line = refused(get, fetch.CHECKSUM, capsys)
    assert "model.safetensors: sha256 is " in line
    assert hashlib.sha256(WEIGHTS).hexdigest() in line
    assert not (folder / "model.safetensors").exists()
    assert not (folder / "manifest.json").exists()
    hub.files["model.safetensors"].flip = False
    get()
    assert (folder / "manifest.json").exists()


def test_a_flipped_byte_in_a_small_file_is_noticed_too(
    get: Get, hub: StandInHub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.files["config.json"].flip = True
    assert "config.json: git sha1 is " in refused(get, fetch.CHECKSUM, capsys)


def test_gated_without_a_token(get: Get, hub: StandInHub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.token = "the right one"
    line = refused(get, fetch.ACCESS, capsys)
    assert "(401), no token was given: accept the terms" in line


def test_gated_with_a_token_that_is_not_enough(
    get: Get, hub: StandInHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "the right one"
    monkeypatch.setenv("HF_TOKEN", "another")
    line = refused(get, fetch.ACCESS, capsys)
    assert "(403), the token given was not enough" in line
    assert "another" not in line


def test_gated_with_the_right_token(
    get: Get, hub: StandInHub, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "the-right-one"
    monkeypatch.setenv("HF_TOKEN", "the-right-one")
    get()
    said = capsys.readouterr()
    assert "the-right-one" not in said.out + said.err + (folder / "manifest.json").read_text()


def test_a_revision_that_is_gone(get: Get, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(lambda: get(revision="cd" * 20), fetch.MISSING, capsys)
    assert f"{REPOSITORY} has no revision {'cd' * 20} (404)" in line


def test_a_repository_that_is_not_there(hub: StandInHub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--repository", "no/such", "--revision", REVISION, "--endpoint", hub.url]
    line = refused(lambda: fetch.main(["get", str(folder), *options]), fetch.ACCESS, capsys)
    assert "one that is not there answers the same" in line


def test_a_server_that_is_not_there(hub: StandInHub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--repository", REPOSITORY, "--revision", REVISION, "--endpoint", "http://127.0.0.1:9"]
    line = refused(lambda: fetch.main(["get", str(folder), *options]), fetch.NETWORK, capsys)
    assert "ConnectError" in line


def test_a_disk_too_small_is_seen_before_the_first_byte(
    get: Get, hub: StandInHub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.files["model.safetensors"].claimed_size = 10**16
    line = refused(get, fetch.SPACE, capsys)
    assert "too little" in line
    assert hub.ranges("model.safetensors") == []


def test_a_repository_with_pickles_only(get: Get, hub: StandInHub, capsys: pytest.CaptureFixture[str]) -> None:
    del hub.files["model.safetensors"]
    line = refused(get, fetch.CONTENT, capsys)
    assert "no safetensors" in line
    assert "pytorch_model.bin" in line


def test_a_pattern_for_pickles_is_refused(get: Get, capsys: pytest.CaptureFixture[str]) -> None:
    assert "'*.bin'" in refused(lambda: get("--include", "*.bin"), fetch.CONTENT, capsys)


def test_a_repository_without_a_config(get: Get, hub: StandInHub, capsys: pytest.CaptureFixture[str]) -> None:
    del hub.files["config.json"]
    assert "no config.json" in refused(get, fetch.CONTENT, capsys)


def test_a_mirror_that_lists_names_only(get: Get, hub: StandInHub, folder: Path) -> None:
    hub.names_only = True
    get()
    assert manifest(folder)["files"]["model.safetensors"]["sha256"] == hashlib.sha256(WEIGHTS).hexdigest()


def test_two_at_once_on_the_same_folder(get: Get, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = fetch.Folder(folder).work
    work.mkdir(parents=True)
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another citadel-fetch" in refused(get, fetch.BUSY, capsys)


def test_names_that_lead_out_of_the_folder_are_left_alone() -> None:
    names = ["../evil.json", "/etc/evil.json", ".git/config.json", "manifest.json", "sub/x.json", "config.json"]
    assert fetch.choose(names, ["*.json"]) == (["config.json"], [])
    assert fetch.choose(names, ["sub/*.json"]) == (["sub/x.json"], [])


def test_a_revision_must_be_a_commit(hub: StandInHub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        fetch.main(["get", str(folder), "--repository", REPOSITORY, "--revision", "main"])
    assert ended.value.code == 2
    assert "not a commit of 40 hex digits" in capsys.readouterr().err


def test_resolve_prints_the_commit(hub: StandInHub, capsys: pytest.CaptureFixture[str]) -> None:
    fetch.main(["resolve", REPOSITORY, "--endpoint", hub.url])
    assert capsys.readouterr().out == f"{REVISION}\n"


# ---- From a folder ----


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "usb"
    path.mkdir()
    (path / "model.safetensors").write_bytes(WEIGHTS)
    (path / "config.json").write_bytes(CONFIG)
    (path / "training.pt").write_bytes(b"a pickle")
    return path


def copy(source: Path, folder: Path) -> None:
    fetch.main(["copy", str(folder), "--path", str(source), "--revision", "v1", "--spare", "0"])


def test_copies_from_a_folder(source: Path, folder: Path) -> None:
    copy(source, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "manifest.json", "model.safetensors"]
    told = manifest(folder)
    assert (told["source"], told["revision"], told["path"]) == ("local", "v1", str(source))
    assert told["files"]["model.safetensors"]["sha256"] == hashlib.sha256(WEIGHTS).hexdigest()


def test_a_copy_is_held_against_the_manifest_of_its_source(
    source: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy(source, folder)
    second = tmp_path / "second" / "v1"
    copy(folder, second)  # what one host fetched is another's source
    assert manifest(second)["files"] == manifest(folder)["files"]
    (folder / "model.safetensors").write_bytes(WEIGHTS[:-1] + b"x")
    assert "sha256 is" in refused(lambda: copy(folder, tmp_path / "third" / "v1"), fetch.CHECKSUM, capsys)
    (folder / "config.json").unlink()
    (folder / "model.safetensors").unlink()
    line = refused(lambda: copy(folder, tmp_path / "fourth" / "v1"), fetch.CONTENT, capsys)
    assert "no safetensors" in line


def test_a_source_that_lost_a_file(source: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source / "manifest.json").write_text(json.dumps({"files": {"gone.json": {"size": 1, "sha256": ""}}}))
    assert "lacks gone.json" in refused(lambda: copy(source, folder), fetch.CHECKSUM, capsys)
    (source / "manifest.json").write_text("nonsense")
    assert "is not a manifest" in refused(lambda: copy(source, folder), fetch.CHECKSUM, capsys)


def test_a_source_that_is_not_there(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "not a folder" in refused(lambda: copy(tmp_path / "nowhere", folder), fetch.MISSING, capsys)


# ---- verify and watch ----


def test_verify(source: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy(source, folder)
    fetch.main(["verify", str(folder)])
    fetch.main(["verify", str(folder), "--hashes"])
    assert "ok: 2 files, sizes and sha256" in capsys.readouterr().out
    weights = folder / "model.safetensors"
    weights.write_bytes(WEIGHTS[:-1] + b"x")
    fetch.main(["verify", str(folder)])
    line = refused(lambda: fetch.main(["verify", str(folder), "--hashes"]), fetch.CHECKSUM, capsys)
    assert "model.safetensors has sha256" in line
    weights.write_bytes(WEIGHTS[:-1])
    (folder / "config.json").unlink()
    line = refused(lambda: fetch.main(["verify", str(folder)]), fetch.CHECKSUM, capsys)
    assert "config.json is not there" in line
    assert "model.safetensors has 1048575 bytes instead of 1048576" in line
    (folder / "manifest.json").write_text("nonsense")
    refused(lambda: fetch.main(["verify", str(folder)]), fetch.CHECKSUM, capsys)
    (folder / "manifest.json").unlink()
    refused(lambda: fetch.main(["verify", str(folder)]), fetch.MISSING, capsys)


def watched(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, str]:
    capsys.readouterr()
    fetch.main(["watch", str(folder), "--seconds", "0", *more])
    told: dict[str, str] = json.loads(capsys.readouterr().out)
    return told


def test_watch_tells_done_failed_and_how_far(
    get: Get, hub: StandInHub, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert watched(folder, capsys)["line"] == "not begun"
    hub.files["config.json"].flip = True
    refused(get, fetch.CHECKSUM, capsys)
    failed = watched(folder, capsys)
    assert failed["state"] == "failed"
    assert failed["message"].startswith("config.json: git sha1")
    active = False
    monkeypatch.setattr(fetch, "_is_active", lambda _: active)
    work = fetch.Folder(folder)
    wanted = [fetch.Wanted("model.safetensors", len(WEIGHTS))]
    fetch.Progress(work, wanted, 1).tell("running")
    assert "see journalctl --unit=a.service" in watched(folder, capsys, "--unit", "a.service")["message"]
    active = True
    told = watched(folder, capsys, "--unit", "a.service")
    assert (told["state"], told["line"].endswith("of 1.0 MiB here, 0 of 1 files verified")) == ("running", True)
    fetch.Progress(work, wanted, 1).tell("failed", "of the run before")
    assert watched(folder, capsys, "--unit", "a.service")["state"] == "running"
    active = False
    hub.files["config.json"].flip = False
    get()
    assert watched(folder, capsys, "--unit", "a.service")["state"] == "done"


def test_progress_is_written_while_files_come(source: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = fetch.Folder(folder)
    with work.locked():
        work.part("model.safetensors").write_bytes(WEIGHTS[: 512 * 1024])
        with fetch.Progress(work, [fetch.Wanted("model.safetensors", len(WEIGHTS))], every=0.01) as progress:
            progress._thread.join(0.1)
    assert "512.0 KiB of 1.0 MiB here" in capsys.readouterr().out


def test_help_runs_without_the_hubs_client() -> None:
    ran = subprocess.run([sys.executable, "-S", str(PROGRAM), "--help"], capture_output=True, text=True, check=True)
    assert "Exit status" in ran.stdout


def test_says_so_when_the_environment_lacks_the_client(tmp_path: Path) -> None:
    command = [sys.executable, "-S", str(PROGRAM), "resolve", REPOSITORY]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "has no huggingface_hub" in ran.stderr


def test_a_folder_that_may_not_be_written(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert "Not a directory" in refused(lambda: copy(source, tmp_path / "file" / "v1"), 1, capsys)


def test_files_are_readable_by_the_engines(get: Get, folder: Path) -> None:
    os.umask(0o077)
    get()
    assert {oct(file.stat().st_mode & 0o777) for file in folder.iterdir()} == {"0o644"}
