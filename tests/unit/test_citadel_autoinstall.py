"""The inventory's storage in the installer's words, and the whole file as the playbook writes it."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from filter.citadel_autoinstall import AutoinstallError, FilterModule, autoinstall_storage, curtin_size

ROOT = Path(__file__).resolve().parent.parent.parent

DISK = {
    "device": "/dev/nvme0n1",
    "partitions": [
        {"number": 1, "name": "efi", "size": "1GiB", "type": "uefi", "filesystem": "fat32", "mount": "/boot/efi"},
        {"number": 2, "name": "boot", "size": "2GiB", "type": "linux", "filesystem": "ext4", "mount": "/boot"},
        {"number": 3, "name": "citadel", "size": "rest", "type": "lvm"},
    ],
}
GROUP = {"name": "citadel", "devices": ["/dev/nvme0n1p3"]}
SYSTEM = {"name": "system", "volume_group": "citadel", "size": "100GiB", "filesystem": "ext4", "mount": "/"}
MODELS = {"name": "models", "volume_group": "citadel", "mount": "/opt/models", "options": "noatime"}


def by_id(actions: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {action["id"]: action for action in actions}


def test_each_action_follows_what_it_needs() -> None:
    seen: set[str] = set()
    for action in autoinstall_storage([DISK], [GROUP], [MODELS, SYSTEM]):
        needs = [action.get(key) for key in ("device", "volume", "volgroup")] + action.get("devices", [])
        assert {need for need in needs if need} <= seen
        assert action["id"] not in seen
        seen.add(action["id"])


def test_partitions_group_and_volumes() -> None:
    actions = by_id(autoinstall_storage([DISK], [GROUP], [SYSTEM, MODELS]))
    assert actions["disk0"]["path"] == "/dev/nvme0n1"
    assert actions["disk0-part1"] | {"flag": "boot", "grub_device": True, "size": "1G"} == actions["disk0-part1"]
    assert (actions["disk0-part3"]["size"], actions["disk0-part3"]["flag"]) == (-1, "lvm")
    assert actions["citadel"]["devices"] == ["disk0-part3"]
    assert actions["citadel-system"]["size"] == "100G"
    assert actions["citadel-models-fs"] | {"fstype": "xfs", "label": "models"} == actions["citadel-models-fs"]
    assert actions["mount-citadel-models-fs"]["options"] == "noatime"


def test_a_file_system_is_mounted_before_those_below_it() -> None:
    paths = [action["path"] for action in autoinstall_storage([DISK], [GROUP], [MODELS, SYSTEM]) if "path" in action]
    assert paths == ["/dev/nvme0n1", "/", "/boot", "/boot/efi", "/opt/models"]


def test_plain_partitions_without_lvm() -> None:
    disk = {"device": "/dev/disk/by-id/x", "partitions": [{"number": 1}, {"number": 2}]}
    root = {"name": "system", "device": "/dev/disk/by-id/x-part1", "filesystem": "ext4", "mount": "/"}
    gone = {"name": "old", "state": "absent", "device": "/dev/none"}
    actions = by_id(autoinstall_storage([disk], [], [root, gone]))
    assert actions["disk0-part1-fs"]["label"] == "system"


@pytest.mark.parametrize(
    ("groups", "volumes", "message"),
    [
        ([{"name": "citadel", "devices": ["/dev/sdb1"]}], [SYSTEM], "volume group citadel is on /dev/sdb1"),
        ([GROUP], [{"name": "x", "device": "/dev/sdb"}], "volume x is on /dev/sdb"),
        ([GROUP], [MODELS], "no volume is mounted at /"),
    ],
)
def test_what_no_installer_can_follow(groups: list[Any], volumes: list[Any], message: str) -> None:
    with pytest.raises(AutoinstallError, match=message):
        autoinstall_storage([DISK], groups, volumes)


def test_sizes() -> None:
    assert [curtin_size(size) for size in ("rest", "4GiB", "512M", "4TB")] == [-1, "4G", "512M", "4000000000000B"]


def test_filter_is_known_to_ansible() -> None:
    assert FilterModule().filters()["autoinstall_storage"] is autoinstall_storage


@pytest.fixture
def render(tmp_path: Path) -> Any:
    """Plays the playbook against the production inventory, from a copy, so that no file of the repository changes."""
    for name in ("inventory", "playbooks", "plugins", "templates"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "ansible.cfg", tmp_path)

    def play(extra: str) -> subprocess.CompletedProcess[str]:
        command = ["ansible-playbook", "-i", "inventory/production", "playbooks/ops/autoinstall.yml", "-e", extra]
        environment = os.environ | {"ANSIBLE_CONFIG": str(tmp_path / "ansible.cfg")}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    return play


def test_the_production_inventory_installs_itself(render: Any, tmp_path: Path) -> None:
    keys = '{"platform_install": {"admin": "ops", "admin_keys": ["ssh-ed25519 AAAA me"], "locale": "C.UTF-8", '
    keys += '"keyboard": "de", "mirror": "http://mirror.example/ubuntu"}}'
    run = render(keys)
    assert run.returncode == 0, run.stdout + run.stderr
    folder = tmp_path / "build/autoinstall/hx-llm-server-01"
    text = (folder / "user-data").read_text()
    assert text.startswith("#cloud-config\n")
    install = yaml.safe_load(text)["autoinstall"]
    assert install["version"] == 1
    assert install["identity"]["hostname"] == "hx-llm-server-01"
    assert install["ssh"] == {"install-server": True, "allow-pw": False, "authorized-keys": ["ssh-ed25519 AAAA me"]}
    assert install["network"]["ethernets"]["server"]["addresses"] == ["192.168.10.29/24"]
    mounted = {action["path"] for action in install["storage"]["config"] if action["type"] == "mount"}
    areas = {
        "/",
        "/opt/citadel",
        "/opt/models",
        "/var/log/citadel-llm",
        "/var/cache/citadel-llm",
        "/var/backups/citadel-llm",
    }
    assert mounted == areas | {"/boot", "/boot/efi"}
    assert any("/target/root/.ssh/authorized_keys" in command for command in install["late-commands"])
    assert yaml.safe_load((folder / "meta-data").read_text())["local-hostname"] == "hx-llm-server-01"
    assert "changed=0" in render(keys).stdout


def test_nobody_is_locked_out(render: Any) -> None:
    run = render("platform_network_search=[]")
    assert run.returncode != 0
    assert "platform_install.admin_keys is empty" in run.stdout + run.stderr
