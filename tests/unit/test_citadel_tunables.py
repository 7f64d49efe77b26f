"""citadel_tunables against a folder that looks like a host."""

import os
from pathlib import Path

import pytest
from modules import citadel_tunables
from modules.citadel_tunables import SYSCTL_FILE, TMPFILES_FILE, UDEV_FILE, Outcome, Tunables

FILES = {
    "proc/sys/vm/swappiness": "60\n",
    "proc/sys/net/ipv4/tcp_rmem": "4096\t131072\t6291456\n",
    "sys/kernel/mm/transparent_hugepage/enabled": "[always] madvise never\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_governor": "powersave\n",
    "sys/block/nvme0n1/queue/scheduler": "[mq-deadline] none\n",
    "sys/block/loop0/queue/scheduler": "[mq-deadline] none\n",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "etc").mkdir()
    return tmp_path


def apply(
    root: Path,
    *,
    check: bool = False,
    sysctl: dict[str, str] | None = None,
    hugepages: dict[str, str] | None = None,
    governor: str = "",
    schedulers: dict[str, str] | None = None,
) -> Outcome:
    return Tunables(root, check=check).apply(sysctl or {}, hugepages or {}, governor, schedulers or {})


def test_sets_the_kernel_and_keeps_it_for_the_next_boot(root: Path) -> None:
    outcome = apply(root, sysctl={"vm.swappiness": "10"})
    assert outcome.changed
    assert (root / "proc/sys/vm/swappiness").read_text() == "10\n"
    assert "vm.swappiness = 10" in (root / SYSCTL_FILE).read_text()
    assert (root / SYSCTL_FILE).stat().st_mode & 0o777 == 0o644
    assert not apply(root, sysctl={"vm.swappiness": "10"}).changed


def test_check_mode_says_what_would_change_and_changes_nothing(root: Path) -> None:
    outcome = apply(root, check=True, sysctl={"vm.swappiness": "10"})
    assert outcome.changed
    assert "sysctl vm.swappiness = 60" in outcome.before
    assert "sysctl vm.swappiness = 10" in outcome.after
    assert [change["after_header"] for change in outcome.diff] == [f"/{SYSCTL_FILE}", "the running kernel"]
    assert (root / "proc/sys/vm/swappiness").read_text() == "60\n"
    assert not (root / SYSCTL_FILE).exists()


def test_blanks_of_a_value_do_not_matter(root: Path) -> None:
    apply(root, sysctl={"net.ipv4.tcp_rmem": "4096 131072  6291456"})
    assert (root / "proc/sys/net/ipv4/tcp_rmem").read_text() == FILES["proc/sys/net/ipv4/tcp_rmem"]


def test_unknown_parameter_is_reported_and_the_rest_goes_on(root: Path) -> None:
    outcome = apply(root, sysctl={"vm.swapiness": "10", "vm.swappiness": "10"})
    assert outcome.not_settable == ["sysctl vm.swapiness = 10: this kernel does not have it"]
    assert (root / "proc/sys/vm/swappiness").read_text() == "10\n"


