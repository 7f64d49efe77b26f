"""Dashboards in the lab's stand-in for Grafana: ours alone, once, and gone again."""

import importlib.util
import json
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from modules.citadel_dashboards import Call, Folder, RefusalError, Result, caller

ROOT = Path(__file__).resolve().parents[2]
THEIRS = {"uid": "own", "title": "Own"}
MINE: list[dict[str, Any]] = [
    {"uid": "citadel-a", "title": "A", "panels": []},
    {"uid": "citadel-b", "title": "B", "panels": [{"id": 1}]},
]


@pytest.fixture
def stand_in() -> Iterator[tuple[ModuleType, str]]:
    """The module of the stand-in, with an empty store, and where it answers."""
    where = ROOT / "lab/fixtures/stand_in_grafana.py"
    spec = importlib.util.spec_from_file_location("stand_in_grafana", where)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    server = ThreadingHTTPServer(("127.0.0.1", 0), module.Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield module, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def call(stand_in: tuple[ModuleType, str]) -> Call:
    module, url = stand_in
    return caller(url, module.TOKEN)


def folder(call: Call, *, check: bool = False) -> Folder:
    return Folder(call, "citadel", "Citadel LLM", "citadel-", check=check)


def bring(call: Call, dashboards: list[dict[str, Any]], *, check: bool = False) -> Result:
    return folder(call, check=check).bring(dashboards)


def uids(call: Call) -> set[str]:
    return {entry["uid"] for entry in call("GET", "/api/search", None)[1]}


def test_pushed_once_and_only_what_differs(call: Call) -> None:
    assert bring(call, MINE, check=True).changed_dashboards == ["citadel-a", "citadel-b"]
    assert uids(call) == set()
    assert bring(call, MINE).changed_dashboards == ["citadel-a", "citadel-b"]
    assert bring(call, MINE).changed_dashboards == []
    changed = bring(call, [{**MINE[0], "title": "A again"}, MINE[1]])
    assert changed.changed_dashboards == ["citadel-a"]
    assert '"A again"' in changed.diff[0]["after"]
    assert call("GET", "/api/dashboards/uid/citadel-a", None)[1]["dashboard"]["version"] == 2


def test_what_others_have_stays(call: Call) -> None:
    call("POST", "/api/dashboards/db", {"dashboard": THEIRS})
    bring(call, MINE)
    call("POST", "/api/dashboards/db", {"dashboard": {**THEIRS, "uid": "in-our-folder"}, "folderUid": "citadel"})
    assert bring(call, MINE[:1]).changed_dashboards == ["citadel-b"]
    assert folder(call).take_away().changed_dashboards == ["citadel-a"]
    assert uids(call) == {"own", "in-our-folder"}
    assert call("GET", "/api/folders/citadel", None)[0] == 200, "a folder that somebody else uses stays"


def test_taken_away_it_leaves_no_trace(call: Call) -> None:
    bring(call, MINE)
    assert folder(call, check=True).take_away().changed_dashboards == ["citadel-a", "citadel-b"]
    folder(call).take_away()
    assert uids(call) == set()
    assert call("GET", "/api/folders/citadel", None)[0] == 404
    assert folder(call).take_away().changed_dashboards == []


def test_a_uid_in_another_folder_is_not_overwritten_and_nothing_else_is_pushed(call: Call) -> None:
    call("POST", "/api/dashboards/db", {"dashboard": {**THEIRS, "uid": "citadel-b"}})
    with pytest.raises(RefusalError, match=r"citadel-b is in the folder General, not in citadel: move it there"):
        bring(call, MINE)
    assert uids(call) == {"citadel-b"}


@pytest.mark.parametrize("dashboards", [[THEIRS], [MINE[0], MINE[0]], [{"title": "without"}]])
def test_a_uid_is_ours_and_there_once(call: Call, dashboards: list[dict[str, Any]]) -> None:
    with pytest.raises(RefusalError, match="one of its own that starts with citadel-"):
        bring(call, dashboards)


def test_a_change_is_noted_on_the_time_line_once(call: Call) -> None:
    for _ in range(2):
        work = folder(call)
        work.bring(MINE)
        work.annotate("release 1")
    assert [entry["tags"] for entry in call("GET", "/api/annotations", None)[1]] == [["citadel", "deploy"]]


def test_a_wrong_token_and_a_grafana_that_is_away_are_said_with_the_remedy(stand_in: tuple[ModuleType, str]) -> None:
    with pytest.raises(RefusalError, match=r"answers 401 .*: give the token a service account with the role Editor"):
        bring(caller(stand_in[1], "wrong"), MINE)
    with pytest.raises(RefusalError, match=r"does not answer at http://127.0.0.1:1 .*set monitoring_grafana to none"):
        bring(caller("http://127.0.0.1:1", "x"), MINE)
    with pytest.raises(RefusalError, match="begin it with http"):
        caller("file:///etc/passwd", "x")


def test_the_stand_in_says_that_it_is_one(call: Call, stand_in: tuple[ModuleType, str]) -> None:
    assert "stand-in" in json.dumps(call("GET", "/api/health", None)[1])
