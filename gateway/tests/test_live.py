"""The live page's files and its WebSocket; tests/browser looks at it with a browser."""

import asyncio
import re
import time
from pathlib import Path
from typing import Any

import pytest
from citadel_gateway.control import live as module
from citadel_gateway.control.sql import DatabaseAwayError
from citadel_gateway.control.sql.tables import usage_daily
from websockets.exceptions import InvalidStatus

from gateway.tests.client import ADMIN, KEY, ask, get, head_of, post, until
from gateway.tests.live_site import ALERTER, READER, LiveSite, closed, said, say
from gateway.tests.test_alerts import notification, one
from gateway.tests.test_streams import merged


async def test_the_page_needs_no_key_and_has_no_figures(live: LiveSite) -> None:
    page = await get(live.port, "/live", "")
    assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    names = set(re.findall(r'(?:src|href)="([^"]+)"', page.body.decode()))
    assert names == {"/live/icon.svg", "/live/live.css", "/live/live.js"}
    for name in (*names, "/live/draw.js"):
        assert (await get(live.port, name, "")).status == 200
    for name in ("/live/live.html", "/live/..%2fapp.py", "/live/nothing", "/live/"):
        assert (await get(live.port, name, "")).status in (307, 404)


async def test_a_browser_need_not_load_it_twice(live: LiveSite) -> None:
    tag = (await get(live.port, "/live", "")).headers["etag"]
    again = await ask(live.port, head_of("GET", "/live", {"If-None-Match": tag}))
    assert (again.status, again.body) == (304, b"")


def test_nothing_inline_and_nothing_from_elsewhere() -> None:
    for path in module.PAGE.iterdir():
        text = path.read_text()
        assert not re.search(
            r"<script(?![^>]*src=)|<style|\sstyle=|\son[a-z]+=|innerHTML|eval\(|@import|localStorage", text
        )
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)[a-z]", text), path


async def test_everything_first_then_what_changes(live: LiveSite) -> None:
    await ask(live.port, post("/v1/alerts", notification(one()), key=ALERTER))
    async with live.socket("/live/ws", key="") as socket:
        await say(socket, type="auth", key=READER)
        first = await said(socket)
        assert first["type"] == "snapshot"
        assert [alert["fingerprint"] for alert in first["alerts"]] == ["f1"]
        assert first["history"]["seconds"] == 2
        figures = first["figures"]
        await ask(live.port, post("/admin/models/one/drain", b"", key=ADMIN))
        await ask(live.port, post("/v1/alerts", notification(one(status="resolved")), key=ALERTER))
        kinds: list[str] = []
        while "alerts" not in kinds or figures["models"]["one"]["state"] != "draining":
            live.part("live").look()
            message = await said(socket)
            kinds.append(message["type"])
            if message["type"] == "delta":
                figures = merged(figures, message["figures"])
            else:
                assert message["alerts"][0]["status"] == "resolved"


async def test_who_may_look(live: LiveSite) -> None:
    for key in (READER, ADMIN):
        async with live.socket("/live/ws", key=key) as socket:
            assert (await said(socket))["type"] == "snapshot"
    with pytest.raises(InvalidStatus):
        await live.socket("/live/ws", key=KEY)
    async with live.socket("/live/ws", key=READER) as socket:
        await said(socket)
        live.site.keys = [key for key in live.site.keys if key["id"] != "reader"]
        live.site.write()
        live.state.look()
        live.part("live").look()
        assert await closed(socket) == (1008, "invalid_api_key")


async def test_an_open_page_does_not_hold_up_a_stop(live: LiveSite) -> None:
    async with live.socket("/live/ws", key=READER) as socket:
        await said(socket)
        started = time.monotonic()
        await live.stop()
        assert time.monotonic() - started < 5
        assert await closed(socket) == (1012, "restarting")


async def test_cost_of_today(live: LiveSite, monkeypatch: pytest.MonkeyPatch) -> None:
    found = live.part("live")

    def spend() -> None:
        day = time.strftime("%Y-%m-%d", time.gmtime())
        with live.state.database.begin() as connection:
            for user, cost in (("a", 1.5), ("b", 0.25)):
                row = {"day": day, "user_id": user, "key_id": "k", "model": "one", "cost_usd": cost}
                connection.execute(usage_daily.insert().values(**row))

    await asyncio.to_thread(spend)
    await asyncio.to_thread(found.price)
    found.look()
    assert found.figures["models"]["one"]["cost_today_usd"] == 1.75

    def away() -> Any:
        raise DatabaseAwayError

    monkeypatch.setattr(live.state.database, "read", away)
    await asyncio.to_thread(found.price)
    found.look()
    assert "cost_today_usd" not in found.figures["models"]["one"]


async def test_others_can_follow(live: LiveSite) -> None:
    seen: list[float] = []

    async def follow() -> None:
        async for figures in live.part("live").updates():
            seen.append(figures["workers"])  # noqa: PERF401  # one by one, without end

    task = asyncio.create_task(follow())
    await until(lambda: seen)
    live.part("live").look()
    await until(lambda: len(seen) >= 2)
    task.cancel()


def test_the_files_are_part_of_the_package() -> None:
    assert {path.name for path in Path(module.PAGE).iterdir()} == {name for name, _ in module.FILES.values()}
