"""The storage of an inventory as the installer of Ubuntu (subiquity, curtin) wants it told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

FLAGS = {"uefi": "boot", "lvm": "lvm", "swap": "swap", "raid": "raid"}


class AutoinstallError(ValueError):
    """Data of the inventory that no installer can follow, said in the inventory's words."""


def curtin_size(size: str) -> str | int:
    """``100GiB`` as ``100G``, which curtin counts by 1024; ``rest`` as -1."""
    if size in {"", "rest", "100%FREE"}:
        return -1
    if size.endswith(("KB", "MB", "GB", "TB")):
        return f"{round(float(size[:-2]) * 1000 ** ('KMGT'.index(size[-2]) + 1))}B"
    return size.removesuffix("iB")


def autoinstall_storage(
    disks: list[dict[str, Any]], volume_groups: list[dict[str, Any]], volumes: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The actions of ``autoinstall.storage.config``, in the order in which they depend on each other."""
    actions: list[dict[str, Any]] = []
    places: dict[str, str] = {}  # device of the inventory -> id of the action that makes it
    mounts: list[tuple[str, str, str]] = []  # path, id of the file system, options

    def file_system(volume: str, kind: str, label: str, path: str, options: str = "") -> None:
        named = {"label": label} if kind != "fat32" else {}
        actions.append({"id": f"{volume}-fs", "type": "format", "volume": volume, "fstype": kind, **named})
        if path:
            mounts.append((path, f"{volume}-fs", options))

    for number, disk in enumerate(disks):
        here = f"disk{number}"
        places[disk["device"]] = here
        table = disk.get("label", "gpt")
        about = {"ptable": table, "path": disk["device"], "wipe": "superblock-recursive", "preserve": False}
        actions.append({"id": here, "type": "disk", **about, "grub_device": False})
        for part in disk.get("partitions", []):
            name = f"{here}-part{part['number']}"
            joint = "-part" if disk["device"].startswith("/dev/disk/") else "p" if disk["device"][-1].isdigit() else ""
            places[f"{disk['device']}{joint}{part['number']}"] = name
            action = {"id": name, "type": "partition", "device": here, "number": part["number"], "preserve": False}
            action |= {"size": curtin_size(part.get("size", "rest")), "wipe": "superblock"}
            if part.get("type") in FLAGS:
                action["flag"] = FLAGS[part["type"]]
            if part.get("type") == "uefi":
                action["grub_device"] = True
            actions.append(action)
            if part.get("filesystem"):
                file_system(name, part["filesystem"], part.get("name", ""), part.get("mount", ""))

    for group in volume_groups:
        missing = [device for device in group["devices"] if device not in places]
        if missing:
            raise AutoinstallError(
                f"volume group {group['name']} is on {', '.join(missing)}, which no entry of platform_disks makes"
            )
        devices = [places[device] for device in group["devices"]]
        actions.append({"id": group["name"], "type": "lvm_volgroup", "name": group["name"], "devices": devices})

    for volume in volumes:
        if volume.get("state", "present") != "present":
            continue
        if volume.get("volume_group"):
            name = f"{volume['volume_group']}-{volume['name']}"
            action = {"id": name, "type": "lvm_partition", "name": volume["name"], "volgroup": volume["volume_group"]}
            actions.append(action | {"size": curtin_size(volume.get("size", "rest"))})
        elif volume["device"] in places:
            name = places[volume["device"]]
        else:
            raise AutoinstallError(
                f"volume {volume['name']} is on {volume['device']}, which no entry of platform_disks makes"
            )
        label = volume.get("label") or volume["name"]
        options = volume.get("options", "")
        file_system(name, volume.get("filesystem", "xfs"), label, volume.get("mount", ""), options)

    if "/" not in {path for path, _, _ in mounts}:
        raise AutoinstallError(
            "no volume is mounted at /: there is nothing to install the system on (platform_volumes)"
        )
    for path, source, options in sorted(mounts):
        extra = {"options": options} if options else {}
        actions.append({"id": f"mount-{source}", "type": "mount", "path": path, "device": source, **extra})
    return actions


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"autoinstall_storage": autoinstall_storage}
