"""Our gateway as one entry of a benchmark that starts gateways itself: `entry.py PORT ENGINE_PORT`.

One worker with everything on, for the key and the model of citadel.py. REDIS_URL names the store of limits, such as
unix:///run/redis/redis.sock; it belongs to the load's side, so the benchmark starts it.
"""

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from bench.gateway import citadel  # noqa: E402  # found by the line above
from bench.gateway.product import compiled, product_python  # noqa: E402  # likewise

port, engine = map(int, sys.argv[1:3])
config = citadel.write(Path(tempfile.mkdtemp(prefix="citadel-entry-")), port, [engine], os.environ["REDIS_URL"])
python = product_python()
os.environ["PYTHONPATH"] = compiled(str(ROOT / "gateway" / "src"), python)
os.execv(python, [python, str(ROOT / "bench" / "gateway" / "one_worker.py"), str(config)])
