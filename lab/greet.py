"""Last step of `make lab`: ask the gateway something through its front door, and say how to do the same."""

import json
import shlex
import sys

import host as machine
from common import HOSTS, KEY_FILE, LabError, run

FRONT = "hx-llm-server-01"


def main() -> None:
    url = f"http://{HOSTS[FRONT].address}:8000/v1"
    key = KEY_FILE.read_text().strip()
    # the key goes in by standard input: a command line is read by every user of the machine
    listed = json.loads(
        run(
            machine.inside_command(["curl", "-sf", "-K", "-", f"{url}/models"]),
            input=f'header = "Authorization: Bearer {key}"',
        ).stdout
    )
    models = [model["id"] for model in listed["data"]]
    if not models:
        raise LabError(
            "the gateway lists no model; see `lab/lab ssh hx-llm-server-01 systemctl status citadel-llm.target`"
        )
    body = {"model": models[-1], "messages": [{"role": "user", "content": "Say something."}], "max_tokens": 8}
    print("\nThe lab is up:")
    for host in HOSTS.values():
        if (state := machine.running(host.name)) and state.alive():
            print(f"  {host.name:18} {host.address}")
    print(f"\nModels at {url}: {', '.join(models)}\n")
    print("Talk to one (the answers are nonsense: the weights are tiny and random):\n")
    print(f"  lab/lab exec curl -s {url}/chat/completions \\")
    print("    -H \"Authorization: Bearer $(lab/lab key)\" -H 'Content-Type: application/json' \\")
    print(f"    -d {shlex.quote(json.dumps(body))}\n")
    config = f'header = "Authorization: Bearer {key}"\nheader = "Content-Type: application/json"\n'
    answer = run(
        machine.inside_command(["curl", "-sf", "-K", "-", "-d", json.dumps(body), f"{url}/chat/completions"]),
        input=config,
    ).stdout
    print(f"It answered: {json.loads(answer)['usage']}")


if __name__ == "__main__":
    try:
        main()
    except LabError as error:
        sys.exit(f"lab: {error}")
