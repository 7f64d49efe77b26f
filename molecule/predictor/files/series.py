#!/usr/bin/python3
"""Series as recording rules would have made them: five weeks of them for promtool, and their values now for a scrape.

`series.py history` prints OpenMetrics, a sample every 15 minutes up to now. `series.py serve PORT` answers a scrape on
loopback with the values of the moment, so that the series go on. Both are one function of the time, noise included:
nothing jumps where they meet.
"""

import hashlib
import math
import sys
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

STEP = 900  # seconds
DAYS = 35
HOUR = 3600
DAY = 24 * HOUR
WEEK = 7 * DAY
HOST = 'instance="hx-llm-server-01"'


def noise(name: str, t: float) -> float:
    """Evenly spread between -1 and 1, the same for the same quarter of an hour."""
    digest = hashlib.sha256(f"{name}{int(t // STEP)}".encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**31 - 1


def office(t: float) -> float:
    """0 at night, 1 at noon of a working day, a third of it on Saturday and Sunday."""
    day = 0.5 - 0.5 * math.cos(2 * math.pi * (t % DAY) / DAY)
    weekend = (t // DAY + 4) % 7 in (0, 6)  # the first of January 1970 was a Thursday
    return day * (0.33 if weekend else 1.0)


def requests(t: float) -> float:
    """Requests a second: office hours with noise."""
    return 0.5 + 6 * office(t) * (1 + 0.15 * noise("requests", t)) + 0.2 * noise("floor", t) ** 2


def tokens(t: float) -> float:
    return 180 * requests(t) * (1 + 0.05 * noise("tokens", t))


def cost(t: float) -> float:
    """Dollars an hour: a fixed part, and what the requests cost."""
    return 0.9 + 0.07 * requests(t) + 0.01 * noise("cost", t)


def filesystem(t: float) -> float:
    """Share in use: a point a day, 85 % today, and less after each nightly clean-up."""
    since = (t - START) / DAY
    return 0.49 + 0.01 * since + 0.004 * (t % DAY) / DAY + 0.001 * noise("filesystem", t)


def constant(_: float) -> float:
    return 0.25


START = time.time() // DAY * DAY - DAYS * DAY  # a service that runs past midnight keeps the one it began with
SERIES: dict[str, tuple[str, Callable[[float], float]]] = {
    "model:llm_gateway_requests:rate5m": (f'{HOST},model="phi-3-mini"', requests),
    "model:llm_gateway_tokens:rate5m": (f'{HOST},model="phi-3-mini"', tokens),
    "platform:llm_gateway_cost_usd_per_hour:rate1h": (HOST, cost),
    "instance_mountpoint:node_filesystem_used:ratio": (f'{HOST},mountpoint="/"', filesystem),
    "model:llm_engine_kv_cache_usage:ratio": (f'{HOST},model="phi-3-mini"', constant),
}


def history() -> None:
    now = int(time.time())
    for name, (labels, value) in SERIES.items():
        print(f"# TYPE {name} gauge")
        for t in range((now - DAYS * DAY) // STEP * STEP, now, STEP):
            print(f"{name}{{{labels}}} {value(t):.6g} {t}")
    print("# EOF")


class Scrape(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        t = time.time()
        lines = [f"{name}{{{labels}}} {value(t):.6g}" for name, (labels, value) in SERIES.items()]
        body = ("\n".join(lines) + "\n").encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    if sys.argv[1] == "history":
        history()
    else:
        ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Scrape).serve_forever()
