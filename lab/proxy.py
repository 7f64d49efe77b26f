#!/usr/bin/env python3
"""Package proxy of the lab: the hosts' only way out, and only to the registries that this machine is set up with.

It listens inside the lab's network and connects from the machine's. Debian packages are kept in the cache folder:
they never change under one name. Started and ended by `lab/lab`; ``proxy.py --print`` prints the registries.
"""

import hashlib
import http.client
import http.server
import os
import re
import select
import socket
import socketserver
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from common import CACHE, NETWORK
from network import setns

PACKAGES = CACHE / "packages"
PYPI = "https://pypi.org/simple"
PYPI_FILES = "https://files.pythonhosted.org"
HOP_BY_HOP = {"connection", "proxy-connection", "keep-alive", "transfer-encoding", "host"}
IDLE_SECONDS = 120


def registries() -> set[str]:
    """Host names of the package registries in this machine's settings of apt and pip."""
    urls = [PYPI, PYPI_FILES]
    for source in [Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*")]:
        if source.suffix in {".list", ".sources"} and source.is_file():
            lines = [line for line in source.read_text().splitlines() if not line.lstrip().startswith("#")]
            urls += re.findall(r"https?://[^\s\]]+", "\n".join(lines))
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], text=True, capture_output=True, check=False
    ).stdout
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        if name.endswith("index-url"):
            urls += value.strip("'\"").split()
    urls += [value for name, value in os.environ.items() if name.endswith("INDEX_URL")]
    return {host for url in urls if (host := urlsplit(url).hostname)}


class Handler(http.server.BaseHTTPRequestHandler):
    """GET for apt, CONNECT for everything over TLS."""

    protocol_version = "HTTP/1.1"
    allowed: frozenset[str] = frozenset()

    def log_message(self, *args: object) -> None:
        """Say nothing: the client sees the status."""

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if url.hostname not in self.allowed:
            self.send_error(403, "not a registry of this machine")
            return
        kept = PACKAGES / (hashlib.sha256(self.path.encode()).hexdigest() + ".deb")
        if url.path.endswith(".deb") and kept.exists():
            self._answer(200, {}, kept.read_bytes())
            return
        connection = http.client.HTTPConnection(url.hostname or "", url.port or 80, timeout=IDLE_SECONDS)
        try:
            headers = {k: v for k, v in self.headers.items() if k.lower() not in HOP_BY_HOP}
            connection.request("GET", url.path + (f"?{url.query}" if url.query else ""), headers=headers)
            reply = connection.getresponse()
            data = reply.read()
        except OSError as error:
            self.send_error(502, str(error))
            return
        finally:
            connection.close()
        if url.path.endswith(".deb") and reply.status == 200:
            with tempfile.NamedTemporaryFile(dir=PACKAGES, delete=False) as new:
                new.write(data)
            Path(new.name).rename(kept)
        passed = ("Last-Modified", "ETag", "Content-Type", "Location", "Content-Range")
        self._answer(reply.status, {k: reply.headers[k] for k in passed if reply.headers[k]}, data)

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_CONNECT(self) -> None:
        host, _, port = self.path.partition(":")
        if host not in self.allowed or port != "443":
            self.send_error(403, "not a registry of this machine")
            return
        with socket.create_connection((host, int(port)), 30) as upstream:
            self.send_response(200, "Connection established")
            self.end_headers()
            self._tunnel(upstream)
        self.close_connection = True

    def _tunnel(self, upstream: socket.socket) -> None:
        other = {self.connection: upstream, upstream: self.connection}
        while ready := select.select(list(other), [], [], IDLE_SECONDS)[0]:
            for end in ready:
                data = end.recv(65536)
                if not data:
                    return
                other[end].sendall(data)


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True


def listening_socket() -> socket.socket:
    """A listening socket inside the lab's network, made by a process that stays outside."""
    outside = os.open("/proc/self/ns/net", os.O_RDONLY)
    setns(NETWORK.path)
    listener = socket.create_server((NETWORK.gateway, NETWORK.proxy_port), backlog=64)
    setns(Path(f"/proc/self/fd/{outside}"))
    os.close(outside)
    return listener


def main() -> None:
    Handler.allowed = frozenset(registries())
    if "--print" in sys.argv:
        print("\n".join(sorted(Handler.allowed)))
        return
    PACKAGES.mkdir(parents=True, exist_ok=True)
    server = Server((NETWORK.gateway, NETWORK.proxy_port), Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = listening_socket()
    server.serve_forever()


if __name__ == "__main__":
    main()
