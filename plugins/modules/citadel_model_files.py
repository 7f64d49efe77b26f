#!/usr/bin/python
"""Tell which models' files are on the host as the inventory asks for, and which are to be fetched."""

from __future__ import annotations

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.model_files import look

DOCUMENTATION = r"""
module: citadel_model_files
short_description: Tell which models' files are on the host, and which are to be fetched
description:
  - Compares the manifest in /opt/models/<name>/<revision>/ (repository, revision, name and size of each file) with the
    model's source. Contents are not read.
  - Changes nothing; works in check mode on a host that has nothing yet.
options:
  models:
    description: Model entries, merged with their defaults.
    type: list
    elements: dict
    required: true
  models_dir:
    description: Folder of the models.
    type: path
    default: /opt/models
author: [Citadel LLM]
"""

EXAMPLES = r"""
- name: Ask which models need fetching
  citadel_model_files:
    models: "{{ vllm_models }}"
  register: __vllm_files
"""

RETURN = r"""
files:
  description: By model, C(state) (ready, missing, unresolved, absent), C(reason), C(revision), C(directory), C(bytes).
  type: dict
  returned: always
missing:
  description: The entries of C(files) that are to be fetched.
  type: list
  returned: always
unresolved:
  description: Sentences about sources that cannot be fetched as they are written, with the remedy.
  type: list
  returned: always
"""


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "models": {"type": "list", "elements": "dict", "required": True},
            "models_dir": {"type": "path", "default": "/opt/models"},
        },
        supports_check_mode=True,
    )
    files = [look(entry, Path(module.params["models_dir"])) for entry in module.params["models"]]
    module.exit_json(
        changed=False,
        files={model.name: model.as_dict() for model in files},
        missing=[model.as_dict() for model in files if model.state == "missing"],
        unresolved=[model.reason for model in files if model.state == "unresolved"],
    )


if __name__ == "__main__":
    main()
