"""A set of files that belong together: staged, checked, swapped, loaded, verified; or as it was before.

What a service reads changes at once or not at all. The steps, each of which can end it:

1. stage   every file that differs, beside its place; the folder that is ours as a whole copy, so that the checkers see
           the set as it will be (in staged text its path is replaced by the copy's)
2. check   the services' own checkers, on what was staged: nothing that is served has been touched yet
3. swap    by rename, one after another, the old files kept
4. reload  the services of which a file changed, or that run on older files than those on disk
5. verify  that the service says it has loaded this set
6. back    if 4 or 5 failed: the old files, another reload, and a refusal that says what was wrong
"""

from __future__ import annotations

import grp
import hashlib
import http.client
import json
import os
import pwd
import re
import shutil
import stat
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

Runner = Callable[[Sequence[str]], tuple[int, str, str]]


class RefusalError(Exception):
    """The set is not on the host; the message says why, and what to do."""


@dataclass(frozen=True)
class File:
    """``base``: sha256 of the text that `content` was made from. Such a file is somebody else's: it must be there,
    keeps its owner and mode, and must not have changed since. ``owner`` empty: whoever runs this.
    """

    path: str
    content: str = ""
    mode: str = "0644"
    owner: str = "root"
    group: str = "root"
    state: str = "present"
    secret: bool = False
    base: str = ""


@dataclass(frozen=True)
class Service:
    """``config`` and the folders of ``reads`` are what it loads when it is told to. Without ``url`` it is not asked."""

    name: str  # prometheus or alertmanager
    unit: str
    config: str
    check: list[str] = field(default_factory=list)  # {config} is replaced by the file to check
    reads: list[str] = field(default_factory=list)
    url: str = ""
    jobs: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    receivers: list[str] = field(default_factory=list)
    folder: str = ""  # rule files below it are ours: no other group of theirs may be loaded


@dataclass
class Result:
    changed_paths: list[str] = field(default_factory=list)
    reloaded: list[str] = field(default_factory=list)
    diff: list[dict[str, str]] = field(default_factory=list)


@dataclass
class Step:
    """One file to be written or removed."""

    path: Path
    wanted: File | None  # None: to be removed
    old: bytes | None
    status: os.stat_result | None
    staged: Path | None = None


