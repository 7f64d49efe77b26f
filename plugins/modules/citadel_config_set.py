#!/usr/bin/python
"""Ansible module: files that services read, changed and loaded as a whole, or not at all."""

from __future__ import annotations

import dataclasses
import hashlib

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.citadel_config_set import ConfigSet, File, RefusalError, Service

DOCUMENTATION = r"""
---
module: citadel_config_set
short_description: Bring a set of files to a state, have services load it, and take it back if they do not
description:
  - Files are staged beside their places and checked by the services' own checkers before anything is touched.
  - After the swap the services are reloaded and asked whether they have loaded what they should; if not, the old files
    come back, are loaded, and the task fails with what was wrong.
  - A service that runs on older files than those on disk is reloaded too.
options:
  files:
    description: Files of ours. Keys are C(path), C(content), C(mode), C(owner), C(group), C(state).
    type: list
    elements: dict
    default: []
  secrets:
    description: Text of secret files by path, mode 0640 and of I(secret_group). An empty text removes the file.
    type: dict
    default: {}
  secret_group:
    description: Group that may read the secrets; empty for whoever runs this, and nobody else.
    type: str
    default: root
  configs:
    description: New text of files of somebody else's, by path. Owner and mode stay.
    type: dict
    default: {}
  bases:
    description: SHA-256 of the text that each of I(configs) was made from; if the file is another now, nothing is done.
    type: dict
    default: {}
  services:
    description: Who reads them; see Service in module_utils/citadel_config_set.py for the keys.
    type: list
    elements: dict
    default: []
  tree:
    description: Folder of ours that the checkers are given a staged copy of.
    type: path
    required: true
  owned:
    description: Folders that hold nothing but files of the set; others in them are removed.
    type: list
    elements: path
    default: []
  wait:
    description: Seconds that a service has to load its files.
    type: float
    default: 30
author: [Citadel LLM]
"""

EXAMPLES = r"""
- name: Extend Prometheus by a rule file
  citadel_config_set:
    tree: /etc/prometheus/citadel
    owned: [/etc/prometheus/citadel/rules]
    files:
      - {path: /etc/prometheus/citadel/rules/a.yml, content: "{{ rules }}"}
    configs: {/etc/prometheus/prometheus.yml: "{{ text }}"}
    bases: {/etc/prometheus/prometheus.yml: "{{ before | hash('sha256') }}"}
    services:
      - name: prometheus
        unit: prometheus.service
        config: /etc/prometheus/prometheus.yml
        check: [promtool, check, config, "{config}"]
        url: http://127.0.0.1:9090
"""

RETURN = r"""
changed_paths:
  description: What was changed, or would be in check mode.
  type: list
  returned: always
reloaded:
  description: Services that have loaded their files anew.
  type: list
  returned: always
"""


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "files": {"type": "list", "elements": "dict", "default": []},
            "secrets": {"type": "dict", "default": {}, "no_log": True},
            "secret_group": {"type": "str", "default": "root", "no_log": False},
            "configs": {"type": "dict", "default": {}, "no_log": True},
            "bases": {"type": "dict", "default": {}},
            "services": {"type": "list", "elements": "dict", "default": []},
            "tree": {"type": "path", "required": True},
            "owned": {"type": "list", "elements": "path", "default": []},
            "wait": {"type": "float", "default": 30.0},
        },
        supports_check_mode=True,
    )
    given = module.params
    try:
        files = [File(**entry) for entry in given["files"]]
        services = [Service(**entry) for entry in given["services"]]
    except TypeError as error:
        module.fail_json(msg=f"files and services: {error}")
    for path, text in given["secrets"].items():
        state = "present" if text else "absent"
        owner, mode = ("root", "0640") if given["secret_group"] else ("", "0600")
        files.append(File(path, text, mode, owner, given["secret_group"], state, secret=True))
    for path, text in given["configs"].items():
        base = given["bases"].get(path) or hashlib.sha256(text.encode()).hexdigest()
        files.append(File(path, text, base=base))

    def run(command: object) -> tuple[int, str, str]:
        done: tuple[int, str, str] = module.run_command(command)
        return done

    work = ConfigSet(
        files,
        services,
        tree=given["tree"],
        owned=given["owned"],
        run=run,
        check=module.check_mode,
        wait=given["wait"],
    )
    try:
        result = work.apply()
    except (RefusalError, OSError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=bool(result.changed_paths or result.reloaded), **dataclasses.asdict(result))


if __name__ == "__main__":
    main()
