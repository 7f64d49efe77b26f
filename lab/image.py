"""What hosts are made of: base images, layers, the wheelhouse, the tiny models. All is kept in the cache folder."""

import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import network
import tiny_models
from common import (
    BASE_PACKAGES,
    BYTECODE,
    CACHE,
    LAB,
    LAYERS,
    REPO,
    SECRETS,
    SSH_KEY,
    STATE,
    VENV,
    Host,
    LabError,
    Layer,
    building,
    digest_of,
    run,
    say,
)

BASES = CACHE / "base"
LAYERS_DIR = CACHE / "layers"
WHEELHOUSE = CACHE / "wheelhouse"
MODELS = CACHE / "models"
REQUIREMENTS = REPO / "files" / "requirements"
WHEEL_SETS = ("installer", "gateway", "cpu", "predictor")
PYTHONS = {"bookworm": "3.11", "trixie": "3.13"}
NEWEST_GLIBC = 36  # bookworm's minor version; wheels for older ones run too
OLD_TAGS = ("manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64")
DEFAULT_RELEASE = "bookworm"
KEEP_SECONDS = 14 * 24 * 3600
BASE_RECIPE = "1"  # raised when the way the base image is built changes
Build = Callable[[Layer, Path, list[Path]], None]  # layer, where it is to be, what it lies on
MASKED = ("apt-daily.timer", "apt-daily-upgrade.timer", "systemd-networkd-wait-online.service")


def _apt_sources(release: str) -> str:
    """This machine's package sources, for another release if need be."""
    texts = [p.read_text() for p in sorted(Path("/etc/apt/sources.list.d").glob("debian*.sources"))]
    text = (
        "\n".join(texts)
        or "Types: deb\nURIs: http://deb.debian.org/debian\nSuites: bookworm bookworm-updates\nComponents: main\n"
    )
    return re.sub(r"\b(bookworm|trixie)\b", release, text)


def _apt_options() -> str:
    """This machine's settings of how packages are fetched (not its proxy: the hosts have the lab's)."""
    lines = [line for p in sorted(Path("/etc/apt/apt.conf.d").glob("*")) for line in p.read_text().splitlines()]
    return "".join(f"{line}\n" for line in lines if line.startswith("Acquire::") and "Proxy" not in line)


def base(release: str) -> Path:
    """The root file system of a freshly installed server, made the first time."""
    sources, options = _apt_sources(release), _apt_options()
    folder = BASES / f"{release}-{digest_of([], BASE_RECIPE, sources, *BASE_PACKAGES)}"
    with building("base"):
        if not folder.exists():
            _build_base(release, folder, sources, options)
    return folder


def _needs_the_machines_network(what: str) -> None:
    """Commands of `lab/lab exec` see the lab's network only, from which no registry is reached. Raises LabError."""
    if network.inside():
        raise LabError(
            f"{what} is not in the cache, and cannot be made from inside the lab: run `lab/lab prepare` first"
        )


def _build_base(release: str, folder: Path, sources: str, options: str) -> None:
    _needs_the_machines_network(f"the base image of {release}")
    say(f"building the base image of {release} (about half a minute)")
    new = folder.with_suffix(".new")
    shutil.rmtree(new, ignore_errors=True)
    new.parent.mkdir(parents=True, exist_ok=True)
    STATE.mkdir(parents=True, exist_ok=True)
    source_file = STATE / f"{release}.sources"
    source_file.write_text(sources)
    option_file = STATE / "apt-options"
    option_file.write_text(options)
    run(["mmdebstrap", "--mode=root", "--variant=minbase", "--skip=check/empty", f"--include={','.join(BASE_PACKAGES)}",
         f"--aptopt={option_file}", release, new, source_file])  # fmt: skip
    for name in MASKED:
        (new / "etc/systemd/system" / name).symlink_to("/dev/null")
    shutil.rmtree(new / "etc/apt/sources.list.d")
    (new / "etc/apt/sources.list.d").mkdir()
    (new / "etc/apt/sources.list").unlink(missing_ok=True)
    (new / "etc/apt/sources.list.d/debian.sources").write_text(sources)
    (new / "etc/apt/apt.conf.d/80lab").write_text(options)
    (new / "etc/machine-id").write_text("")
    for key in (new / "etc/ssh").glob("ssh_host_*"):
        key.unlink()  # each host makes its own
    _host_keys_at_boot(new)
    new.rename(folder)


def _host_keys_at_boot(root: Path) -> None:
    """Debian makes SSH host keys when the package is installed; a copied image makes them when it first boots."""
    unit = root / "etc/systemd/system/ssh.service.d/host-keys.conf"
    unit.parent.mkdir(parents=True, exist_ok=True)
    unit.write_text("[Service]\nExecStartPre=\nExecStartPre=/usr/bin/ssh-keygen -A\nExecStartPre=/usr/sbin/sshd -t\n")