class ConfigSet:
    """``tree``: the folder that is copied for the checkers. Files in the ``owned`` folders that are not in the set go.
    ``wait``: seconds that a service has to load its files, and to say so.
    """

    def __init__(
        self,
        files: Sequence[File],
        services: Sequence[Service],
        *,
        tree: str,
        owned: Sequence[str] = (),
        run: Runner,
        check: bool = False,
        wait: float = 30.0,
    ) -> None:
        self.files = files
        self.services = services
        self.tree = Path(tree)
        self.copy = Path(f"{tree}.staged")
        self.owned = [Path(folder) for folder in owned]
        self.run = run
        self.check = check
        self.wait = wait
        self.result = Result()

    def apply(self) -> Result:
        steps = self.plan()
        for step in steps:
            self.result.changed_paths.append(str(step.path))
            self.result.diff.append(difference(step))
        late = [] if self.check else [service for service in self.services if self.stale(service)]
        if not self.check and steps:
            try:
                self.stage(steps)
                self.check_staged(steps)
                due = [service for service in self.services if service in late or self.concerns(service, steps)]
                self.swap(steps, due)
            finally:
                self.clean(steps)
        elif late:
            self.load(late)
        elif not self.check:
            for service in self.services:
                self.verify(service)
        return self.result

    # ------------------------------------------------------------------ what is to be done

    def plan(self) -> list[Step]:
        steps = []
        wanted = {file.path for file in self.files if file.state == "present"}
        for file in self.files:
            path = Path(file.path).resolve() if file.base else Path(file.path)  # a link of the operator's stays one
            old, status = read(path)
            if file.base and hashlib.sha256(old or b"").hexdigest() != file.base:
                raise RefusalError(f"{path} was changed by somebody else while this ran; run it again")
            if file.state == "absent":
                if old is not None:
                    steps.append(Step(path, None, old, status))
            elif old != file.content.encode() or (not file.base and status and described(status) != wanted_of(file)):
                steps.append(Step(path, file, old, status))
        for folder in self.owned:
            for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
                if str(path) not in wanted and not path.is_dir() and path not in {step.path for step in steps}:
                    steps.append(Step(path, None, *read(path)))
        return steps

    def concerns(self, service: Service, steps: Sequence[Step]) -> bool:
        return any(self.read_by(service, step.path) for step in steps)

    def read_by(self, service: Service, path: Path) -> bool:
        return path == Path(service.config).resolve() or any(path.is_relative_to(folder) for folder in service.reads)

    def stale(self, service: Service) -> bool:
        """Whether it runs on older files than those on disk: true after a run that was killed before the reload."""
        paths = [Path(service.config), *(path for folder in service.reads for path in Path(folder).rglob("*"))]
        times = [path.stat().st_ctime for path in paths if path.is_file()]
        if not service.url or not times:
            return False
        figures = self.figures(service)
        return not figures["successful"] or figures["timestamp"] < max(times)

    # ------------------------------------------------------------------ stage and check

    def ids(self, file: File) -> tuple[int, int, int]:
        """Owner, group and mode as numbers."""
        if file.base:
            status = Path(file.path).stat()
            return status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)
        if not file.owner:
            return os.geteuid(), os.getegid(), int(file.mode, 8)
        try:
            return pwd.getpwnam(file.owner).pw_uid, grp.getgrnam(file.group).gr_gid, int(file.mode, 8)
        except KeyError as error:
            raise RefusalError(
                f"{file.path} is to belong to {file.owner}:{file.group}, which this host does not know "
                f"({error.args[0]}): install the packages of the service, or name another owner"
            ) from None

    def write(self, path: Path, file: File, content: str) -> None:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", newline="") as out:
            out.write(content)
        uid, gid, mode = self.ids(file)
        os.chown(path, uid, gid)
        path.chmod(mode)

    def stage(self, steps: Sequence[Step]) -> None:
        shutil.rmtree(self.copy, ignore_errors=True)
        if self.services:
            self.copy.mkdir(mode=0o700, parents=True)
            if self.tree.is_dir():
                shutil.copytree(self.tree, self.copy, dirs_exist_ok=True)
                self.copy.chmod(0o700)
        for step in steps:
            if self.services and step.path.is_relative_to(self.tree):
                copied = self.copy / step.path.relative_to(self.tree)
                if step.wanted:
                    self.write(copied, step.wanted, self.moved(step.wanted.content))
                else:
                    copied.unlink(missing_ok=True)
            if step.wanted:
                step.staged = step.path.with_name(f".{step.path.name}.citadel")
                self.write(step.staged, step.wanted, step.wanted.content)

    def moved(self, text: str) -> str:
        return text.replace(f"{self.tree}/", f"{self.copy}/")

    def check_staged(self, steps: Sequence[Step]) -> None:
        for service in self.services:
            if not service.check or not self.concerns(service, steps):
                continue
            wanted = next((file for file in self.files if file.path == service.config), None)
            text = wanted.content if wanted else Path(service.config).read_text()
            trial = Path(service.config).with_name(f".{Path(service.config).name}.trial")
            try:
                owner = wanted or File(service.config, mode="0600")
                self.write(trial, owner, self.moved(text))
                code, out, err = self.run([part.replace("{config}", str(trial)) for part in service.check])
            finally:
                trial.unlink(missing_ok=True)
            if code != 0:
                said = shortened(f"{out}\n{err}").replace(str(trial), service.config)
                said = said.replace(str(self.copy), str(self.tree))
                before = self.run([part.replace("{config}", service.config) for part in service.check])[0]
                why = "It was refused before our change too: mend it first. " if before != 0 else ""
                raise RefusalError(
                    f"{service.check[0]} does not accept {service.config} with our part. {why}Nothing was changed. "
                    f"It says: {said}"
                )

    # ------------------------------------------------------------------ swap, load, and back

    def swap(self, steps: Sequence[Step], due: Sequence[Service]) -> None:
        try:
            for step in steps:
                if step.staged:
                    step.staged.replace(step.path)
                else:
                    step.path.unlink(missing_ok=True)
            self.load(due)
        except (RefusalError, OSError) as error:
            self.back(steps, due, str(error))
        for service in self.services:
            if service not in due:
                self.verify(service)
        self.tidy()

    def load(self, due: Sequence[Service]) -> None:
        for service in due:
            self.reload(service)
            self.verify(service)
            self.result.reloaded.append(service.name)

    def back(self, steps: Sequence[Step], due: Sequence[Service], why: str) -> None:
        for step in reversed(steps):
            if step.old is None or step.status is None:
                step.path.unlink(missing_ok=True)
                continue
            restored = step.path.with_name(f".{step.path.name}.citadel")
            restored.unlink(missing_ok=True)
            with os.fdopen(os.open(restored, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
                out.write(step.old)
            os.chown(restored, step.status.st_uid, step.status.st_gid)
            restored.chmod(stat.S_IMODE(step.status.st_mode))
            os.utime(restored, ns=(step.status.st_atime_ns, step.status.st_mtime_ns))
            restored.replace(step.path)
        self.tidy()
        worse = []
        for service in due:
            try:
                self.reload(service)
            except RefusalError as error:
                worse.append(str(error))
        kept = "The old files are back and loaded." if not worse else f"The old files are back, but: {' '.join(worse)}"
        raise RefusalError(f"{why} {kept}")

    def reload(self, service: Service) -> None:
        started = time.time()
        before = self.figures(service) if service.url else {}
        code, out, err = self.run(["systemctl", "reload", service.unit])
        if code != 0:
            raise RefusalError(f"systemctl reload {service.unit} failed: {shortened(out + err)}")
        end = time.monotonic() + self.wait
        while service.url:
            figures = self.figures(service, patient=True)
            if figures["successful"] and figures["timestamp"] > before["timestamp"]:
                return
            # After an earlier failure the figure says nothing of this attempt, so only the time can tell.
            if (before["successful"] and not figures["successful"]) or time.monotonic() > end:
                raise RefusalError(f"{service.unit} does not load its files. {self.journal(service, started)}")
            time.sleep(0.1)

    def journal(self, service: Service, since: float) -> str:
        command = [
            "journalctl",
            "--no-pager",
            "--quiet",
            "--output=cat",
            f"--since=@{int(since)}",
            f"--unit={service.unit}",
        ]
        lines = [line for line in self.run(command)[1].splitlines() if "err=" in line or "error" in line.lower()]
        return (
            f"Its journal says: {shortened(' '.join(lines[-3:]))}"
            if lines
            else f"Its journal says more: journalctl -u {service.unit}"
        )

    # ------------------------------------------------------------------ what the service says

    def ask(self, url: str) -> str:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(url, timeout=10) as reply:
                text: str = reply.read().decode()
                return text
        except http.client.HTTPException as error:  # an answer that breaks off
            raise OSError(repr(error)) from None

    def figures(self, service: Service, *, patient: bool = False) -> dict[str, float]:
        """Time of the last load that succeeded, and whether there was none since that did not."""
        prefix = f"{service.name}_config_last_reload_"
        end = time.monotonic() + (5 if patient else 0)
        while True:
            try:
                text = self.ask(f"{service.url}/metrics")
                break
            except (urllib.error.URLError, OSError) as error:
                if time.monotonic() >= end:
                    raise RefusalError(
                        f"{service.unit} does not answer at {service.url}/metrics ({error}): start it, or correct "
                        "the URL"
                    ) from None
                time.sleep(0.2)
        found = dict(re.findall(rf"^{prefix}(successful|success_timestamp_seconds)\s+(\S+)", text, re.MULTILINE))
        if len(found) != 2:
            raise RefusalError(f"{service.url}/metrics has no {prefix}*: it is not the {service.name} that is meant")
        return {"successful": float(found["successful"]), "timestamp": float(found["success_timestamp_seconds"])}

    def verify(self, service: Service) -> None:
        """Raises RefusalError, after some patience, if what was loaded is not this set."""
        end = time.monotonic() + self.wait
        while service.url:
            try:
                missing = self.missing(service)
            except (urllib.error.URLError, OSError, ValueError, KeyError) as error:
                missing = [f"an answer ({error})"]
            if not missing:
                return
            if time.monotonic() > end:
                raise RefusalError(f"{service.unit} took its files, but lacks {', '.join(missing)}.")
            time.sleep(0.2)

    def missing(self, service: Service) -> list[str]:
        if service.name == "alertmanager":
            text = json.loads(self.ask(f"{service.url}/api/v2/status"))["config"]["original"]
            have = set(re.findall(r"^- name: [\"']?([^\s\"']+)", text, re.MULTILINE))
            return [f"the receiver {name}" for name in service.receivers if name not in have]
        text = json.loads(self.ask(f"{service.url}/api/v1/status/config"))["data"]["yaml"]
        have = set(re.findall(r"^- job_name: [\"']?([^\s\"']+)", text, re.MULTILINE))
        lacking = [f"the job {name}" for name in service.jobs if name not in have]
        loaded = json.loads(self.ask(f"{service.url}/api/v1/rules"))["data"]["groups"]
        mine = {group["name"] for group in loaded if service.folder and group["file"].startswith(f"{service.folder}/")}
        lacking += [f"the rule group {name}" for name in service.groups if name not in mine]
        return lacking + [f"to forget the rule group {name}" for name in sorted(mine - set(service.groups))]

    # ------------------------------------------------------------------

    def tidy(self) -> None:
        for folder in self.owned:
            prune(folder)
        if self.tree.is_dir() and not any(self.tree.iterdir()):
            self.tree.rmdir()

    def clean(self, steps: Sequence[Step]) -> None:
        shutil.rmtree(self.copy, ignore_errors=True)
        for step in steps:
            if step.staged:
                step.staged.unlink(missing_ok=True)


def read(path: Path) -> tuple[bytes | None, os.stat_result | None]:
    try:
        return path.read_bytes(), path.stat()
    except OSError:
        return None, None


def prune(folder: Path) -> None:
    """Remove empty folders, this one too."""
    for path in sorted(folder.rglob("*"), reverse=True) if folder.is_dir() else ():
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def wanted_of(file: File) -> str:
    owner = f"{file.owner}:{file.group}" if file.owner else names(os.geteuid(), os.getegid())
    return f"{owner} {int(file.mode, 8):04o}"


def described(status: os.stat_result) -> str:
    return f"{names(status.st_uid, status.st_gid)} {stat.S_IMODE(status.st_mode):04o}"


def names(uid: int, gid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name}:{grp.getgrgid(gid).gr_name}"
    except KeyError:
        return f"{uid}:{gid}"


def difference(step: Step) -> dict[str, str]:
    """Of a file of somebody else's our blocks alone; of a secret nothing."""
    before, after = (step.old or b"").decode("utf-8", "replace"), step.wanted.content if step.wanted else ""
    if (step.wanted and step.wanted.secret) or (not step.wanted and step.status and not step.status.st_mode & 0o004):
        before, after = "(a secret)\n" if step.old else "", "(a secret, changed)\n" if step.wanted else ""
    elif step.wanted and step.wanted.base:
        before, after = blocks(before), blocks(after)
    return {"before": before, "after": after, "before_header": str(step.path), "after_header": str(step.path)}


def blocks(text: str) -> str:
    """The marked blocks of a text: what is around them may hold somebody else's passwords. The path of an address that
    something is posted to may be a secret too: it is given as its hash, so that a change of it is seen.
    """
    found = re.findall(r"^[ ]*# BEGIN CITADEL[^\n]*\n(?:.*\n)*?[ ]*# END CITADEL[^\n]*", text, re.MULTILINE)
    return re.sub(r"(\burl: [\"']?https?://[^/\s]+/)([^\s\"']+)", hashed, "".join(f"{block}\n" for block in found))


def hashed(address: re.Match[str]) -> str:
    return f"{address[1]}(sha256 {hashlib.sha256(address[2].encode()).hexdigest()[:8]})"


def shortened(text: str, limit: int = 600) -> str:
    return " ".join(text.split())[-limit:]
