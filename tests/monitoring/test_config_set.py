"""A set of files against a real Prometheus and a real Alertmanager: loaded as a whole, or as it was."""

import getpass
import grp
import hashlib
import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from filter.citadel_merge import citadel_merge
from module_utils.citadel_config_set import ConfigSet, File, RefusalError, Result, Service, blocks

from tests.monitoring import servers

ME: dict[str, Any] = {"owner": getpass.getuser(), "group": grp.getgrgid(os.getgid()).gr_name}
OPERATOR = """\
# The operator's own.
global: {scrape_interval: 1s, evaluation_interval: 1s}
rule_files:
  - own.yml   # theirs
scrape_configs:
  - job_name: own
    static_configs: [{targets: ["127.0.0.1:1"]}]
"""
OWN_RULES = "groups: [{name: own, rules: [{record: own:one:sum, expr: vector(1)}]}]\n"
ALERTS = """\
route:
  receiver: own
  routes:
    - receiver: own
      matchers: [a="b"]
receivers:
  - name: own  # theirs
"""
RULES = "groups: [{{name: citadel-{0}, rules: [{{record: citadel:{0}:sum, expr: vector({1})}}]}}]\n"


@dataclass
class Site:
    """The operator's servers, and what the role would do to them."""

    folder: Path
    prometheus: servers.PrometheusServer
    alertmanager: servers.AlertmanagerServer
    reloads: list[str] = field(default_factory=list)
    checker: str = ""  # another program instead of promtool, for a check that sees no fault
    deaf: bool = False  # a service that does not do what systemctl tells it

    def run(self, command: Sequence[str]) -> tuple[int, str, str]:
        if command[0] == "systemctl":
            self.reloads.append(command[2])
            server = {"prometheus": self.prometheus, "alertmanager": self.alertmanager}[command[2]]
            assert server.process
            if not self.deaf:
                server.process.send_signal(signal.SIGHUP)
            return 0, "", ""
        if command[0] == "journalctl":
            return 0, (self.prometheus.folder / "log").read_text(), ""
        env = servers.environment(command[0])
        done = subprocess.run(list(command), env=env, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    @property
    def tree(self) -> Path:
        return self.folder / "citadel"

    def apply(
        self,
        rules: dict[str, str],
        *,
        jobs: Sequence[str] = ("citadel-a",),
        receivers: Sequence[str] = ("citadel-feed",),
        groups: Sequence[str] | None = None,
        base: str | None = None,
        check: bool = False,
        wait: float = 15,
        extra: Sequence[File] = (),
    ) -> Result:
        """As the role has it: jobs, rules by file name, receivers; without any of them, everything of ours goes."""
        files = [File(str(self.tree / "rules" / name), text, **ME) for name, text in rules.items()]
        files += extra
        targets = str(self.tree / "targets/citadel-a.json")
        files += [File(targets, json.dumps([{"targets": ["127.0.0.1:1"], "labels": {"instance": "x"}}]), **ME)] * bool(
            jobs
        )
        items = [{"job_name": name, "file_sd_configs": [{"files": [targets]}]} for name in jobs]
        files.append(
            self.merged(
                "prometheus.yml",
                [
                    {"path": "scrape_configs", "items": items, "identity": "job_name"},
                    {"path": "rule_files", "items": [f"{self.tree}/rules/*.yml"] * bool(rules)},
                ],
                base,
            )
        )
        routes = [{"receiver": name, "matchers": ['suite="citadel"']} for name in receivers]
        files.append(
            self.merged(
                "alertmanager.yml",
                [
                    {"path": "receivers", "items": [{"name": name} for name in receivers], "identity": "name"},
                    {"path": "route.routes", "items": routes},
                ],
            )
        )
        named = [f"citadel-{Path(name).stem}" for name in rules] if groups is None else list(groups)
        promtool = self.checker or str(servers.promtool())
        services = [
            Service(
                "prometheus",
                "prometheus",
                str(self.folder / "prometheus.yml"),
                [promtool, *(["check", "config"] if not self.checker else []), "{config}"],
                [str(self.tree / "rules")],
                self.prometheus.url,
                jobs=list(jobs),
                groups=named,
                folder=str(self.tree / "rules"),
            ),
            Service(
                "alertmanager",
                "alertmanager",
                str(self.folder / "alertmanager.yml"),
                [str(servers.amtool()), "check-config", "{config}"],
                [str(self.tree / "templates")],
                self.alertmanager.url,
                receivers=list(receivers),
            ),
        ]
        owned = [str(self.tree / name) for name in ("rules", "targets")]
        work = ConfigSet(files, services, tree=str(self.tree), owned=owned, run=self.run, check=check, wait=wait)
        return work.apply()

    def merged(self, name: str, sections: list[dict[str, Any]], base: str | None = None) -> File:
        text = (self.folder / name).read_text()
        hashed = base or hashlib.sha256(text.encode()).hexdigest()
        return File(str(self.folder / name), citadel_merge(text, sections, name), base=hashed)

    def value(self, query: str) -> str:
        """Of a recorded series; empty if there is none."""
        with urllib.request.urlopen(f"{self.prometheus.url}/api/v1/query?query={query}", timeout=10) as reply:
            found = json.load(reply)["data"]["result"]
            return str(found[0]["value"][1]) if found else ""

    def snapshot(self) -> dict[str, tuple[bytes, int]]:
        return {
            str(path.relative_to(self.folder)): (path.read_bytes(), path.stat().st_mode)
            for path in sorted(self.folder.rglob("*"))
            if path.is_file() and not {"data", "data-alerts"} & set(path.parts)
        }


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    for name, text in (("prometheus.yml", OPERATOR), ("own.yml", OWN_RULES), ("alertmanager.yml", ALERTS)):
        (tmp_path / name).write_text(text)
    (tmp_path / "prometheus.yml").chmod(0o640)
    here = Site(
        tmp_path,
        servers.PrometheusServer(tmp_path / "prometheus.yml", tmp_path / "data"),
        servers.AlertmanagerServer(tmp_path / "alertmanager.yml", tmp_path / "data-alerts"),
    )
    try:
        here.prometheus.start()
        here.alertmanager.start()
        yield here
    finally:
        here.prometheus.remove()
        here.alertmanager.remove()


def eventually(check: Callable[[], bool], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not check() and time.monotonic() < end:
        time.sleep(0.2)
    return check()


def test_a_diff_has_the_path_of_an_address_as_its_hash_alone() -> None:
    block = '  # BEGIN CITADEL x\n  - url: "https://beats.example.org:8443/secret-path?x=1"\n  # END CITADEL\n'
    shown = blocks("password: theirs\n" + block)
    assert "https://beats.example.org:8443/(sha256 " in shown
    assert "secret-path" not in shown
    assert "theirs" not in shown
    assert shown != blocks(block.replace("secret", "other"))


def test_a_set_is_loaded_once_replaced_and_taken_out_without_a_trace(site: Site) -> None:
    before = site.snapshot()
    said = site.apply({"a.yml": RULES.format("a", 1)}, check=True)
    assert site.snapshot() == before
    assert {Path(path).name for path in said.changed_paths} == {
        "a.yml", "citadel-a.json", "prometheus.yml", "alertmanager.yml"}  # fmt: skip

    done = site.apply({"a.yml": RULES.format("a", 1)})
    assert done.reloaded == ["prometheus", "alertmanager"]
    assert eventually(lambda: site.value("citadel:a:sum") == "1")
    assert eventually(lambda: site.value("own:one:sum") == "1"), "the operator's own rule is gone"
    assert (site.folder / "prometheus.yml").stat().st_mode & 0o777 == 0o640
    differences = json.dumps(done.diff)
    assert "citadel-a" in differences
    assert "job_name: own" not in differences, "a diff of an operator's file shows our blocks alone"

    again = site.apply({"a.yml": RULES.format("a", 1)})
    assert (again.changed_paths, again.reloaded) == ([], [])

    other = site.apply({"b.yml": RULES.format("b", 2)})
    assert {Path(path).name for path in other.changed_paths} == {"a.yml", "b.yml"}
    assert other.reloaded == ["prometheus"]
    assert eventually(lambda: site.value("citadel:b:sum") == "2")

    site.apply({}, jobs=(), receivers=())
    assert site.snapshot() == before
    assert site.value("own:one:sum") == "1"


def test_what_the_checker_refuses_touches_nothing(site: Site) -> None:
    site.apply({"a.yml": RULES.format("a", 1)})
    before, reloads = site.snapshot(), len(site.reloads)
    with pytest.raises(
        RefusalError, match=r"does not accept .*prometheus\.yml with our part\. Nothing was changed"
    ) as refused:
        site.apply({"a.yml": RULES.format("a", "sum("), "b.yml": RULES.format("b", 1)})
    assert "parse error" in str(refused.value)
    assert "staged" not in str(refused.value)
    assert (site.snapshot(), len(site.reloads)) == (before, reloads)


def test_a_fault_of_the_operator_s_is_said_to_be_theirs(site: Site) -> None:
    (site.folder / "own.yml").write_text("groups: [{}]\n")
    with pytest.raises(RefusalError, match="refused before our change too: mend it first"):
        site.apply({"a.yml": RULES.format("a", 1)})


def test_a_reload_that_is_refused_leaves_the_old_state_serving(site: Site) -> None:
    site.apply({"a.yml": RULES.format("a", 1)})
    assert eventually(lambda: site.value("citadel:a:sum") == "1")
    before = site.snapshot()
    site.checker = "true"  # sees nothing, so that the fault comes out at the reload
    with pytest.raises(RefusalError, match=r"does not load its files.*The old files are back and loaded") as refused:
        site.apply({"a.yml": RULES.format("a", "sum("), "c.yml": RULES.format("c", 3)}, jobs=["citadel-a", "citadel-c"])
    assert "parse error" in str(refused.value), "the reason is in the journal"
    assert site.snapshot() == before
    site.checker = ""
    assert site.apply({"a.yml": RULES.format("a", 1)}).reloaded == [], "what serves is what is on disk"
    assert eventually(lambda: site.value("citadel:a:sum") == "1")
    assert eventually(lambda: site.value("own:one:sum") == "1")


def test_what_was_loaded_but_lacks_something_is_taken_back(site: Site) -> None:
    before = site.snapshot()
    with pytest.raises(RefusalError, match=r"lacks the rule group citadel-missing.*The old files are back and loaded"):
        site.apply({"a.yml": RULES.format("a", 1)}, groups=["citadel-a", "citadel-missing"], wait=1.5)
    assert site.snapshot() == before


def test_a_service_that_does_not_hear_is_noticed(site: Site) -> None:
    before = site.snapshot()
    site.deaf = True
    with pytest.raises(RefusalError, match="The old files are back, but"):
        site.apply({"a.yml": RULES.format("a", 1)}, wait=1)
    assert site.snapshot() == before


def test_a_run_that_was_killed_before_the_reload_is_finished_by_the_next(site: Site) -> None:
    site.apply({"a.yml": RULES.format("a", 1)})
    (site.tree / "rules/a.yml").write_text(RULES.format("a", 7))
    done = site.apply({"a.yml": RULES.format("a", 7)})
    assert (done.changed_paths, done.reloaded) == ([], ["prometheus"])
    assert eventually(lambda: site.value("citadel:a:sum") == "7")


def test_a_file_that_somebody_edits_meanwhile_is_not_overwritten(site: Site) -> None:
    with pytest.raises(RefusalError, match="changed by somebody else while this ran; run it again"):
        site.apply({"a.yml": RULES.format("a", 1)}, base="0" * 64)


def test_a_service_that_is_down_is_named_before_anything_changes(site: Site) -> None:
    before = site.snapshot()
    site.alertmanager.stop()
    with pytest.raises(RefusalError, match=r"alertmanager does not answer at .*: start it, or correct the URL"):
        site.apply({"a.yml": RULES.format("a", 1)})
    assert site.snapshot() == before


def test_secrets_are_closed_and_in_no_diff(site: Site) -> None:
    secret = File(str(site.tree / "gateway.key"), "very-secret", "0640", secret=True, **ME)
    done = site.apply({"a.yml": RULES.format("a", 1)}, extra=[secret])
    assert (site.tree / "gateway.key").stat().st_mode & 0o777 == 0o640
    assert "very-secret" not in json.dumps(done.diff)
    gone = site.apply({}, jobs=(), receivers=(), extra=[File(secret.path, state="absent")])
    assert "very-secret" not in json.dumps(gone.diff)
    assert not site.tree.exists()


def test_a_link_stays_a_link(site: Site) -> None:
    config = site.folder / "prometheus.yml"
    config.rename(site.folder / "elsewhere.yml")
    config.symlink_to("elsewhere.yml")
    site.apply({"a.yml": RULES.format("a", 1)})
    assert config.is_symlink()
    assert "citadel-a" in (site.folder / "elsewhere.yml").read_text()


def test_what_lies_behind_a_linked_folder_is_checked_and_loaded_too(site: Site) -> None:
    """A link to the folder of ours hides no rule file from the checker, nor from the reload."""
    (site.folder / "real").mkdir()
    site.tree.symlink_to("real")
    site.apply({"a.yml": RULES.format("a", 1)})
    with pytest.raises(RefusalError, match="parse error"):
        site.apply({"a.yml": RULES.format("a", "sum(")})
    assert site.apply({"a.yml": RULES.format("a", 2)}).reloaded == ["prometheus"]
    assert eventually(lambda: site.value("citadel:a:sum") == "2")


def test_an_owner_that_the_host_does_not_know_is_named(site: Site) -> None:
    before = site.snapshot()
    with pytest.raises(RefusalError, match=r"nobody-here:.*, which this host does not know"):
        site.apply({}, extra=[File(str(site.tree / "rules/x.yml"), "groups: []", owner="nobody-here")])
    assert site.snapshot() == before
