"""The predictor's recurrent network, where there is PyTorch: in the environment of the engines, on their host."""

import json
import subprocess

from .conftest import HOST, REPO, Lab

FOLDER = "/tmp/citadel-lstm"  # on the lab's host
TRY = """
import json
import numpy as np
from citadel_predictor.forecast import METHODS, choose

day, noise, source = 24, np.zeros(21 * 24), np.random.default_rng(5)
for at in range(1, noise.size):
    noise[at] = 0.5 * noise[at - 1] + source.normal(0, 3)
series = 50 + 10 * np.sin(2 * np.pi * np.arange(noise.size) / day) + noise
first, second = (METHODS["lstm"].fit(series[:-day], day).predict(day).tolist() for _ in range(2))
choice = choose(series, day, day, methods=[METHODS["lstm"], METHODS["ridge"]])
miss = float(np.abs(np.array(first) - series[-day:]).mean())
print(json.dumps({"same": first == second, "miss": miss, "mase": choice.mase, "method": choice.method}))
"""


def test_the_network_learns_and_is_judged(lab: Lab) -> None:
    """It foretells the same twice, better than a mean would, and takes part in the choice like every other method."""
    with subprocess.Popen(["tar", "-C", "predictor/src", "-cf", "-", "citadel_predictor"], cwd=REPO, stdout=-1) as tar:
        unpack = f"rm -rf {FOLDER} && mkdir {FOLDER} && tar -C {FOLDER} -xf -"
        subprocess.run(["lab/lab", "ssh", HOST, unpack], cwd=REPO, stdin=tar.stdout, check=True)
    try:
        path = f"{FOLDER}:$(ls /srv/wheelhouse/threadpoolctl-*.whl)"  # a wheel of plain Python is importable as it is
        command = f"cd {FOLDER} && OMP_NUM_THREADS=1 PYTHONPATH={path} /opt/citadel/env/bin/python -c '{TRY}'"
        said = json.loads(lab.ssh(command, timeout=300).splitlines()[-1])
    finally:
        lab.ssh(f"rm -rf {FOLDER}")
    assert said["same"]
    assert said["miss"] < 6  # the season alone swings by 10
    assert {"lstm", "ridge", "naive"} <= set(said["mase"])
    assert said["mase"][said["method"]] <= said["mase"]["naive"]
