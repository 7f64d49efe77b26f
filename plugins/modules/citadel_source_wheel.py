#!/usr/bin/python
"""Ansible module: wheels of source trees, reproducible and kept in a cache."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.citadel_source_wheel import WheelError, wheel_of

DOCUMENTATION = r"""
---
module: citadel_source_wheel
short_description: Build wheels of source trees
description:
  - Builds each tree with hatchling, keyed by the content of the tree, into a cache folder, and returns path and hash.
  - The same content gives the same bytes on every machine. Only the cache is written, so it never reports a change.
options:
  sources: {description: Source trees with a pyproject.toml., type: list, elements: path, required: true}
  cache: {description: Where the wheels are kept., type: path, default: ~/.cache/citadel-llm/wheels}
author: Citadel LLM Server
"""

EXAMPLES = r"""
- name: Build the gateway's wheel
  citadel_source_wheel:
    sources: ["{{ playbook_dir }}/../gateway"]
  delegate_to: localhost
"""

RETURN = r"""
wheels: {description: "For each tree source, path and sha256.", returned: success, type: list}
"""


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "sources": {"type": "list", "elements": "path", "required": True},
            "cache": {"type": "path", "default": "~/.cache/citadel-llm/wheels"},
        },
        supports_check_mode=True,
    )
    try:
        built = [wheel_of(source, Path(module.params["cache"])) for source in module.params["sources"]]
    except WheelError as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=False, wheels=[dataclasses.asdict(wheel) for wheel in built])


if __name__ == "__main__":
    main()
