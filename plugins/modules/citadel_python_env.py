#!/usr/bin/python
"""Ansible module: one Python environment, from a hash-locked set."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.citadel_python_env import (
    BuildError,
    Environment,
    Interpreter,
    Supply,
    Wheel,
    build,
    ensure_installer,
    interpreter,
    locked,
    packages,
    release_id,
    remove,
)

DOCUMENTATION = r"""
---
module: citadel_python_env
short_description: Build, check, switch to and remove releases of a Python environment
description:
  - Builds C(<root>/<name>-<id>) from a hash-locked requirement set beside the release in use,
    runs a check in it, and only then points the link at it.
  - The id follows from the lock, the interpreter and the extra wheels,
    so a release that exists is not built again, and nothing is hashed to find that out.
  - A failed or interrupted build leaves the release in use alone.
options:
  name: {description: Name of the environment., type: str, required: true}
  state: {description: Whether the environment exists., type: str, choices: [present, absent], default: present}
  root: {description: Directory of all releases., type: str, required: true}
  link: {description: Symbolic link to the release in use., type: str, required: true}
  lock: {description: Text of the lock., type: str, default: ''}
  installer_lock: {description: Text of the lock of uv., type: str, default: ''}
  wheels:
    description: Wheels installed besides the lock, expected in C(<root>/.wheels/<first 16 digits of sha256>/).
    type: list
    elements: dict
    default: []
    options:
      source: {description: The source tree it was built from., type: str}
      path: {description: Its path where it was built; the name counts., type: str, required: true}
      sha256: {description: Its hash., type: str, required: true}
  check: {description: Command that must succeed in a new release before use., type: list, elements: str, default: []}
  release: {description: Use this existing release instead of the one that the lock describes., type: str, default: ''}
  keep: {description: How many releases that are not in use are kept., type: int, default: 2}
  python: {description: Interpreter that a release is made with., type: str, default: /usr/bin/python3}
  python_minimum: {description: Lowest version of it., type: str, default: '3.11'}
  wheelhouse: {description: Directory of wheels on the host; if set no index is asked., type: str, default: ''}
  index_url: {description: Address of the package index., type: str, default: ''}
  extra_index_urls: {description: Addresses of further indexes., type: list, elements: str, default: []}
  find_links: {description: Directories or pages with more files., type: list, elements: str, default: []}
  proxy: {description: Proxy for downloads., type: str, default: ''}
  install_timeout: {description: Seconds that an installation may take., type: int, default: 3600}
  check_timeout: {description: Seconds that the check may take., type: int, default: 600}
author: Citadel LLM Server
"""

EXAMPLES = r"""
- name: Build the gateway's environment
  citadel_python_env:
    name: gateway
    root: /opt/citadel/envs
    link: /opt/citadel/gateway-env
    lock: "{{ lookup('ansible.builtin.file', 'gateway.txt') }}"
    installer_lock: "{{ lookup('ansible.builtin.file', 'installer.txt') }}"
    check: [python, -c, import fastapi]
