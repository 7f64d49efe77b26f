"""What the role monitoring writes, from its variables: scrape jobs, files of targets, and what is wrong with them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

NAME = re.compile(r"citadel-[a-z0-9-]{1,40}")
TARGET = re.compile(r"[A-Za-z0-9_.\[\]:-]+:[0-9]{1,5}")
LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
Given = Mapping[str, Any]


def citadel_scrape_configs(
    jobs: Sequence[Given], targets: Sequence[Given], folder: str, user: str, limits: Given
) -> list[dict[str, Any]]:
    """Entries of scrape_configs, one for each job that has targets; keys and passwords are files in ``folder``."""
    used = {target["job"] for target in targets}
    entries = []
    for job in jobs:
        if job["name"] not in used:
            continue
        entry: dict[str, Any] = {
            "job_name": job["name"],
            "scheme": job.get("scheme", "http"),
            "metrics_path": job.get("path", "/metrics"),
            "scrape_interval": job.get("interval", "15s"),
            "scrape_timeout": job.get("timeout", "10s"),
            **limits,
            **{key: job[key] for key in limits if key in job},
        }
        if job.get("auth") == "gateway":
            entry["authorization"] = {"type": "Bearer", "credentials_file": f"{folder}/gateway.key"}
        if job.get("auth") == "exporters":
            entry["basic_auth"] = {"username": user, "password_file": f"{folder}/exporters.password"}
        if job.get("ca_file"):
            entry["tls_config"] = {"ca_file": job["ca_file"]}
        entry["file_sd_configs"] = [{"files": [f"{folder}/targets/{job['name']}.json"]}]
        entries.append(entry)
    return entries


def citadel_target_files(targets: Sequence[Given]) -> dict[str, str]:
    """Name and text of each job's file_sd file."""
    files: dict[str, list[dict[str, Any]]] = {}
    for target in targets:
        labels = {str(key): str(value) for key, value in (target.get("labels") or {}).items()}
        files.setdefault(target["job"], []).append({"targets": list(target["targets"]), "labels": labels})
    return {f"{job}.json": json.dumps(groups, indent=2) + "\n" for job, groups in files.items()}


def citadel_read_folder(folder: str, suffix: str) -> dict[str, str]:
    """Name -> text of the files of a folder on the controller; an empty name of a folder has none."""
    return {path.name: path.read_text() for path in sorted(Path(folder).glob(f"*{suffix}"))} if folder else {}


def citadel_below(texts: Mapping[str, str], folder: str) -> dict[str, str]:
    """The same, by their paths in a folder."""
    return {f"{folder}/{name}": text for name, text in texts.items()}


def citadel_rule_groups(texts: Mapping[str, str]) -> list[str]:
    """Names of the groups in these rule files, by file name."""
    found = []
    for text in texts.values():
        document = yaml.safe_load(text) or {}
        found += [group["name"] for group in document.get("groups") or []]
    return found


def citadel_monitoring_problems(
    jobs: Sequence[Given], targets: Sequence[Given], secrets: Mapping[str, bool]
) -> list[str]:
    """A sentence for each thing that cannot be scraped. ``secrets``: whether there is a key for each ``auth``."""
    found = []
    names = [str(job["name"]) for job in jobs]
    for name in sorted(set(names)):
        if not NAME.fullmatch(name):
            found.append(
                f"monitoring_jobs has {name}: a job of ours begins with citadel-, then letters, digits and dashes"
            )
        if names.count(name) > 1:
            found.append(f"monitoring_jobs has {name} {names.count(name)} times: keep one")
    used = set()
    for target in targets:
        job = str(target["job"])
        used.add(job)
        if job not in names:
            found.append(f"monitoring_targets has the job {job}, which is not in monitoring_jobs: add it there")
        found += [
            f"monitoring_targets of {job} has {address}: write HOST:PORT"
            for address in target["targets"]
            if not TARGET.fullmatch(str(address))
        ]
        labels = target.get("labels") or {}
        found += [
            f"monitoring_targets of {job} has the label {label}: letters, digits and _ only"
            for label in labels
            if not LABEL.fullmatch(str(label))
        ]
        if not labels.get("instance"):
            found.append(f"monitoring_targets of {job} has no label instance: give the name of the host")
    variables = {"gateway": "monitoring_gateway_key", "exporters": "monitoring_exporters_password"}
    for entry in jobs:
        auth = entry.get("auth", "")
        if entry["name"] in used and auth and not secrets.get(auth):
            found.append(
                f"{variables[auth]} is empty, and the job {entry['name']} shows it: set it, or give that job "
                "auth: '' in monitoring_jobs"
            )
    return found


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {
            "citadel_scrape_configs": citadel_scrape_configs,
            "citadel_target_files": citadel_target_files,
            "citadel_read_folder": citadel_read_folder,
            "citadel_below": citadel_below,
            "citadel_rule_groups": citadel_rule_groups,
            "citadel_monitoring_problems": citadel_monitoring_problems,
        }
