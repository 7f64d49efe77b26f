"""citadel_files against a folder that looks like a host."""

import getpass
import grp
import os
from pathlib import Path
from typing import Any

import pytest
from modules.citadel_files import RefusalError, Result, Tree, group_name, user_name

ME = getpass.getuser()
MINE = grp.getgrgid(os.getgid()).gr_name


def apply(
    root: Path,
    *,
    directories: list[dict[str, Any]] | None = None,
    files: list[dict[str, Any]] | None = None,
    check: bool = False,
    verdict: tuple[int, str, str] = (0, "", ""),
    ran: list[str] | None = None,
) -> Result:
    def run(command: str) -> tuple[int, str, str]:
        if ran is not None:
            ran.append(command)
        return verdict

    return Tree(root, run, check=check).apply(directories or [], files or [])


def folder(path: str = "/opt/models", **other: Any) -> dict[str, Any]:
    return {"path": path, "owner": ME, "group": MINE, "mode": "0750", **other}


def test_makes_folders_once(tmp_path: Path) -> None:
    assert apply(tmp_path, directories=[folder("/opt"), folder()]).changed_paths == ["/opt", "/opt/models"]
    assert (tmp_path / "opt/models").stat().st_mode & 0o7777 == 0o750
    assert apply(tmp_path, directories=[folder("/opt"), folder()]).changed_paths == []


def test_brings_a_changed_mode_back(tmp_path: Path) -> None:
    apply(tmp_path, directories=[folder()])
    (tmp_path / "opt/models").chmod(0o777)
    result = apply(tmp_path, directories=[folder()])
    assert result.diff[0]["before"] == f"folder {ME}:{MINE} 0777\n"
    assert (tmp_path / "opt/models").stat().st_mode & 0o7777 == 0o750


def test_check_mode_needs_neither_folder_nor_user(tmp_path: Path) -> None:
    files = [{"path": "/etc/new/file", "content": "x\n"}]
    result = apply(tmp_path, directories=[folder(owner="nobody-yet")], files=files, check=True)
    assert result.changed_paths == ["/etc/new/file", "/opt/models"]
    assert list(tmp_path.iterdir()) == []


def test_check_mode_leaves_a_wrong_mode(tmp_path: Path) -> None:
    apply(tmp_path, directories=[folder()], files=[{"path": "/f", "content": "x"}])
    (tmp_path / "opt/models").chmod(0o777)
    (tmp_path / "f").chmod(0o600)
    files = [{"path": "/f", "content": "x"}]
    assert apply(tmp_path, directories=[folder()], files=files, check=True).changed_paths == ["/opt/models", "/f"]
    assert (tmp_path / "opt/models").stat().st_mode & 0o7777 == 0o777
    assert apply(tmp_path, directories=[folder()], files=files).changed_paths == ["/opt/models", "/f"]
    assert (tmp_path / "f").stat().st_mode & 0o7777 == 0o644


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (folder(owner="nobody-yet"), "base_system_users"),
        (folder(mode=750), "in quotes"),
        (folder(mode="rwx"), "in quotes"),
        (folder(mod="0750"), "unknown key mod"),
        (folder("relative"), "no absolute path"),
        (folder(state="gone"), "present or absent"),
    ],
)
def test_refusals_name_the_remedy(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    with pytest.raises(RefusalError, match=message):
        apply(tmp_path, directories=[entry])


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "opt").write_text("")
    with pytest.raises(RefusalError, match="not a folder"):
        apply(tmp_path, directories=[folder("/opt")])


def test_absent_folder_goes_only_if_empty(tmp_path: Path) -> None:
    apply(tmp_path, directories=[folder("/opt"), folder()])
    gone = [folder(state="absent"), folder("/opt", state="absent"), folder("/never", state="absent")]
    (tmp_path / "opt/other").write_text("")
    result = apply(tmp_path, directories=gone)
    assert result.changed_paths == ["/opt/models"]
    assert result.kept == ["/opt is not empty and stays; remove its content by hand"]


def test_writes_a_file_once(tmp_path: Path) -> None:
    files = [{"path": "/etc/a.d/x", "content": "one\n"}]
    ran: list[str] = []
    assert apply(tmp_path, files=files, ran=ran).changed_paths == ["/etc/a.d/x"]
    assert (tmp_path / "etc/a.d/x").read_text() == "one\n"
    assert apply(tmp_path, files=files).changed_paths == []
    assert ran == []
    assert [p.name for p in (tmp_path / "etc/a.d").iterdir()] == ["x"]


def test_nothing_is_written_if_one_file_is_refused(tmp_path: Path) -> None:
    good = {"path": "/etc/good", "content": "fine"}
    bad = {"path": "/etc/bad", "content": "broken", "validate": "checker -f %s"}
    ran: list[str] = []
    with pytest.raises(RefusalError, match=r"/etc/bad is not accepted by `checker`: line 1 of /etc/bad"):
        apply(tmp_path, files=[bad], verdict=(1, "", f"line 1 of {tmp_path}/etc/.bad.citadel"), ran=ran)
    with pytest.raises(RefusalError):
        apply(tmp_path, files=[good, bad], verdict=(1, "no", ""))
    assert ran == [f"checker -f {tmp_path}/etc/.bad.citadel"]
    assert list((tmp_path / "etc").iterdir()) == []


def test_removes_a_file(tmp_path: Path) -> None:
    apply(tmp_path, files=[{"path": "/x", "content": "1"}])
    gone = [{"path": "/x", "state": "absent"}]
    assert apply(tmp_path, files=gone, check=True).changed_paths == ["/x"]
    assert apply(tmp_path, files=gone).changed_paths == ["/x"]
    assert apply(tmp_path, files=gone).changed_paths == []


def test_unknown_numbers_stay_numbers() -> None:
    assert user_name(3999999999) == "3999999999"
    assert group_name(3999999999) == "3999999999"
