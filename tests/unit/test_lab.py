"""The parts of the lab that need neither root nor hosts."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "lab"))

import bytecode  # noqa: E402  the lab is a folder of scripts, not a package
import common  # noqa: E402  the same
import host as machine  # noqa: E402  the same
import proxy  # noqa: E402  the same
import tiny_models  # noqa: E402  the same


def header_of(file: Path) -> tuple[dict[str, dict[str, object]], int]:
    """Header of a safetensors file, and how many bytes of tensors follow it."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), len(data) - 8 - length


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_tiny_model_is_the_same_every_time_and_whole(tmp_path: Path, name: str) -> None:
    tiny_models.write(tmp_path / "a", name, seed=7)
    tiny_models.write(tmp_path / "b", name, seed=7)
    weights = tmp_path / "a" / "model.safetensors"
    assert weights.read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    header, size = header_of(weights)
    ends = [entry["data_offsets"][1] for tensor, entry in header.items() if tensor != "__metadata__"]  # type: ignore[index]  # JSON
    assert max(ends) == size
    tokenizer = json.loads((tmp_path / "a" / "tokenizer.json").read_text())
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert len(tokenizer["model"]["vocab"]) == config["vocab_size"]


def test_another_seed_makes_other_weights(tmp_path: Path) -> None:
    tiny_models.write(tmp_path / "a", "phi-3-mini", seed=1)
    tiny_models.write(tmp_path / "b", "phi-3-mini", seed=2)
    assert (tmp_path / "a/model.safetensors").read_bytes() != (tmp_path / "b/model.safetensors").read_bytes()


def test_bfloat16_is_the_upper_half_of_a_float() -> None:
    assert tiny_models.bfloat16([1.0, -2.0]) == b"\x80\x3f\x00\xc0"


def test_unknown_host_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(common.LabError, match="hx-llm-server-01"):
        common.host_named("hx-llm-server-99")


def test_a_failed_command_is_an_error_with_its_output() -> None:
    with pytest.raises(common.LabError, match="what it said"):
        common.run(["sh", "-c", "echo what it said; exit 3"])


def test_addresses_are_given_once() -> None:
    addresses = [host.address for host in common.HOSTS.values()] + [layer.address for layer in common.LAYERS.values()]
    assert len(addresses) == len(set(addresses))


@pytest.mark.parametrize("kept", [None, b"", b"no bytecode"])
def test_what_a_zip_has_is_compiled_once_whatever_the_folder_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bytes | None
) -> None:
    monkeypatch.setattr(bytecode, "FOLDER", str(tmp_path / "kept"))
    assert bytecode.compiled("a.py", b"x = 1").co_names == ("x",)  # and there is no folder
    (tmp_path / "kept").mkdir()
    bytecode.compiled("a.py", b"x = 1")
    (file,) = (tmp_path / "kept").iterdir()
    if kept is not None:
        file.write_bytes(kept)
        bytecode.compiled("a.py", b"x = 1")
    monkeypatch.setattr(bytecode, "compile_source", None)
    assert bytecode.compiled("b.py", b"x = 1").co_names == ("x",)


def test_start_time_tells_processes_apart() -> None:
    assert machine.start_time(os.getpid()) is not None
    child = subprocess.Popen(["true"])
    child.wait()
    assert machine.start_time(child.pid) is None


def test_proxy_knows_the_registries_of_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_INDEX_URL", "https://packages.example.org/simple")
    assert {"pypi.org", "packages.example.org"} <= proxy.registries()


def test_help_names_every_command() -> None:
    text = subprocess.run([REPO / "lab" / "lab", "--help"], text=True, capture_output=True, check=True).stdout
    assert all(word in text for word in ("up", "down", "status", "play", "ssh", "exec", "key", "prepare"))
