"""A fake backend as a laptop has one: several models at one address, no /health, no counters."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeBackend:
    """`models`: the entries of its list. `key`: the one it wants; empty: any."""

    def __init__(self, *models: Any, key: str = "", health: bool = False) -> None:
        self.models = models
        self.key = key
        self.health = health
        self.asked: list[dict[str, Any]] = []
        backend = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self, status: int, body: object) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                if backend.key and self.headers["Authorization"] != f"Bearer {backend.key}":
                    self.answer(401, {"error": "no"})
                elif self.path == "/v1/models" and backend.models:
                    self.answer(200, {"object": "list", "data": list(backend.models)})
                elif self.path == "/health" and backend.health:
                    self.answer(200, {})
                else:
                    self.answer(404, "404 page not found")

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                backend.asked.append(request)
                message = {"role": "assistant", "content": f"I am {request['model']}"}
                usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                self.answer(200, {"object": "chat.completion", "choices": [choice], "usage": usage})

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the name it is called with
                """Nothing on the terminal."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port: int = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
