#!/usr/bin/python
"""Dashboards of ours in a folder of ours, through Grafana's HTTP API; nothing else there is touched."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DOCUMENTATION = r"""
---
module: citadel_dashboards
short_description: Bring a folder of Grafana to hold exactly these dashboards
description:
  - Pushes what differs (C(id) and C(version) aside), removes what is in the folder with our prefix and not in the list.
  - Refuses a dashboard whose uid somebody uses in another folder, and a uid without our prefix.
options:
  url:
    description: Where Grafana answers, seen from the managed host.
    type: str
    required: true
  token:
    description: Token of a service account that may edit dashboards and folders.
    type: str
    default: ""
  token_file:
    description: File on the managed host with that token, instead.
    type: path
    default: ""
  folder:
    description: uid of the folder.
    type: str
    default: citadel
  title:
    description: Title of the folder when it is made.
    type: str
    default: Citadel LLM
  prefix:
    description: What every uid of ours starts with.
    type: str
    default: citadel-
  dashboards:
    description: The dashboards, each as JSON text.
    type: list
    elements: str
    default: []
  annotation:
    description: Text for the dashboards' time line when something was changed here, or I(deployed). Empty for none.
    type: str
    default: ""
  deployed:
    description: Whether something else was changed that the time line should tell of.
    type: bool
    default: false
  state:
    description: C(absent) removes the dashboards, and the folder if it is empty then.
    type: str
    choices: [present, absent]
    default: present
author: [Citadel LLM]
"""

EXAMPLES = r"""
- name: Push the dashboards
  citadel_dashboards:
    url: http://127.0.0.1:3000
    token_file: /etc/prometheus/citadel/grafana.token
    dashboards: ["{{ lookup('ansible.builtin.file', 'operations.json') }}"]
"""

RETURN = r"""
changed_dashboards:
  description: uids of dashboards that were pushed or removed, or would be in check mode.
  type: list
  returned: always
