"""Settings of a gateway with everything on: keys, tiers, limits in Redis, routing, prices, journal, access log."""

import hashlib
import json
from pathlib import Path

KEY = "sk-bench"
PLENTY = 1_000_000_000  # limits that are counted and never reached


def write(folder: Path, port: int, engines: list[int], redis: str, workers: int = 1) -> Path:
    """gateway.json and what it names, in `folder`; `redis` is a URL or empty."""
    for name in ("run", "state"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "engine-key").write_text("bench\n")
    files = {
        "gateway": {
            "host": "bench",
            "listen": {"address": "127.0.0.1", "port": port},
            "control_socket": str(folder / "run" / "control.sock"),
            "run_dir": str(folder / "run"),
            "state_dir": str(folder / "state"),
            "models_file": str(folder / "models.json"),
            "keys_file": str(folder / "keys.json"),
            "policies_file": str(folder / "policies.json"),
            "engine_key_file": str(folder / "engine-key"),
            "access_log": str(folder / "access.jsonl"),
            "workers": workers,
            "limits": {"inflight_per_model": 8192},
            **({"redis": {"url": redis}} if redis else {}),
        },
        "models": {
            "models": [
                {
                    "name": "bench",
                    "context": 32768,
                    "slots": 4096,
                    "backends": [{"host": "127.0.0.1", "port": engine} for engine in engines],
                    "price": {"share": 1.0, "input_mtoken": 0.1, "output_mtoken": 0.4},
                }
            ]
        },
        "keys": {
            "keys": [
                {
                    "id": "bench",
                    "sha256": hashlib.sha256(KEY.encode()).hexdigest(),
                    "user": "bench",
                    "scopes": ["inference", "read", "admin", "metrics"],
                }
            ],
            "users": [{"id": "bench", "tier": "enterprise"}],
        },
        "policies": {
            "tiers": [
                {
                    "name": "enterprise",
                    "priority": 5,
                    "requests_per_minute": PLENTY,
                    "tokens_per_minute": PLENTY,
                    "concurrency": 100_000,
                    "tokens_per_day": PLENTY * 1000,
                    "tokens_per_month": PLENTY * 10_000,
                }
            ],
            "hardware": {"usd": 20_000, "lifetime_years": 4, "watts": 700, "usd_per_kwh": 0.3, "utilisation": 0.5},
        },
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1))
    return folder / "gateway.json"
