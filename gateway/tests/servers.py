"""A real Redis and a real PostgreSQL for the tests, each started once a session, on loopback and on a Unix socket.

The programs are those on PATH or in /usr/lib/postgresql, else the ones that tools/servers has unpacked into the user's
cache. Their data lies in a temporary folder and goes with them.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hiredis
import psycopg
import pytest

__all__ = ["PostgresServer", "RedisServer", "postgres_server", "redis_server"]

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "citadel-lab" / "servers"
NOBODY = 65534
STARTING = 30.0  # seconds, on a busy machine


def find(program: str, *folders: str) -> str:
    """The path of a program; `folders` may hold patterns, those below the cache come last."""
    on_path = shutil.which(program)
    if on_path is not None and not folders:
        return on_path
    for root in (Path("/"), CACHE):
        for folder in (*folders, "usr/bin"):
            for found in sorted(root.glob(f"{folder}/{program}"), reverse=True):
                return str(found)
    if on_path is not None:
        return on_path
    raise RuntimeError(f"there is no {program} for the tests: run tools/servers, which fetches one (it needs no root)")


def environment(program: str, root: Path = CACHE) -> dict[str, str]:
    """That of the program: what was unpacked below `root` finds its libraries there too."""
    given = {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C", "TZ": "UTC"}
    if Path(program).is_relative_to(root):
        given["LD_LIBRARY_PATH"] = ":".join(str(path) for path in root.glob("usr/lib/*-linux-gnu*"))
    return given


def link_or_copy(source: str, target: str) -> str:
    """Hard links cost nothing, but only within a file system."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
        return port


