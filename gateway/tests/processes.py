"""Real processes for the tests: the engine, `serve`, and workers started as systemd starts them."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHONPATH = f"{ROOT / 'gateway' / 'src'}:{ROOT}"

# what systemd does before it runs a unit's command: the socket as descriptor 3, and two variables
AS_SYSTEMD = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": PYTHONPATH, **more}


def start(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, *arguments], env=environment(), cwd=ROOT)


def command(*arguments: str, key: str = "") -> subprocess.CompletedProcess[str]:
    """`citadel-gateway …` to its end."""
    words = [sys.executable, "-m", "citadel_gateway", *arguments]
    env = environment(**({"CITADEL_GATEWAY_KEY": key} if key else {}))
    return subprocess.run(words, env=env, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)


def wait_for(url: str, process: subprocess.Popen[bytes], seconds: float = 20.0) -> None:
    """Until the address answers with 200."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, f"the process has ended with {process.returncode}"
        try:
            with urllib.request.urlopen(url, timeout=2) as reply:
                reply.read()
                return
        except OSError:  # refused, reset, or not answered yet
            time.sleep(0.05)
    raise TimeoutError(url)


def stop(process: subprocess.Popen[bytes], seconds: float = 20.0) -> int:
    process.send_signal(signal.SIGTERM)
    return process.wait(seconds)


class SystemdWorker:
    """`citadel-gateway worker N` with a passed socket, a notify socket, and its words."""

    def __init__(self, number: int, config: Path, listener: socket.socket) -> None:
        self.number = number
        self.config = config
        self.listener = listener
        self.notify = config.parent / f"notify-{number}"
        self.process: subprocess.Popen[bytes] | None = None
        self.manager: socket.socket | None = None

    async def start(self) -> None:
        self.notify.unlink(missing_ok=True)
        self.manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.manager.bind(str(self.notify))
        self.manager.setblocking(False)
        fd = self.listener.fileno()
        words = ["-c", AS_SYSTEMD, str(fd), "-m", "citadel_gateway", "worker", str(self.number), "--config"]
        self.process = subprocess.Popen(  # noqa: ASYNC220  # a fork takes a millisecond
            [sys.executable, *words, str(self.config)],
            env=environment(NOTIFY_SOCKET=str(self.notify), WATCHDOG_USEC="2000000"),
            pass_fds=(fd,),
            cwd=ROOT,
        )
        assert "READY=1" in await self.word("READY=1")

    async def word(self, wanted: str) -> str:
        """The next notification that holds `wanted`."""
        assert self.manager is not None
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(20):
            while wanted not in (text := (await loop.sock_recv(self.manager, 4096)).decode()):
                pass
        return text

    async def stop(self) -> int:
        assert self.process is not None
        assert self.manager is not None
        self.process.send_signal(signal.SIGTERM)
        await self.word("STOPPING=1")
        status = await asyncio.to_thread(self.process.wait, 30)
        self.manager.close()
        return status