def test_read_only_parameter_is_reported_and_no_change(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apply(root, sysctl={"vm.swappiness": "60"})
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    (root / "proc/sys/vm/swappiness").write_text("30\n")
    for check in (True, False):
        outcome = apply(root, check=check, sysctl={"vm.swappiness": "60"})
        assert not outcome.changed
        assert outcome.not_settable == ["sysctl vm.swappiness = 60: read-only here, stays 30"]


def test_kernel_that_refuses_or_keeps_its_value(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.write_text

    def refuse(self: Path, text: str) -> int:
        if self.name == "swappiness":
            raise OSError(22, "Invalid argument")
        if self.name == "tcp_rmem":
            return len(text)
        return real(self, text)

    monkeypatch.setattr(Path, "write_text", refuse)
    outcome = apply(root, sysctl={"vm.swappiness": "999", "net.ipv4.tcp_rmem": "1 2 3"})
    assert outcome.not_settable == [
        "sysctl net.ipv4.tcp_rmem = 1 2 3: the kernel keeps 4096 131072 6291456",
        "sysctl vm.swappiness = 999: Invalid argument, stays 60",
    ]


def test_parameter_taken_out_of_the_list_is_released(root: Path) -> None:
    apply(root, sysctl={"vm.swappiness": "10"})
    outcome = apply(root)
    assert outcome.released == ["sysctl vm.swappiness is not managed any more; it stays 10 until the next boot"]
    assert not (root / SYSCTL_FILE).exists()
    assert not apply(root).changed


def test_later_file_that_sets_something_else_is_named(root: Path) -> None:
    for name, text in {
        "etc/sysctl.d/99-sysctl.conf": "# a comment = 1\n-vm.swappiness=60\n",
        "usr/lib/sysctl.d/99-sysctl.conf": "vm.swappiness = 1\n",  # hidden by the one in /etc
        "usr/lib/sysctl.d/50-early.conf": "vm.swappiness = 2\n",
        "etc/sysctl.d/95-same.conf": "vm/swappiness = 10\n",
        "etc/sysctl.d/99-note.txt": "vm.swappiness = 3\n",
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    outcome = apply(root, sysctl={"vm.swappiness": "10"})
    assert outcome.overridden == ["sysctl vm.swappiness: /etc/sysctl.d/99-sysctl.conf sets 60 after us, we want 10"]


def test_transparent_huge_pages(root: Path) -> None:
    outcome = apply(root, hugepages={"enabled": "madvise", "nowhere": "x"})
    assert (root / "sys/kernel/mm/transparent_hugepage/enabled").read_text() == "madvise\n"
    assert "w- /sys/kernel/mm/transparent_hugepage/enabled - - - - madvise" in (root / TMPFILES_FILE).read_text()
    assert outcome.not_settable == ["transparent_hugepage/nowhere = x: this kernel does not have it"]


def test_word_that_the_kernel_does_not_offer(root: Path) -> None:
    outcome = apply(root, hugepages={"enabled": "sometimes"})
    assert outcome.not_settable == [
        "transparent_hugepage/enabled = sometimes: this kernel offers [always] madvise never"
    ]


def test_governor_of_every_core(root: Path) -> None:
    apply(root, governor="performance")
    for core in ("cpu0", "cpu1"):
        path = root / f"sys/devices/system/cpu/{core}/cpufreq/scaling_governor"
        assert path.read_text() == "performance\n"
    assert "performance" in (root / TMPFILES_FILE).read_text()


def test_host_without_frequency_control(tmp_path: Path) -> None:
    outcome = apply(tmp_path, governor="performance")
    assert outcome.not_settable == ["CPU governor performance: this host has no cpufreq"]


def test_governor_that_cannot_be_set_is_one_line(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    outcome = apply(root, governor="performance")
    assert outcome.not_settable == ["CPU governor performance: 2 of 2 cores: read-only here, stays powersave"]


def test_scheduler_by_pattern_and_not_for_loops(root: Path) -> None:
    apply(root, schedulers={"nvme*": "none", "*": "mq-deadline"})
    assert (root / "sys/block/nvme0n1/queue/scheduler").read_text() == "none\n"
    assert (root / "sys/block/loop0/queue/scheduler").read_text() == FILES["sys/block/loop0/queue/scheduler"]
    rules = (root / UDEV_FILE).read_text()
    assert rules.index('KERNEL=="*"') < rules.index('KERNEL=="nvme*"'), "the last rule wins in udev"


def test_slashes_in_a_name(root: Path) -> None:
    apply(root, sysctl={"vm/swappiness": "5"})
    assert (root / "proc/sys/vm/swappiness").read_text() == "5\n"


def test_documentation_names_every_option() -> None:
    for option in ("sysctl", "transparent_hugepages", "cpu_governor", "io_scheduler"):
        assert f"\n  {option}:" in citadel_tunables.DOCUMENTATION