def wheelhouse(release: str) -> None:
    """Download every wheel that hosts of a release install from the locks; a stamp for each lock tells what is there.

    The machine's own Python may be another one than the hosts': uv picks from the universal locks what the hosts'
    Python needs, pip fetches it.
    """
    python = PYTHONS[release]
    stamps = {lock: _stamp(lock, python) for lock in (REQUIREMENTS / f"{name}.txt" for name in WHEEL_SETS)}
    missing = [lock for lock, stamp in stamps.items() if not stamp.exists()]
    if not missing:
        return
    names = ", ".join(lock.stem for lock in missing)
    _needs_the_machines_network(f"the wheelhouse for Python {python} ({names})")
    say(f"downloading wheels of {names} for Python {python} into the wheelhouse (3 GB for all sets)")
    WHEELHOUSE.mkdir(parents=True, exist_ok=True)
    for lock in missing:
        _download(lock, python)
        stamps[lock].touch()


def _stamp(lock: Path, python: str) -> Path:
    return WHEELHOUSE / f".complete-{python}-{lock.stem}-{digest_of([lock])}"


def _download(lock: Path, python: str) -> None:
    tags = [*(f"manylinux_2_{minor}_x86_64" for minor in range(NEWEST_GLIBC, 4, -1)), *OLD_TAGS, "any"]
    platforms = [word for tag in tags for word in ("--platform", tag)]
    abis = [word for abi in (f"cp{python.replace('.', '')}", "abi3", "none") for word in ("--abi", abi)]
    picked = STATE / f"{lock.stem}-{python}.txt"
    run([VENV / "bin" / "uv", "pip", "compile", lock, "--quiet", "--no-deps", "--generate-hashes", "--no-annotate",
         "--no-header", "--python-version", python, "--python-platform", f"x86_64-manylinux_2_{NEWEST_GLIBC}",
         "--output-file", picked])  # fmt: skip
    run([VENV / "bin" / "python", "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes",
         "--only-binary=:all:", "--python-version", python, "--implementation", "cp", *abis, *platforms,
         "--dest", WHEELHOUSE, "--requirement", picked])  # fmt: skip


def models() -> None:
    """Make the tiny models."""
    stamp = MODELS / f".complete-{digest_of([LAB / 'tiny_models.py'])}"
    if stamp.exists():
        return
    say("making the tiny models")
    for name in tiny_models.MODELS:
        tiny_models.write(MODELS / name, name, seed=7)
    stamp.touch()


def secrets_of_the_lab() -> None:
    """The gateway key that `lab/lab key` prints, passwords, and the key pair for SSH, readable by their owner only."""
    STATE.mkdir(parents=True, exist_ok=True)
    STATE.chmod(0o700)
    for name, beginning in SECRETS.items():
        if not (path := STATE / name).exists():
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(beginning + secrets.token_urlsafe(32))
    if not SSH_KEY.exists():
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "citadel-lab", "-f", SSH_KEY])


def layer_path(layer: Layer, release: str, below: Path) -> Path:
    """Where a layer is kept; the name holds what it depends on."""
    paths = [path for name in layer.key if (path := REPO / name).exists()]
    parts = [str(layer.play), below.name, *((STATE / name).read_text() for name in layer.secrets)]
    return LAYERS_DIR / f"{layer.name}-{release}-{digest_of(paths, *parts)}"


def stack(layer: Layer | None, release: str, build: Build) -> list[Path]:
    """A layer and what it lies on, uppermost first; ``build`` makes what is not there."""
    if layer is None:
        return [base(release)]
    below = stack(LAYERS[layer.on] if layer.on else None, release, build)
    path = layer_path(layer, release, below[0])
    if not path.exists():
        build(layer, path, below)
    return [path, *below]


def prune() -> None:
    """Remove images and layers that nothing has used for two weeks: a boot renews the time of what it stands on. What
    was compiled two weeks ago is compiled anew.
    """
    oldest = time.time() - KEEP_SECONDS
    for folder in [*BASES.glob("*"), *LAYERS_DIR.glob("*")]:
        if folder.is_dir() and folder.stat().st_mtime < oldest:
            shutil.rmtree(folder)
    for file in BYTECODE.glob("*"):
        if file.stat().st_mtime < oldest:
            file.unlink()


def lower(host: Host, release: str, build: Build, *, bare: bool = False) -> list[Path]:
    """The folders under a host, uppermost first."""
    folders = stack(LAYERS[host.layer] if host.layer and not bare else None, release, build)
    for folder in folders:
        os.utime(folder)
    return folders


def prepare(release: str, *, wheels: bool = True) -> None:
    """All that can be made before a host boots."""
    sys.dont_write_bytecode = True
    for folder in (WHEELHOUSE, MODELS):
        folder.mkdir(parents=True, exist_ok=True)
    with building("contents"):
        secrets_of_the_lab()
        if wheels:
            wheelhouse(release)
        models()