class Server:
    """A process of ours in a folder of its own, ended by its id."""

    process: subprocess.Popen[bytes] | None = None

    def __init__(self, prefix: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=prefix))  # not pytest's: a socket's path may have 107 bytes
        self.port = free_port()

    def launch(self, command: list[str], env: dict[str, str]) -> None:
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, env=env, cwd=self.folder, stdout=log, stderr=log)

    def answers(self) -> bool:
        raise NotImplementedError

    def wait(self) -> None:
        """Until it answers."""
        assert self.process is not None
        deadline = time.monotonic() + STARTING
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                log = (self.folder / "log").read_text(errors="replace")
                self.end(signal.SIGKILL)
                raise RuntimeError(f"{type(self).__name__} did not start:\n{log}")
            time.sleep(0.01)

    def end(self, number: int) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)  # a stopped one would hear nothing but SIGKILL
            self.process.send_signal(number)
            self.process.wait(STARTING)
            self.process = None

    def kill(self) -> None:
        """As a power cut does it."""
        self.end(signal.SIGKILL)

    def freeze(self) -> None:
        """It accepts and never answers, until `thaw`."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def remove(self) -> None:
        self.end(signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)


class RedisServer(Server):
    """A Redis with the gateway's user as the role makes it, and one who may do everything, for `command`. What it holds
    is lost with its process, unless `keep`.
    """

    USER = "gateway"
    RULES = "~citadel* -@all +@connection +@read +@write +@scripting -@admin -@dangerous -@blocking +time"

    def __init__(self, *arguments: str, keep: bool = False) -> None:
        super().__init__("redis-")
        self.password = secrets.token_hex(16)
        self.path = self.folder / "redis.sock"
        self.password_file = self.folder / "password"
        self.password_file.write_text(self.password + "\n")
        acl = f"user {self.USER} on resetchannels >{self.password} {self.RULES}\n"
        # nobody can be the default user, but Redis loads what scripts have written with its permissions
        acl += f"user default off resetpass ~* &* +@all\nuser admin on >{self.password} ~* &* +@all\n"
        (self.folder / "users.acl").write_text(acl)
        self.arguments = ("--appendonly", "yes" if keep else "no", "--appendfsync", "always", *arguments)

    @property
    def url(self) -> str:
        """For settings.redis.url, over TCP; the password is in `password_file`."""
        return f"redis://{self.USER}@127.0.0.1:{self.port}/0"

    @property
    def unix_url(self) -> str:
        return f"unix://{self.USER}@{self.path}?db=0"

    def start(self) -> "RedisServer":
        program = find("redis-server")
        options = {"port": self.port, "bind": "127.0.0.1", "unixsocket": self.path, "unixsocketperm": "700"}
        options |= {"dir": self.folder, "aclfile": self.folder / "users.acl", "daemonize": "no", "save": ""}
        command = [program, *(part for name, value in options.items() for part in (f"--{name}", str(value)))]
        self.launch([*command, *self.arguments], environment(program))
        self.wait()
        return self

    def answers(self) -> bool:
        try:
            return bool(self.command("PING") == b"PONG")
        except (OSError, hiredis.ReplyError):
            return False

    def command(self, *words: str | int | bytes) -> Any:
        """One command over a connection of its own. Raises `hiredis.ReplyError`."""
        reader = hiredis.Reader()
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as sock:
            sock.settimeout(10)
            sock.connect(str(self.path))
            commands: tuple[Any, ...] = (("AUTH", "admin", self.password), words)
            sock.sendall(b"".join(hiredis.pack_command(command) for command in commands))
            replies: list[Any] = []
            while len(replies) < 2:
                data = sock.recv(65536)
                if not data:
                    raise ConnectionError("Redis has closed the connection")
                reader.feed(data)
                while (reply := reader.gets()) is not False:
                    replies.append(reply)
        for reply in replies:
            if isinstance(reply, hiredis.ReplyError):
                raise reply
        return replies[1]


class PostgresServer(Server):
    """A PostgreSQL with one role and one database of its name."""

    USER = "citadel"

    def __init__(self) -> None:
        super().__init__("postgres-")
        self.folder.chmod(0o755)
        self.password = secrets.token_hex(16)
        self.password_file = self.folder / "password"
        self.password_file.write_text(self.password + "\n")
        self.data = self.folder / "data"
        self.programs = self.folder / "programs"
        self.prefix: list[str] = []
        if os.geteuid() == 0:
            self.prefix = [
                "setpriv",
                f"--reuid={NOBODY}",
                f"--regid={NOBODY}",
                "--clear-groups",
            ]  # it refuses to be root
            for path in (self.folder, self.password_file):
                os.chown(path, NOBODY, NOBODY)

    @property
    def url(self) -> str:
        """For settings.database.url; the password is in `password_file`."""
        return f"postgresql+psycopg://{self.USER}@127.0.0.1:{self.port}/{self.USER}"

    @property
    def dsn(self) -> str:
        """For psycopg, with the password; the role owns the cluster."""
        return f"host=127.0.0.1 port={self.port} user={self.USER} password={self.password} dbname={self.USER}"

    def program(self, name: str) -> str:
        """Its path, and where the other user cannot go to root's cache, that of a copy."""
        found = Path(find(name, "usr/lib/postgresql/*/bin"))
        if not self.prefix or not found.is_relative_to(CACHE):
            return str(found)
        if not self.programs.exists():
            shutil.copytree(CACHE / "usr", self.programs / "usr", symlinks=True, copy_function=link_or_copy)
        return str(self.programs / found.relative_to(CACHE))

    def environment(self, program: str) -> dict[str, str]:
        return environment(program, self.programs if self.prefix else CACHE)

    def run(self, name: str, *arguments: str) -> None:
        program = self.program(name)
        command = [*self.prefix, program, *arguments]
        done = subprocess.run(command, env=self.environment(program), cwd=self.folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{program} failed:\n{done.stdout}{done.stderr}")

    def start(self) -> "PostgresServer":
        fresh = not self.data.exists()
        if fresh:
            secret = ["--auth=scram-sha-256", f"--pwfile={self.password_file}", f"--username={self.USER}"]
            plain = ["--encoding=UTF8", "--no-locale", "--no-sync", "--no-instructions"]
            self.run("initdb", f"--pgdata={self.data}", *secret, *plain)
            with (self.data / "postgresql.conf").open("a") as conf:
                conf.write(f"listen_addresses = '127.0.0.1'\nport = {self.port}\nunix_socket_directories = ''\n")
                conf.write("fsync = off\nshared_buffers = 32MB\nmax_connections = 100\ntimezone = 'UTC'\n")
        program = self.program("postgres")
        self.launch([*self.prefix, program, "-D", str(self.data)], self.environment(program))
        self.wait()
        if fresh:
            self.execute(f"CREATE DATABASE {self.USER}", "postgres")
        return self

    def answers(self) -> bool:
        try:
            self.execute("SELECT 1", "postgres")
        except psycopg.OperationalError:
            return False
        return True

    def execute(self, statement: str, database: str = USER) -> None:
        """One statement outside of any transaction."""
        with psycopg.connect(self.dsn, dbname=database, autocommit=True, connect_timeout=5) as connection:
            connection.execute(statement)

    def end(self, number: int) -> None:
        """All of its processes: those it started end with it."""
        if self.process is not None and number == signal.SIGKILL:
            number = signal.SIGQUIT  # "immediate": no shutdown checkpoint, recovery at the next start
        super().end(number)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """One for all tests: use a prefix of your own, or `command("FLUSHALL")` first, and leave it running."""
    server = RedisServer()
    try:
        yield server.start()
    finally:
        server.remove()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """One for all tests: use a schema of your own, and leave it running."""
    server = PostgresServer()
    try:
        yield server.start()
    finally:
        server.remove()
