"""What the docs name exists: make targets, lab commands, playbooks, files, tags, links; and every page can be found."""

import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.contract.repo import ROOT, files, role_names, tags_of

PAGES = [path for path in files() if path.suffix == ".md"]
DOCS = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))

# inventory/mysite is what docs/inventory.md tells an operator to make, from a copy of inventory/production.
COPY = ("inventory/mysite", "inventory/production")
# The operator's own encrypted file: it is never in the repository.
MADE_BY_THE_OPERATOR = {"inventory/production/group_vars/all/vault.yml"}


def code(page: Path) -> Iterator[str]:
    """Every line of fenced code, and every piece of inline code."""
    fenced = False
    for line in page.read_text().splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced:
            yield line
        else:
            yield from re.findall(r"`([^`]+)`", line)


@cache
def make_targets() -> set[str]:
    """Those that `make help` lists: the others are parts of them."""
    return set(re.findall(r"^([a-z][a-z0-9]*):.*?## \S", (ROOT / "Makefile").read_text(), re.MULTILINE))


@cache
def lab_commands() -> set[str]:
    command = [sys.executable, str(ROOT / "lab/lab"), "--help"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"^    ([a-z]+)(?: |$)", told, re.MULTILINE))


@DOCS
def test_make_targets_exist(page: Path) -> None:
    named = {name for piece in code(page) for name in re.findall(r"(?:^|[\s;&(])make ([a-z][a-z0-9]*)", piece)}
    assert named - make_targets() == set()


@DOCS
def test_lab_commands_exist(page: Path) -> None:
    named = {name for piece in code(page) for name in re.findall(r"lab/lab ([a-z]+)", piece)}
    assert named - lab_commands() == set()


@DOCS
def test_tags_exist(page: Path) -> None:
    known = {tag for role in role_names() for tag in tags_of(role)} | {"always"}
    named = {
        tag for piece in code(page) for found in re.findall(r"--tags[ =]([\w,]+)", piece) for tag in found.split(",")
    }
    assert named - known == set()


@DOCS
def test_files_exist(page: Path) -> None:
    tops = {path.relative_to(ROOT).parts[0] for path in files()}
    missing = []
    for piece in code(page):
        for word in re.findall(r"(?<![\w/.:~@$}-])[\w.-]+(?:/[\w.*<>…{},-]+)+/?", piece):
            if word.split("/")[0] not in tops or "{" in word:
                continue
            pattern = re.sub(r"<[^>]*>|…", "*", word.replace(*COPY)).rstrip("/.,")
            if pattern not in MADE_BY_THE_OPERATOR and not any(ROOT.glob(pattern)):
                missing.append(word)
    assert missing == []


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@DOCS
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, fragment = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (fragment and fragment not in anchors(path)):
            broken.append(target)
    assert broken == []


def test_every_page_of_the_docs_is_linked() -> None:
    linked = set()
    for index in (ROOT / "README.md", ROOT / "docs/README.md", ROOT / "docs/runbooks/README.md"):
        if index.exists():
            targets = re.findall(r"\]\(([^)#\s]+)", index.read_text())
            linked |= {(index.parent / target).resolve() for target in targets if "://" not in target}
    pages = {path for path in PAGES if path.is_relative_to(ROOT / "docs") and path.name != "README.md"}
    assert {str(path.relative_to(ROOT)) for path in pages - linked} == set()


def test_every_lab_command_says_what_it_does() -> None:
    for name in lab_commands():
        command = [sys.executable, str(ROOT / "lab/lab"), name, "--help"]
        assert subprocess.run(command, capture_output=True, check=False).returncode == 0, name
