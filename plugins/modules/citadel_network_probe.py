#!/usr/bin/python
"""Ansible module: reachability of services and ownership of ports, as a table."""

from __future__ import annotations

import dataclasses
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.citadel_network import (
    PROBES,
    Port,
    Service,
    check_ports,
    connection,
    probe_all,
    table,
    within,
)

DOCUMENTATION = r"""
---
module: citadel_network_probe
short_description: Ask services whether they answer, and who holds our ports
description:
  - Asks each service in its own protocol, all at the same time, and looks who holds each port of this host.
  - Changes nothing and never fails for what it found; the caller decides what a failure means.
options:
  services:
    description: Services on other hosts.
    type: list
    elements: dict
    default: []
    options:
      name: {description: Name in the table., type: str, required: true}
      kind:
        description: Protocol that is spoken.
        type: str
        required: true
        choices: [alertmanager, grafana, grpc, http, name, postgresql, prometheus, qdrant, tcp]
      host: {description: Name or address., type: str, required: true}
      port: {description: Port., type: int, default: 0}
      tls: {description: Whether TLS is spoken., type: str, choices: ['off', prefer, require], default: prefer}
      ca_file: {description: Authority that must have signed the certificate., type: str, default: ''}
      path: {description: "Path to ask for (kind http).", type: str, default: /}
      status: {description: "Status that is expected (kind http).", type: int, default: 200}
      api_key: {description: "Key (kind qdrant).", type: str, default: ''}
      user: {description: "User named to PostgreSQL.", type: str, default: citadel}
      database: {description: "Database named to PostgreSQL.", type: str, default: postgres}
      collections: {description: Collections that must be there., type: list, elements: str, default: []}
  ports:
    description: Ports of this host that must be free or ours.
    type: list
    elements: dict
    default: []
    options:
      name: {description: Name in the table., type: str, required: true}
      port: {description: Port., type: int, required: true}
      address: {description: Address it is wanted on; empty for every one., type: str, default: ''}
      units: {description: Patterns of the units that may hold it., type: list, elements: str, default: []}
  timeout: {description: Seconds that an answer may take., type: float, default: 5}
  networks: {description: Networks that the client is looked for in., type: list, elements: str, default: []}
author: Citadel LLM Server
"""

EXAMPLES = r"""
- name: Ask the neighbours
  citadel_network_probe:
    services:
      - {name: sql, kind: postgresql, host: sql.example.org, port: 5432}
    ports:
      - {name: gateway, port: 8000, units: [citadel-gateway.socket]}
"""

RETURN = r"""
rows: {description: "Each check with name, check, target, passed, seconds, detail, unit.", returned: always, type: list}
table: {description: The rows as lines of text., returned: always, type: list}
failed_services: {description: Names of the services that failed., returned: always, type: list}
failed_ports: {description: Names of the ports that somebody else holds., returned: always, type: list}
connection: {description: Addresses of the SSH connection in use., returned: always, type: dict}
client_known: {description: Whether the client of that connection is in networks., returned: always, type: bool}
"""


def frozen(options: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


def main() -> None:
    text = {"type": "str", "default": ""}
    names = {"type": "list", "elements": "str", "default": []}
    module = AnsibleModule(
        argument_spec={
            "services": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "name": {"type": "str", "required": True},
                    "kind": {"type": "str", "required": True, "choices": sorted(PROBES)},
                    "host": {"type": "str", "required": True},
                    "port": {"type": "int", "default": 0},
                    "tls": {"type": "str", "choices": ["off", "prefer", "require"], "default": "prefer"},
                    "ca_file": text,
                    "path": {"type": "str", "default": "/"},
                    "status": {"type": "int", "default": 200},
                    "api_key": {**text, "no_log": True},
                    "user": {"type": "str", "default": "citadel"},
                    "database": {"type": "str", "default": "postgres"},
                    "collections": names,
                },
            },
            "ports": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "name": {"type": "str", "required": True},
                    "port": {"type": "int", "required": True},
                    "address": text,
                    "units": names,
                },
            },
            "timeout": {"type": "float", "default": 5.0},
            "networks": names,
        },
        supports_check_mode=True,
    )
    services = [Service(**frozen(item)) for item in module.params["services"]]
    ports = [Port(**frozen(item)) for item in module.params["ports"]]
    way = connection()
    try:
        known = not way["client"] or within(way["client"], module.params["networks"])
    except ValueError as error:
        module.fail_json(msg=f"networks: {error}")
    answered = probe_all(services, module.params["timeout"])
    held = check_ports(ports)
    module.exit_json(
        changed=False,
        rows=[dataclasses.asdict(row) for row in [*answered, *held]],
        table=table([*answered, *held]),
        failed_services=[row.name for row in answered if not row.passed],
        failed_ports=[row.name for row in held if not row.passed],
        connection=way,
        client_known=known,
    )


if __name__ == "__main__":
    main()
