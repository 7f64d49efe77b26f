"""Where a model's files lie on the host, and whether they are what the inventory asks for.

A revision has a folder of its own, <models_dir>/<name>/<revision>/, and citadel-fetch writes its manifest.json last: a
folder with a manifest is complete and verified. Here only names and sizes are looked at, in a moment;
`citadel-fetch verify --hashes` reads everything.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
COMMIT = re.compile(r"[0-9a-f]{40}")
WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# What a model needs to be served, and no pickles: a pattern without "/" means the top of the repository only.
PATTERNS = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.tiktoken", "merges.txt", "vocab.txt"]
SAMPLE = 1024 * 1024


class SourceError(ValueError):
    """A `source` of a model entry that cannot be used; the text says why and what to write."""


@dataclass
class ModelFiles:
    """A model's files on the host. state: ready, missing (to be fetched), unresolved (no revision), absent."""

    name: str
    state: str
    reason: str = ""
    revision: str = ""
    directory: str = ""
    bytes: int = 0
    weights_bytes: int = 0
    source: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def look(entry: Mapping[str, Any], models_dir: Path) -> ModelFiles:
    """State of one model entry (merged with the defaults) on this host."""
    name = str(entry["name"])
    source = dict(entry.get("source") or {})
    source.setdefault("type", "hub")
    source["patterns"] = source.get("patterns") or PATTERNS
    if entry.get("state", "present") == "absent":
        return ModelFiles(name, "absent", source=source)
    try:
        revision = revision_of(name, source, models_dir / name)
    except SourceError as error:
        return ModelFiles(name, "unresolved", str(error), source=source)
    directory = models_dir / name / revision
    files = ModelFiles(name, "missing", revision=revision, directory=str(directory), source=source)
    files.reason, files.bytes, files.weights_bytes = check(directory, revision, str(source.get("repository") or ""))
    if not files.reason:
        files.state = "ready"
    return files


def revision_of(name: str, source: Mapping[str, Any], folder: Path) -> str:
    """The pinned revision; of a local folder without one, a fingerprint of its files."""
    revision = str(source.get("revision") or "")
    kind = source["type"]
    if kind not in {"hub", "mirror", "local"}:
        raise SourceError(f"{name}: source.type must be hub, mirror or local, it is {kind!r}")
    if kind == "local":
        if revision:
            if not WORD.fullmatch(revision):
                raise SourceError(f"{name}: source.revision {revision!r} is not one plain word")
            return revision
        path = Path(str(source.get("path") or ""))
        if path.is_absolute() and path.is_dir():
            return fingerprint(path)
        kept = sorted(folder.glob(f"local-*/{MANIFEST}"), key=lambda file: file.stat().st_mtime)
        if kept:  # the medium is gone, what was copied from it is still here
            return kept[-1].parent.name
        raise SourceError(f"{name}: source.path {str(path)!r} is not a folder on this host; bring the model there")
    repository = str(source.get("repository") or "")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise SourceError(f"{name}: source.repository must be OWNER/NAME, it is {repository!r}")
    if kind == "mirror" and not str(source.get("url") or "").startswith(("http://", "https://")):
        raise SourceError(f"{name}: source.url must be the http(s) address of the mirror")
    if not revision:
        raise SourceError(
            f"{name}: source.revision of {repository} is empty; set it to the commit that this prints:"
            f" .venv/bin/python roles/vllm/files/citadel-fetch resolve {repository}"
        )
    if not COMMIT.fullmatch(revision):
        raise SourceError(f"{name}: source.revision must be a commit of 40 hex digits, it is {revision!r}")
    return revision


def fingerprint(path: Path) -> str:
    """A name for the contents of a folder, without reading all of it.

    A folder that citadel-fetch filled has a manifest with the sha256 of every file. Else: names, sizes, and the first
    and last MiB of each file, so that other weights get another name in a moment, whatever their size.
    """
    manifest = path / MANIFEST
    digest = hashlib.sha256()
    if manifest.is_file():
        digest.update(json.dumps(json.loads(manifest.read_text())["files"], sort_keys=True).encode())
    else:
        for file in sorted(p for p in path.rglob("*") if p.is_file() and ".cache" not in p.parts):
            size = file.stat().st_size
            digest.update(f"{file.relative_to(path)}\0{size}\0".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(SAMPLE))
                if size > SAMPLE:
                    stream.seek(max(SAMPLE, size - SAMPLE))
                    digest.update(stream.read(SAMPLE))
    return f"local-{digest.hexdigest()[:12]}"


def check(directory: Path, revision: str, repository: str) -> tuple[str, int, int]:
    """(why the folder is not what is wanted, or ""; bytes of its files; bytes of its weights)."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        files = {str(name): int(entry["size"]) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        return "not fetched yet", 0, 0
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read ({error})", 0, 0
    if manifest.get("revision") != revision or str(manifest.get("repository") or "") != repository:
        return f"its manifest is of {manifest.get('repository')} at {manifest.get('revision')}", 0, 0
    for name, size in files.items():
        try:
            found = (directory / name).stat().st_size
        except OSError:
            return f"{name} of its manifest is not there", 0, 0
        if found != size:
            return f"{name} has {found} bytes, its manifest says {size}", 0, 0
    weights = sum(size for name, size in files.items() if name.endswith(".safetensors"))
    return "", sum(files.values()), weights
