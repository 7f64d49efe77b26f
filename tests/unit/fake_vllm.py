"""A stand-in for vLLM's server: a small HTTP server that says it is fake, for the tests of citadel-engine.

It is started as vLLM is (``python -m vllm.entrypoints.openai.api_server --config FILE``, by a ``python`` that runs this
file) and reads ``behaviour.json`` in its working directory at every request, so that a test can change its mind:

- ``ready_after`` seconds until it listens, ``exit_after`` seconds until it dies with ``exit_status``;
- ``completion``: ``ok``, ``busy`` (503), ``broken`` (500), ``hang`` (no answer), ``odd`` (200 without text);
- ``metrics``: ``move`` (a counter that counts), ``still``, ``gone`` (404), ``hang``;
- ``stubborn``: SIGTERM is ignored.

What it was given is written to ``seen.json``.
"""

import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BEHAVIOUR = {
    "completion": "ok",
    "metrics": "move",
    "ready_after": 0,
    "exit_after": 0,
    "exit_status": 1,
    "stubborn": False,
}
USAGE = {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}


def behaviour() -> dict[str, Any]:
    try:
        return {**BEHAVIOUR, **json.loads(Path("behaviour.json").read_text())}
    except (OSError, ValueError):
        return dict(BEHAVIOUR)


def settings(path: str) -> dict[str, Any]:
    lines = [line for line in Path(path).read_text().splitlines() if ": " in line and not line.startswith("#")]
    return {key: json.loads(value) for key, value in (line.split(": ", 1) for line in lines)}


class Handler(BaseHTTPRequestHandler):
    server_version = "fake-vllm"
    tokens = 0

    def log_message(self, *_: Any) -> None:
        """Not a line: the tests look for what the engine says."""

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        """Metrics as vLLM writes them, labels and all."""
        how = behaviour()["metrics"]
        if how == "hang":
            time.sleep(60)
        if how == "move":
            Handler.tokens += 1
        text = (
            "# HELP vllm:generation_tokens_total tokens\n"
            f'vllm:generation_tokens_total{{engine="0",model_name="m"}} {float(Handler.tokens)}\n'
            'vllm:prompt_tokens_total{engine="0"} 7.0\nvllm:prompt_tokens_total_other 3\n'
            "vllm:kv_cache_usage_perc 0.25\n"
        )
        self.answer(404 if how == "gone" else 200, text.encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        how = behaviour()["completion"]
        if how == "hang":
            time.sleep(60)
        if self.headers["Authorization"] != f"Bearer {os.environ['VLLM_API_KEY']}":
            return self.answer(401, b'{"error": "Unauthorized"}')
        if how == "busy":
            return self.answer(503, b'{"error": "The engine is currently busy"}')
        if how == "broken":
            return self.answer(500, b'{"error": "cpu_gemm_wna16"}')
        if how == "odd":
            return self.answer(200, b'{"choices": []}')
        assert body["max_tokens"] == 1
        return self.answer(200, json.dumps({"choices": [{"text": "a fake token"}], "usage": USAGE}).encode())


def main() -> None:
    how, given = behaviour(), settings(sys.argv[sys.argv.index("--config") + 1])
    seen = {"argv": sys.argv[1:], "environment": dict(os.environ), "settings": given, "pid": os.getpid()}
    Path("seen.json").write_text(json.dumps(seen))
    signal.signal(signal.SIGTERM, lambda *_: None if how["stubborn"] else sys.exit(0))
    print("(Worker pid=1) INFO 11-23 15:53:59 [loader.py:501] Loading weights of a fake model", flush=True)
    print("half a bar\rwhole bar", file=sys.stderr, flush=True)
    if how["exit_after"]:
        time.sleep(how["exit_after"])
        print("RuntimeError: a fake reason", flush=True)
        sys.exit(how["exit_status"])
    time.sleep(how["ready_after"])
    server = ThreadingHTTPServer((given["host"], given["port"]), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    while True:
        time.sleep(1)


if __name__ == "__main__":
    main()
