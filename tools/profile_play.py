#!/usr/bin/env python3
"""Run a playbook (without a COMMAND: site.yml on the lab) and print its time by role and by task.

The times are those of Ansible's own profile_tasks callback. Meant for a run that has
nothing to change: with ``--budget SECONDS`` it fails if the run took longer or changed something.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator

SITE = ["lab/lab", "play", "playbooks/site.yml"]
TASK = re.compile(r"^(?P<name>.+?) -{2,} (?P<seconds>\d+\.\d+)s$")
RECAP = re.compile(r"^(?P<host>\S+)\s+: ok=(?P<ok>\d+)\s+changed=(?P<changed>\d+)\s+unreachable=(\d+)\s+failed=(\d+)")


def task_times(lines: Iterable[str]) -> Iterator[tuple[str, str, float]]:
    """(role or playbook, task, seconds) of each line of the callback's recap."""
    for line in lines:
        if match := TASK.match(line.strip()):
            role, separator, task = match["name"].partition(" : ")
            yield (role, task, float(match["seconds"])) if separator else ("(play)", role, float(match["seconds"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, help="fail if the run is longer, in seconds, or changes something")
    parser.add_argument("--slowest", type=int, default=15, help="how many single tasks to show")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="what plays")
    arguments = parser.parse_args()
    environment = {
        **os.environ,
        "ANSIBLE_CALLBACKS_ENABLED": "ansible.posix.profile_tasks",
        "PROFILE_TASKS_TASK_OUTPUT_LIMIT": "all",
        "PROFILE_TASKS_SORT_ORDER": "none",
        "ANSIBLE_NOCOLOR": "1",
    }
    started = time.monotonic()
    command = arguments.command or SITE
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    wall = time.monotonic() - started
    lines = run.stdout.splitlines()
    if run.returncode:
        print(run.stdout)
        return run.returncode

    tasks = list(task_times(lines))
    roles: dict[str, list[float]] = defaultdict(list)
    for role, _, seconds in tasks:
        roles[role].append(seconds)
    print(f"{'role':24} tasks  seconds")
    for role, times in sorted(roles.items(), key=lambda item: -sum(item[1])):
        print(f"{role:24} {len(times):5d} {sum(times):8.1f}")
    print(f"{'all of it, wall clock':24} {len(tasks):5d} {wall:8.1f}")
    print(f"\nthe {arguments.slowest} slowest tasks")
    for role, task, seconds in sorted(tasks, key=lambda item: -item[2])[: arguments.slowest]:
        print(f"{seconds:8.2f}  {role}: {task}")

    recaps = [match for line in lines if (match := RECAP.match(line))]
    print()
    for match in recaps:
        print(f"{match['host']}: ok={match['ok']} changed={match['changed']}")
    if arguments.budget is None:
        return 0
    changed = [match["host"] for match in recaps if int(match["changed"])]
    if changed:
        print(f"not a run without changes: {', '.join(changed)}", file=sys.stderr)
    if wall > arguments.budget:
        print(f"{wall:.1f} s is over the budget of {arguments.budget:.0f} s", file=sys.stderr)
    return 1 if changed or wall > arguments.budget or not recaps else 0


if __name__ == "__main__":
    sys.exit(main())
