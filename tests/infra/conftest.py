"""What the infrastructure tests share; molecule/conftest.py is a link to this file, so that every scenario has it too.

The tests read and never change, on any host of any inventory. With ``--criteria`` (``make validate``) each test is one
line: the host, what was asked, and when it failed, why.
"""

import json
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import pytest
from testinfra.host import Host

# Sent to the host's own Python: a request as one of the host's users; the key is read from its file there and is never
# on a command line.
_FETCH = """
import http.client, json, os, pwd, urllib.request, urllib.error, sys
a = json.loads(sys.argv[1])
headers = dict(a["headers"])
if a["key_file"]:
    headers["Authorization"] = "Bearer " + open(a["key_file"]).read().strip()
if a["user"]:
    who = pwd.getpwnam(a["user"])
    os.setgroups([]); os.setgid(who.pw_gid); os.setuid(who.pw_uid)
body = None if a["body"] is None else json.dumps(a["body"]).encode()
if body is not None:
    headers.setdefault("Content-Type", "application/json")
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
try:
    with opener.open(urllib.request.Request(a["url"], body, headers, method=a["method"]), timeout=a["timeout"]) as r:
        answer = {"status": r.status, "body": r.read().decode("utf-8", "replace"), "headers": dict(r.headers)}
except urllib.error.HTTPError as e:
    answer = {"status": e.code, "body": e.read().decode("utf-8", "replace"), "headers": dict(e.headers)}
except (OSError, http.client.HTTPException) as e:
    answer = {"status": 0, "body": str(e), "headers": {}}
print(json.dumps(answer))
"""


@dataclass(frozen=True)
class Answer:
    """What a URL answered; ``status`` 0 and the reason in ``body`` if there was no answer at all."""

    status: int
    body: str
    headers: dict[str, str]

    def json(self) -> Any:
        return json.loads(self.body)


class Unit:
    """A systemd unit of the host; a failed assertion shows the end of its journal."""

    def __init__(self, host: Host, name: str) -> None:
        self.host = host
        self.name = name

    def show(self, *properties: str) -> dict[str, str]:
        """Properties as systemd has them in effect, by name."""
        out = self.host.check_output("systemctl show --property=%s %s", ",".join(properties), self.name)
        return dict(line.split("=", 1) for line in out.splitlines() if "=" in line)

    def journal(self, lines: int = 20) -> str:
        return str(self.host.run("journalctl --no-pager --lines=%s --unit=%s", str(lines), self.name).stdout)

    def assert_active(self) -> None:
        state = self.show("ActiveState", "SubState", "Result", "StatusText")
        what = f"{self.name} is {state['ActiveState']} ({state['SubState']}, {state['Result']})"
        assert state["ActiveState"] == "active", f"{what}; its journal ends:\n{self.journal()}"

    def assert_enabled(self) -> None:
        state = self.show("UnitFileState")["UnitFileState"]
        assert state in {"enabled", "enabled-runtime", "static", "generated"}, (
            f"{self.name} is {state or 'not known to systemd'}"
        )


@pytest.fixture
def unit(host: Host) -> Callable[[str], Unit]:
    """``unit("citadel-llm@phi-3-mini.service").assert_active()``."""
    return lambda name: Unit(host, name)


@pytest.fixture
def read_json(host: Host) -> Callable[[str], Any]:
    """A JSON file of the host: expectations come from what was deployed, so that a test fits any inventory."""
    return lambda path: json.loads(host.file(path).content_string)


@pytest.fixture
def fetch(host: Host) -> Callable[..., Answer]:
    """``fetch(url, user="citadel-gateway", key_file="/etc/citadel-llm/keys/engine")``, asked on the host itself."""

    def ask(
        url: str,
        *,
        user: str = "",
        key_file: str = "",
        method: str = "",
        body: Any = None,
        headers: dict[str, str] | None = None,
        timeout: float = 30,
    ) -> Answer:
        request = {
            "url": url,
            "user": user,
            "key_file": key_file,
            "method": method or ("GET" if body is None else "POST"),
            "body": body,
            "headers": headers or {},
            "timeout": timeout,
        }
        return Answer(**json.loads(host.check_output("/usr/bin/python3 -c %s %s", _FETCH, json.dumps(request))))

    return ask


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("citadel").addoption("--criteria", action="store_true", help="one line for each criterion")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--criteria"):
        config.option.tbstyle, config.option.reportchars, config.option.no_header = "no", "N", True
        config.pluginmanager.register(Criteria(config), "criteria")


WORDS = {
    "passed": ("ok  ", {"green": True}),
    "failed": ("FAIL", {"red": True}),
    "skipped": ("n/a ", {"yellow": True}),
}


class Criteria:
    """Prints each test as a criterion and, of a failed one, the first line of the reason."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        said = getattr(getattr(item, "function", None), "__doc__", None)
        words = (
            (said or getattr(item, "originalname", item.name).removeprefix("test_").replace("_", " "))
            .strip()
            .splitlines()[0]
        )
        params = getattr(getattr(item, "callspec", None), "params", {})
        backend = getattr(params.get("_testinfra_host"), "backend", None)
        others = [str(value) for name, value in params.items() if name != "_testinfra_host"]
        report.user_properties.append(("host", backend.get_hostname() if backend else "-"))
        report.user_properties.append(("criterion", " ".join([words.rstrip("."), *(f"[{value}]" for value in others)])))
        return report

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        if report.when == "call" or not report.passed:
            return report.outcome, "", ""
        return None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        assert terminal is not None
        about = dict(report.user_properties)
        word, markup = WORDS[report.outcome]
        terminal.ensure_newline()
        terminal.write(word, **markup)
        terminal.write_line(f"  {about['host']}  {about['criterion']}")
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = crash.message if crash else str(report.longrepr)
            for line in reason.removeprefix("AssertionError: ").splitlines()[:3]:
                terminal.write_line(f"        {line[:300]}")
        elif report.skipped and isinstance(report.longrepr, tuple):
            terminal.write_line(f"        {report.longrepr[2].removeprefix('Skipped: ')}")
