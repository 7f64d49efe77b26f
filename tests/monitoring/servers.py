"""A real Prometheus and a real Alertmanager for tests, with their tools. All on loopback, on ports of their own.

The programs are the machine's, else those that tools/servers has unpacked into the user's cache.
"""

import os
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gateway.tests.servers import CACHE, Server, environment, find, free_port

__all__ = [
    "AlertmanagerServer",
    "PrometheusServer",
    "alertmanager",
    "amtool",
    "environment",
    "free_port",
    "prometheus",
    "promtool",
    "run_alertmanager",
    "run_prometheus",
]


def promtool() -> Path:
    return Path(find("promtool"))


def amtool() -> Path:
    return Path(find("amtool"))


def prometheus() -> Path:
    return Path(find("prometheus"))


def alertmanager() -> Path:
    return Path(find("prometheus-alertmanager"))


def beside_its_files(program: Path) -> list[str]:
    """What goes before a program that was unpacked: Debian's Alertmanager reads its templates in /usr/share, so it gets
    a mount namespace in which the unpacked files are there. The process keeps its id.
    """
    if not program.is_relative_to(CACHE):
        return []
    root = [] if os.geteuid() == 0 else ["--map-root-user"]
    mounted = 'mount --bind "$0" /usr/share && exec "$@"'
    return ["unshare", "--mount", *root, "sh", "-c", mounted, str(CACHE / "usr/share")]


class HttpServer(Server):
    """One that says at `/-/ready` that it is ready."""

    program: Path

    def __init__(self, prefix: str, *arguments: str) -> None:
        super().__init__(prefix)
        self.arguments = arguments

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=2) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return False

    def start(self) -> None:
        self.launch(
            [*beside_its_files(self.program), str(self.program), *self.arguments], environment(str(self.program))
        )
        self.wait()

    def stop(self) -> None:
        self.end(signal.SIGTERM)

    def reload(self) -> None:
        """Read the configuration again. Raises urllib.error.HTTPError if the server refuses it."""
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}/-/reload", method="POST"), timeout=10):
            pass


class PrometheusServer(HttpServer):
    def __init__(self, config: Path, data: Path, *more: str) -> None:
        super().__init__("prometheus-")
        self.program = prometheus()
        self.arguments = (
            f"--config.file={config}",
            f"--storage.tsdb.path={data}",
            "--storage.tsdb.retention.time=400d",
            f"--web.listen-address=127.0.0.1:{self.port}",
            "--web.enable-lifecycle",
            "--log.level=warn",
            *more,
        )


class AlertmanagerServer(HttpServer):
    def __init__(self, config: Path, data: Path, *more: str) -> None:
        super().__init__("alertmanager-")
        self.program = alertmanager()
        self.arguments = (
            f"--config.file={config}",
            f"--storage.path={data}",
            f"--web.listen-address=127.0.0.1:{self.port}",
            "--cluster.listen-address=",
            "--log.level=warn",
            *more,
        )


@contextmanager
def run_prometheus(config: Path, data: Path, *more: str) -> Iterator[str]:
    """A Prometheus on this configuration and data; its address."""
    server = PrometheusServer(config, data, *more)
    try:
        server.start()
        yield server.url
    finally:
        server.remove()


@contextmanager
def run_alertmanager(config: Path, data: Path, *more: str) -> Iterator[str]:
    """An Alertmanager on this configuration, keeping its silences in `data`; its address."""
    server = AlertmanagerServer(config, data, *more)
    try:
        server.start()
        yield server.url
    finally:
        server.remove()


def check(tool: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run promtool or amtool; its status and what it said."""
    command = [str(tool), *map(str, arguments)]
    env = environment(str(tool))
    return subprocess.run(command, env=env, text=True, capture_output=True, check=False, timeout=120)
