#!/usr/bin/python
"""Bring a set of folders and small files to a state, in one task."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DOCUMENTATION = r"""
module: citadel_files
short_description: Bring folders and small files to a state, in one task
description:
  - One task instead of a looped ansible.builtin.file and a handful of templates, each of which costs half a second.
  - Everything is looked at, and every file that would change is validated, before the first change.
  - Works in check mode on a host that does not have the users or the folders yet.
options:
  directories:
    description:
      - Folders, parents first. Keys are C(path), C(owner), C(group), C(mode), C(state) (present or absent).
      - An absent folder is removed only if it is empty; one that is not is returned in C(kept).
    type: list
    elements: dict
    default: []
  files:
    description:
      - Files. Keys are C(path), C(content), C(mode), C(validate) (a command with C(%s)), C(state) (present or absent).
      - They belong to root; a missing parent folder is made.
    type: list
    elements: dict
    default: []
author: [Citadel LLM]
"""

EXAMPLES = r"""
- name: Lay out the application's folders
  citadel_files:
    directories:
      - {path: /opt/models, owner: agent0, group: agent0, mode: "0750"}
    files:
      - path: /etc/logrotate.d/citadel-llm
        content: "{{ lookup('ansible.builtin.template', 'logrotate.j2') }}"
        validate: logrotate -d %s
"""

RETURN = r"""
changed_paths:
  description: What was changed, or would be in check mode.
  type: list
  returned: always
kept:
  description: Folders that should go and are not empty.
  type: list
  returned: always