"""

Json = dict[str, Any]
Call = Callable[[str, str, Any], tuple[int, Any]]  # method, path, body -> status, answer


class RefusalError(Exception):
    """Something that Grafana, or we, will not do; the message says what to change."""


@dataclass
class Result:
    changed_dashboards: list[str] = field(default_factory=list)
    diff: list[dict[str, str]] = field(default_factory=list)


class Folder:
    """``call`` talks to Grafana; 404 is an answer, every other failure a RefusalError."""

    def __init__(self, call: Call, folder: str, title: str, prefix: str, *, check: bool = False) -> None:
        self.call = call
        self.folder = folder
        self.title = title
        self.prefix = prefix
        self.check = check
        self.result = Result()

    def bring(self, dashboards: Sequence[Json]) -> Result:
        there = self.exists()
        uids = [str(dashboard.get("uid", "")) for dashboard in dashboards]
        for uid in uids:
            if not uid.startswith(self.prefix) or uids.count(uid) > 1:
                raise RefusalError(f"uid {uid!r}: each dashboard has one of its own that starts with {self.prefix}")
        # All of them are looked at before the first is pushed.
        different = [(dashboard, old) for dashboard in dashboards if (old := self.old(dashboard)) != clean(dashboard)]
        surplus = [uid for uid in (self.mine() if there else []) if uid not in uids]
        if not there and dashboards and not self.check:
            self.call("POST", "/api/folders", {"uid": self.folder, "title": self.title})
        for dashboard, old in different:
            self.note(dashboard["uid"], old, clean(dashboard))
            if not self.check:
                body = {"dashboard": {**dashboard, "id": None}, "folderUid": self.folder, "overwrite": True}
                self.call("POST", "/api/dashboards/db", {**body, "message": "Written by Ansible (role monitoring)"})
        self.remove(surplus)
        return self.result

    def take_away(self) -> Result:
        if self.exists():
            self.remove(self.mine())
            # Deleting a folder deletes what is in it: only an empty one goes.
            if not self.check and not self.search():
                self.call("DELETE", f"/api/folders/{self.folder}", None)
        return self.result

    def annotate(self, text: str, *, deployed: bool = False) -> None:
        """Once for what was changed, on all dashboards that show annotations with the tag deploy."""
        if text and (deployed or self.result.changed_dashboards) and not self.check:
            self.call("POST", "/api/annotations", {"text": text, "tags": ["citadel", "deploy"]})

    def exists(self) -> bool:
        return self.call("GET", f"/api/folders/{self.folder}", None)[0] == 200

    def search(self) -> list[str]:
        found = self.call("GET", f"/api/search?type=dash-db&limit=5000&folderUIDs={self.folder}", None)[1]
        # A Grafana that does not know folderUIDs gives them all.
        return sorted(entry["uid"] for entry in found if entry.get("folderUid") == self.folder)

    def mine(self) -> list[str]:
        return [uid for uid in self.search() if uid.startswith(self.prefix)]

    def old(self, dashboard: Json) -> Json | None:
        status, answer = self.call("GET", f"/api/dashboards/uid/{dashboard['uid']}", None)
        if status == 404:
            return None
        where = answer["meta"].get("folderUid") or "General"
        if where != self.folder:
            raise RefusalError(
                f"the dashboard {dashboard['uid']} is in the folder {where}, not in {self.folder}: move it there to "
                "have it overwritten, or give it another uid"
            )
        return clean(answer["dashboard"])

    def remove(self, uids: Sequence[str]) -> None:
        for uid in uids:
            self.note(uid, {"uid": uid}, None)
            if not self.check:
                self.call("DELETE", f"/api/dashboards/uid/{uid}", None)

    def note(self, uid: str, before: Json | None, after: Json | None) -> None:
        self.result.changed_dashboards.append(uid)
        texts = [json.dumps(text, indent=1, sort_keys=True) + "\n" if text else "" for text in (before, after)]
        headers = {"before_header": f"dashboard {uid}", "after_header": f"dashboard {uid}"}
        self.result.diff.append({"before": texts[0], "after": texts[1], **headers})


def clean(dashboard: Mapping[str, Any]) -> Json:
    """Without what Grafana counts itself."""
    return {key: value for key, value in dashboard.items() if key not in {"id", "version"}}


def caller(url: str, token: str) -> Call:
    if not url.startswith(("http://", "https://")):
        raise RefusalError(f"{url} is no URL of a Grafana: begin it with http:// or https://")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json", "Accept": "application/json"}

    def call(method: str, path: str, body: Any) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{url.rstrip('/')}{path}", data, headers, method=method)  # noqa: S310  checked above
        try:
            with opener.open(request, timeout=30) as reply:
                return reply.status, json.loads(reply.read() or b"null")
        except urllib.error.HTTPError as error:
            with error:
                said = " ".join(error.read().decode("utf-8", "replace").split())[:300]
            if error.code == 404 and method == "GET":
                return 404, None
            remedy = ": give the token a service account with the role Editor" if error.code in {401, 403} else ""
            raise RefusalError(f"Grafana answers {error.code} to {method} {path}{remedy}. It says: {said}") from None
        except (urllib.error.URLError, OSError, ValueError) as error:
            raise RefusalError(
                f"Grafana does not answer at {url} ({error}): start it, correct monitoring_grafana_url, or set "
                "monitoring_grafana to none"
            ) from None

    return call


def main() -> None:
    from ansible.module_utils.basic import AnsibleModule  # only Ansible has it; the rest is tested without

    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "required": True},
            "token": {"type": "str", "default": "", "no_log": True},
            "token_file": {"type": "path", "default": "", "no_log": False},
            "folder": {"type": "str", "default": "citadel"},
            "title": {"type": "str", "default": "Citadel LLM"},
            "prefix": {"type": "str", "default": "citadel-"},
            "dashboards": {"type": "list", "elements": "str", "default": []},
            "annotation": {"type": "str", "default": ""},
            "deployed": {"type": "bool", "default": False},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        },
        supports_check_mode=True,
    )
    given = module.params
    try:
        token = given["token"] or Path(given["token_file"]).read_text().strip()
    except OSError as error:
        where = given["token_file"] or "token_file"
        module.fail_json(msg=f"{where}: {error.strerror}. Set monitoring_grafana_token, or write the file")
    try:
        call = caller(given["url"], token)
        work = Folder(call, given["folder"], given["title"], given["prefix"], check=module.check_mode)
        dashboards = [json.loads(text) for text in given["dashboards"]]
        result = work.take_away() if given["state"] == "absent" else work.bring(dashboards)
        work.annotate(given["annotation"], deployed=given["deployed"])
    except (RefusalError, ValueError) as error:
        module.fail_json(msg=str(error))
    noted = bool(given["annotation"]) and given["deployed"]
    module.exit_json(
        changed=noted or bool(result.changed_dashboards), changed_dashboards=result.changed_dashboards, diff=result.diff
    )


if __name__ == "__main__":
    main()
