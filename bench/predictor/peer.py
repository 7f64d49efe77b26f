"""Forecasts of one of statsforecast's methods: an order as JSON on standard input, JSON on standard output.

Runs in the environment that peers.py installs, with nothing of this project.
"""

import json
import os
import resource
import sys
import time

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(threads, "1")

import numpy as np  # noqa: E402  # after the number of its threads
from statsforecast import models  # type: ignore[import-not-found]  # noqa: E402  # in its own environment alone


def main() -> None:
    order = json.load(sys.stdin)
    model = getattr(models, order["method"])(season_length=order["season"])
    answers = []
    for values in order["series"]:
        began = time.process_time()
        found = model.forecast(y=np.array(values), h=order["horizon"], level=[80])
        answers.append(
            {
                "mean": np.asarray(found["mean"]).tolist(),
                "low": np.asarray(found["lo-80"]).tolist(),
                "high": np.asarray(found["hi-80"]).tolist(),
                "ms": (time.process_time() - began) * 1000,
                "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
        )
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
