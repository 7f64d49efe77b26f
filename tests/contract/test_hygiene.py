"""What must not be in the repository, and silencers that owe a reason."""

import configparser
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from tests.contract.repo import INVENTORIES, ROOT, files, found, load

PUBLIC = {
    "deb.debian.org",
    "security.debian.org",
    "archive.ubuntu.com",
    "security.ubuntu.com",
    "pypi.org",
    "files.pythonhosted.org",
    "download.pytorch.org",
    "proxy.golang.org",
    "localhost",
    "127.0.0.1",
}
SECRETS = (
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    r"\bhf_[A-Za-z0-9]{20,}",
    r"\bsk-[A-Za-z0-9_-]{20,}",
    r"\bgh[pousr]_[A-Za-z0-9]{20,}",
    r"\bAKIA[0-9A-Z]{16}\b",
    r"\bxox[abprs]-[A-Za-z0-9-]{10,}",
)

# What a mark silences: [arg-type], E501, S603, no-changed-when
CODES = re.compile(r"^[:\s]*(?:\[[\w\-, ]+\]|[A-Z]+\d+(?:[, ]+[A-Z]+\d+)*|[a-z]+(?:-[a-z\[\]]+)+)?")


def machine_hosts() -> set[str]:
    """Hosts of the package registries that this machine is set up with, so far as they are not the public ones."""
    naming = re.compile(r"INDEX_URL|PROXY|REGISTRY", re.IGNORECASE)
    urls = [value for name, value in os.environ.items() if naming.search(name)]
    for path in (Path("/etc/pip.conf"), Path.home() / ".config/pip/pip.conf", Path.home() / ".pip/pip.conf"):
        parser = configparser.RawConfigParser()
        parser.read(path)
        urls += [value for section in parser.sections() for value in parser[section].values()]
    for path in [*Path("/etc/apt").glob("sources.list*"), *Path("/etc/apt").glob("*.list.d/*")]:
        if path.is_file():
            urls += path.read_text().split()
    hosts = {urlsplit(word).hostname for url in urls for word in re.split(r"[\s,|]+", url) if "://" in word}
    return {host for host in hosts if host and host not in PUBLIC}


def test_no_registry_of_this_machine_is_named() -> None:
    assert [line for host in sorted(machine_hosts()) for line in found(re.escape(host))] == []


def test_no_path_of_this_machine_is_named() -> None:
    paths = [str(ROOT), str(Path.home() / ".cache")]
    assert [line for path in paths if path != "/" for line in found(re.escape(path) + r"\b")] == []


def test_no_secret_is_committed() -> None:
    assert [line for secret in SECRETS for line in found(secret, but=("tests/contract/test_hygiene.py",))] == []


def test_a_literal_password_is_in_no_inventory_or_role() -> None:
    naming = r"^\s*-?\s*\w*(password|passphrase|secret|token|api_key)\w*\s*:\s*[\"']?[^\s\"'{#\[]"
    kinds = (r"_tokens\s*:", r"\b(int|str|bool|false|true|null)\b", r"no_log", r"\d+\s*(#|$)", r"!vault", r"/")
    lines = [line for line in found(naming) if line.startswith(("inventory/", "roles/", "playbooks/"))]
    spoken = [line for line in lines if "argument_specs.yml" in line.split(":", 1)[0]]
    assert [line for line in lines if line not in spoken and not any(re.search(kind, line) for kind in kinds)] == []


def test_a_vault_in_an_inventory_is_encrypted() -> None:
    vaults = [path for tree in INVENTORIES for path in tree.rglob("vault*.yml") if "example" not in path.name]
    assert [path.name for path in vaults if not path.read_text().startswith("$ANSIBLE_VAULT")] == []


def test_whatever_is_silenced_says_why() -> None:
    bare = []
    for path in files():
        if path.suffix not in {".py", ".yml", ".toml", ""} or path.name == "test_hygiene.py":
            continue
        lines = path.read_text(errors="replace").splitlines()
        for number, line in enumerate(lines):
            mark = re.search(r"#\s*(noqa|type: ignore|nosec|pragma: no cover)(?P<rest>.*)$", line)
            if not mark:
                continue
            reason = re.sub(
                r"^[:\s]*(?:\[[\w\-, ]+\]|[A-Z]+\d+(?:[, ]+[A-Z]+\d+)*|[a-z]+(?:-[a-z\[\]]+)+)?", "", mark["rest"]
            )
            above = lines[number - 1].lstrip() if number else ""
            if len(reason.split()) < 2 and not above.startswith("#"):
                bare.append(f"{path.relative_to(ROOT)}:{number + 1}: {line.strip()}")
    assert bare == []


def test_errors_are_not_ignored_without_a_reason() -> None:
    lines = found(r"^\s*(- )?ignore_(errors|unreachable): ", but=("docs/", "tests/"))
    assert [line for line in lines if "#" not in line] == []


def test_the_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_hooks_and_ci_call_tools_of_the_repository_only() -> None:
    repositories = [entry["repo"] for entry in load(ROOT / ".pre-commit-config.yaml")["repos"]]
    assert set(repositories) == {"local"}, "a hook that is fetched needs a network"
    assert os.access(ROOT / ".ci/run", os.X_OK)
