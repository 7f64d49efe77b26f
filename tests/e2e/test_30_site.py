"""A second run changes nothing, also in check mode; a host that has nothing can be checked."""

import os
import signal
import subprocess
import time
from collections.abc import Callable

from .conftest import HOST, MODELS, REPO, Lab, recap

NO_CHANGE_SECONDS = 120
SPARE = "hx-llm-server-02"


def changes(output: str) -> int:
    return sum(counts["changed"] for counts in recap(output).values())


def test_check_mode_on_a_host_that_has_nothing(lab: Lab) -> None:
    """A freshly installed Debian 13, the other release that is supported."""
    lab.run("lab/lab", "up", "--bare", "--release", "trixie", SPARE, timeout=600)
    try:
        output = lab.play("playbooks/site.yml", "--check", "--diff", "-i", "lab/second.yml", "--limit", SPARE)
        assert changes(output) > 0
        assert lab.ssh("ls -d /opt/citadel /etc/citadel-llm", host=SPARE, check=False).count("No such file") == 2
    finally:
        lab.run("lab/lab", "down", SPARE)


def test_an_unreachable_host_is_named_and_the_others_go_on(lab: Lab) -> None:
    lab.run("lab/lab", "down", SPARE)
    output = lab.play("playbooks/preflight.yml", "-i", "lab/second.yml", check=False)
    counts = recap(output)
    assert counts[SPARE]["unreachable"] == 1
    assert (counts[HOST]["unreachable"], counts[HOST]["failed"]) == (0, 0)


def test_second_run_changes_nothing_in_time(lab: Lab) -> None:
    """SPEC §8: at most 120 s. Measured alone; three times that fails, as machines differ."""
    start = time.monotonic()
    output = lab.play("playbooks/site.yml", "--diff")
    took = time.monotonic() - start
    assert changes(output) == 0, output[-4000:]
    assert "---" not in [line[:3] for line in output.splitlines()], "a diff was shown"
    print(f"site.yml with nothing to change: {took:.0f} s of {NO_CHANGE_SECONDS} s")
    assert took < 3 * NO_CHANGE_SECONDS


def test_check_mode_after_a_converge_shows_nothing(lab: Lab) -> None:
    output = lab.play("playbooks/site.yml", "--check", "--diff")
    assert changes(output) == 0, output[-4000:]


def test_play_killed_half_way_and_run_again(lab: Lab, changed_models: Callable[[str], list[str]]) -> None:
    """Killed while it writes; the next run finishes the work and nothing was restarted on the way."""
    before = lab.pids()
    options = changed_models("[m | {'description': 'changed by a test'} for m in models]")
    process = subprocess.Popen(
        ["lab/lab", "play", "playbooks/gateway.yml", *options],
        cwd=REPO,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    time.sleep(6)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    lab.play("playbooks/gateway.yml")
    assert changes(lab.play("playbooks/gateway.yml")) == 0
    assert lab.pids() == before
    assert all(lab.generates(model) for model in MODELS)


def test_misspelt_names_are_refused(lab: Lab, changed_models: Callable[[str], list[str]]) -> None:
    """A key that no model has, and a port given twice: refused before the first change, by name."""
    output = lab.play("playbooks/vllm.yml", *changed_models("[m | {'contxt': 1} for m in models]"), check=False)
    assert "contxt" in output
    assert recap(output)[HOST]["failed"] == 1
    output = lab.play("playbooks/vllm.yml", *changed_models("[m | {'port': 11400} for m in models]"), check=False)
    assert "11400" in output
    assert changes(output) == 0
