"""The command line. Before anything imports numpy: one thread for it, because its matrices here are no work for two."""

import os

for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