"""

Runner = Callable[[str], tuple[int, str, str]]


class RefusalError(Exception):
    """Something that cannot be done, said so that the operator knows what to do."""


@dataclass
class Result:
    changed_paths: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    diff: list[dict[str, str]] = field(default_factory=list)

    def note(self, path: str, before: str, after: str) -> None:
        if path not in self.changed_paths:
            self.changed_paths.append(path)
        self.diff.append({"before": before, "after": after, "before_header": path, "after_header": path})


def mode_of(entry: dict[str, Any], default: str) -> int:
    """A mode as text, in octal. YAML makes a number of 0750 without quotes: say so instead of guessing."""
    text = entry.get("mode", default)
    if not isinstance(text, str) or not text.strip("01234567") == "":
        raise RefusalError(f'mode {text!r} of {entry["path"]} is not octal text; write it in quotes, as in "0750"')
    return int(text, 8)


def describe(owner: str, group: str, mode: int) -> str:
    return f"{owner}:{group} {mode:04o}"


def refuse_unknown(entry: dict[str, Any], keys: set[str]) -> None:
    if not str(entry.get("path", "")).startswith("/"):
        raise RefusalError(f"{entry} has no absolute path")
    if entry.keys() - keys:
        raise RefusalError(f"{entry['path']}: unknown key {', '.join(sorted(entry.keys() - keys))}")
    if entry.get("state", "present") not in {"present", "absent"}:
        raise RefusalError(f"{entry['path']}: state is {entry['state']!r}; it can be present or absent")


class Tree:
    """``root`` is ``/``, in a test a folder that looks like one."""

    def __init__(self, root: Path, run: Runner, *, check: bool) -> None:
        self.root = root
        self.run = run
        self.check = check
        self.result = Result()

    def apply(self, directories: list[dict[str, Any]], files: list[dict[str, Any]]) -> Result:
        for entry in directories:
            refuse_unknown(entry, {"path", "owner", "group", "mode", "state"})
            mode_of(entry, "0755")
            if entry.get("state") != "absent" and not self.check:
                self._ids(entry)
        for entry in files:
            refuse_unknown(entry, {"path", "content", "mode", "validate", "state"})
            mode_of(entry, "0644")
        staged: dict[str, Path | None] = {}
        try:
            for entry in files:
                if entry.get("state") != "absent":
                    staged[entry["path"]] = self._stage(entry)
            for entry in directories:
                if entry.get("state") == "absent":
                    self._remove_folder(entry)
                else:
                    self._folder(entry)
            for entry in files:
                if entry.get("state") == "absent":
                    self._remove_file(entry)
                else:
                    self._file(entry, staged[entry["path"]])
        finally:
            for path in filter(None, staged.values()):
                path.unlink(missing_ok=True)
        return self.result

    def _at(self, entry: dict[str, Any]) -> Path:
        return self.root / str(entry["path"]).lstrip("/")

    def _ids(self, entry: dict[str, Any]) -> tuple[int, int]:
        owner, group = entry.get("owner", "root"), entry.get("group", entry.get("owner", "root"))
        try:
            return pwd.getpwnam(owner).pw_uid, grp.getgrnam(group).gr_gid
        except KeyError as error:
            raise RefusalError(
                f"{entry['path']} is to belong to {owner}:{group}, which this host does not know ({error.args[0]}). "
                "Users are made by the role base_system: add it to base_system_users, or name another owner"
            ) from None

    def _folder(self, entry: dict[str, Any]) -> None:
        path, mode = self._at(entry), mode_of(entry, "0755")
        owner, group = entry.get("owner", "root"), entry.get("group", entry.get("owner", "root"))
        wanted = describe(owner, group, mode)
        try:
            status = path.stat()
        except OSError:
            self.result.note(entry["path"], "", f"folder {wanted}\n")
            if self.check:
                return
            path.mkdir(mode=0o700, parents=True)
        else:
            if not stat.S_ISDIR(status.st_mode):
                raise RefusalError(f"{entry['path']} is there and is not a folder; move it away")
            has = describe(user_name(status.st_uid), group_name(status.st_gid), stat.S_IMODE(status.st_mode))
            if has == wanted:
                return
            self.result.note(entry["path"], f"folder {has}\n", f"folder {wanted}\n")
            if self.check:
                return
        os.chown(path, *self._ids(entry))
        path.chmod(mode)

    def _remove_folder(self, entry: dict[str, Any]) -> None:
        path = self._at(entry)
        if not path.is_dir():
            return
        if any(path.iterdir()):
            self.result.kept.append(f"{entry['path']} is not empty and stays; remove its content by hand")
            return
        self.result.note(entry["path"], "folder\n", "")
        if not self.check:
            path.rmdir()

    def _stage(self, entry: dict[str, Any]) -> Path | None:
        """The new content beside its place, validated; nothing if the file has it already."""
        path = self._at(entry)
        if read(path) == entry.get("content", ""):
            return None
        self.result.note(entry["path"], read(path) or "", entry.get("content", ""))
        if self.check:
            return None
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        staged = path.with_name(f".{path.name}.citadel")
        staged.write_text(entry.get("content", ""))
        staged.chmod(mode_of(entry, "0644"))
        if entry.get("validate"):
            code, out, err = self.run(entry["validate"] % staged)
            if code != 0:
                staged.unlink()
                said = (err.strip() or out.strip()).replace(str(staged), entry["path"])
                raise RefusalError(f"{entry['path']} is not accepted by `{entry['validate'].split()[0]}`: {said}")
        return staged

    def _file(self, entry: dict[str, Any], staged: Path | None) -> None:
        path = self._at(entry)
        if staged:
            staged.replace(path)
        try:
            status = path.stat()
        except OSError:
            return  # check mode
        has = describe(user_name(status.st_uid), group_name(status.st_gid), stat.S_IMODE(status.st_mode))
        wanted = describe(user_name(os.geteuid()), group_name(os.getegid()), mode_of(entry, "0644"))
        if has != wanted:
            self.result.note(entry["path"], f"{has}\n", f"{wanted}\n")
            if not self.check:
                os.chown(path, os.geteuid(), os.getegid())
                path.chmod(mode_of(entry, "0644"))

    def _remove_file(self, entry: dict[str, Any]) -> None:
        path = self._at(entry)
        if path.is_file() or path.is_symlink():
            self.result.note(entry["path"], read(path) or "", "")
            if not self.check:
                path.unlink()


def read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def user_name(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def group_name(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def main() -> None:
    from ansible.module_utils.basic import AnsibleModule  # only Ansible has it; the classes above are tested without

    module = AnsibleModule(
        argument_spec={
            "directories": {"type": "list", "elements": "dict", "default": []},
            "files": {"type": "list", "elements": "dict", "default": []},
        },
        supports_check_mode=True,
    )
    tree = Tree(Path("/"), module.run_command, check=module.check_mode)
    try:
        result = tree.apply(module.params["directories"], module.params["files"])
    except (RefusalError, OSError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(
        changed=bool(result.changed_paths),
        changed_paths=result.changed_paths,
        kept=result.kept,
        diff=result.diff,
    )


if __name__ == "__main__":
    main()