"""

RETURN = r"""
release: {description: Id of the release in use afterwards., returned: success, type: str}
path: {description: Its directory., returned: success, type: str}
previous: {description: Id of the release in use before., returned: success, type: str}
releases: {description: Ids that can be switched to., returned: success, type: list}
packages: {description: How many packages the lock names., returned: success, type: int}
seconds: {description: How long it took., returned: success, type: float}
"""


def described(environment: Environment, identity: str, lock: str) -> str:
    """One side of the diff."""
    if not identity:
        return f"{environment.link}: absent\n"
    return "\n".join([f"{environment.link}: {identity}", *packages(lock), ""])


def absent(module: AnsibleModule, environment: Environment) -> dict[str, Any]:
    current = environment.current()
    releases = environment.releases()
    doomed = [*(release.path for release in releases), *environment.leftovers()]
    linked = environment.link is not None and environment.link.is_symlink()
    changed = bool(doomed or linked)
    before = next((release.lock for release in releases if release.id == current), "")
    if changed and not module.check_mode:
        if environment.link is not None and linked:
            environment.link.unlink()
        for path in doomed:
            remove(path)
    result = {"changed": changed, "release": "", "path": "", "previous": current, "releases": [], "packages": 0}
    result["diff"] = {"before": described(environment, current, before), "after": described(environment, "", "")}
    return result


def wanted_release(options: dict[str, Any], python: Interpreter, wheels: list[Wheel], known: list[str]) -> str:
    """The id to use: the one asked for, which must exist, or the one that the lock describes."""
    if options["release"]:
        if options["release"] not in known:
            there = ", ".join(known) or "none"
            raise BuildError(f"there is no release {options['release']!r} on this host; there are: {there}")
        return str(options["release"])
    if not packages(options["lock"]):
        raise BuildError("its lock names no package")
    return str(release_id(options["lock"], python.tag, wheels))


def present(module: AnsibleModule, environment: Environment) -> dict[str, Any]:
    options = module.params
    python = interpreter(options["python"])
    minimum = tuple(int(part) for part in options["python_minimum"].split("."))
    if python.version[: len(minimum)] < minimum:
        message = f"{python.path} is Python {python.text}, older than {options['python_minimum']}"
        raise BuildError(f"{message}: install a newer one, or name another")
    link = environment.link
    if link is not None and link.exists() and not link.is_symlink():
        raise BuildError(f"{link} is in the way of the link to the release in use: move it away")
    wheels = [Wheel.below(environment.root, wheel["path"], wheel["sha256"]) for wheel in options["wheels"]]
    supply = Supply(
        options["wheelhouse"],
        options["index_url"],
        tuple(options["extra_index_urls"]),
        tuple(options["find_links"]),
        options["proxy"],
    )
    complete = {release.id: release for release in environment.releases()}
    current = environment.current()
    wanted = wanted_release(options, python, wheels, list(complete))

    building, switching = wanted not in complete, wanted != current
    leftovers = [path for path in environment.leftovers() if path != environment.path(wanted)]
    changed = building or switching or bool(leftovers or environment.superfluous(wanted, options["keep"]))
    after = complete[wanted].lock if wanted in complete else options["lock"]
    before = complete[current].lock if current in complete else ""
    if changed and not module.check_mode:
        environment.root.mkdir(mode=0o755, parents=True, exist_ok=True)
        with locked(environment.root) as lock_file:
            held = {"keep_open": [lock_file]}
            if wanted not in {release.id for release in environment.releases()}:
                timeout = options["install_timeout"]
                installer = ensure_installer(
                    environment.root, python, options["installer_lock"], supply, timeout=timeout, **held
                )
                build(
                    environment,
                    python,
                    options["lock"],
                    wheels,
                    supply,
                    uv=str(installer / "bin/uv"),
                    check=options["check"],
                    install_timeout=timeout,
                    check_timeout=options["check_timeout"],
                    **held,
                )
            if switching:
                environment.switch(wanted)
            for path in [*environment.superfluous(wanted, options["keep"]), *environment.leftovers()]:
                remove(path)
    result = {
        "changed": changed,
        "release": wanted,
        "path": str(environment.path(wanted)),
        "previous": current,
        "releases": [release.id for release in environment.releases()],
        "packages": len(packages(after)),
    }
    if switching:
        result["diff"] = {
            "before": described(environment, current, before),
            "after": described(environment, wanted, after),
        }
    return result


def main() -> None:
    text, flag_list = {"type": "str", "default": ""}, {"type": "list", "elements": "str", "default": []}
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "root": {"type": "str", "required": True},
            "link": {"type": "str", "required": True},
            "lock": text,
            "installer_lock": text,
            "wheels": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "source": {"type": "str"},
                    "path": {"type": "str", "required": True},
                    "sha256": {"type": "str", "required": True},
                },
            },
            "check": flag_list,
            "release": text,
            "keep": {"type": "int", "default": 2},
            "python": {"type": "str", "default": "/usr/bin/python3"},
            "python_minimum": {"type": "str", "default": "3.11"},
            "wheelhouse": text,
            "index_url": {**text, "no_log": True},
            "extra_index_urls": {**flag_list, "no_log": True},
            "find_links": flag_list,
            "proxy": {**text, "no_log": True},
            "install_timeout": {"type": "int", "default": 3600},
            "check_timeout": {"type": "int", "default": 600},
        },
        supports_check_mode=True,
    )
    os.umask(0o022)
    started = time.monotonic()
    environment = Environment(Path(module.params["root"]), module.params["name"], Path(module.params["link"]))
    try:
        result = (absent if module.params["state"] == "absent" else present)(module, environment)
    except BuildError as error:
        module.fail_json(msg=f"environment {module.params['name']}: {error}")
    result["seconds"] = round(time.monotonic() - started, 1)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
