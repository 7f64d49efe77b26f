"""What a host can reach, asked in the language of each service, and who holds the ports that we want.

A port that accepts connections says little: a proxy in between, a starting database and the wrong service do too.
So every probe speaks until the service has said that it is the one expected, and says in one line what it heard.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import http.client
import ipaddress
import json
import os
import re
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

MOST = 1 << 20  # bytes of an answer that are read


class ProbeError(Exception):
    """The service did not answer as it should; the message says how it answered."""


@dataclasses.dataclass(frozen=True)
class Service:
    """Something on another host that must answer."""

    name: str
    kind: str
    host: str
    port: int = 0
    tls: str = "prefer"
    ca_file: str = ""
    path: str = "/"
    status: int = 200
    api_key: str = ""
    user: str = "citadel"
    database: str = "postgres"
    collections: tuple[str, ...] = ()

    @property
    def target(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}" if self.port else host


@dataclasses.dataclass(frozen=True)
class Port:
    """A port of this host that must be free, or held by a unit of ours."""

    name: str
    port: int
    address: str = ""
    units: tuple[str, ...] = ()

    @property
    def target(self) -> str:
        host = f"[{self.address}]" if ":" in self.address else self.address or "*"
        return f"{host}:{self.port}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    check: str
    target: str
    passed: bool
    seconds: float
    detail: str
    unit: str = ""


@dataclasses.dataclass(frozen=True)
class Listener:
    address: str
    port: int
    inode: int


# --- services -------------------------------------------------------------------------------------------------------


def context_for(service: Service) -> ssl.SSLContext:
    """Certificates are verified, but for PostgreSQL without a CA file: there TLS alone promises no identity either."""
    context = ssl.create_default_context(cafile=service.ca_file or None)
    if service.kind == "postgresql" and not service.ca_file:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def get(service: Service, path: str, timeout: float) -> tuple[int, bytes]:
    """One GET request."""
    connection: http.client.HTTPConnection
    if service.tls == "require":
        context = context_for(service)
        connection = http.client.HTTPSConnection(service.host, service.port, timeout=timeout, context=context)
    else:
        connection = http.client.HTTPConnection(service.host, service.port, timeout=timeout)
    with contextlib.closing(connection):
        headers = {"Accept": "*/*", "Connection": "close"}
        if service.api_key:
            headers["api-key"] = service.api_key
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read(MOST)


def expect(service: Service, path: str, timeout: float, status: int = 200) -> bytes:
    found, body = get(service, path, timeout)
    if found != status:
        said = body[:80].decode("utf-8", "replace").strip().replace("\n", " ")
        raise ProbeError(f"{path} answers {found} instead of {status}" + (f": {said}" if said else ""))
    return body


def as_object(body: bytes, path: str) -> dict[str, object]:
    try:
        value = json.loads(body)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ProbeError(f"{path} answers something that is no JSON object: another service has this port")
    return value


def probe_http(service: Service, timeout: float) -> str:
    expect(service, service.path, timeout, service.status)
    return f"{service.path} answers {service.status}"


def probe_ready(service: Service, timeout: float) -> str:
    """Prometheus and Alertmanager have the same address for it."""
    expect(service, "/-/ready", timeout)
    return "ready"


def probe_grafana(service: Service, timeout: float) -> str:
    health = as_object(expect(service, "/api/health", timeout), "/api/health")
    if health.get("database") != "ok":
        raise ProbeError(f"Grafana's database is {health.get('database')!r}")
    return f"healthy, version {health.get('version', 'not told')}"


def probe_qdrant(service: Service, timeout: float) -> str:
    expect(service, "/readyz", timeout)
    answer = as_object(expect(service, "/collections", timeout), "/collections")
    result = answer.get("result")
    listed = result.get("collections") if isinstance(result, dict) else None
    if not isinstance(listed, list):
        raise ProbeError("/collections does not list collections: another service has this port")
    names = {str(item.get("name")) for item in listed if isinstance(item, dict)}
    missing = sorted(set(service.collections) - names)
    if missing:
        raise ProbeError(f"ready, but without the collections {', '.join(missing)}")
    return f"ready, {len(names)} collections"


def probe_tcp(service: Service, timeout: float) -> str:
    with socket.create_connection((service.host, service.port), timeout=timeout):
        return "accepts connections"


def probe_grpc(service: Service, timeout: float) -> str:
    """gRPC is HTTP/2: a server answers the preface with its settings."""
    settings = struct.pack(">I", 0)[1:] + b"\x04\x00" + struct.pack(">I", 0)
    with contextlib.ExitStack() as stack:
        plain = stack.enter_context(socket.create_connection((service.host, service.port), timeout=timeout))
        stream: socket.socket = plain
        if service.tls == "require":
            context = context_for(service)
            context.set_alpn_protocols(["h2"])
            stream = stack.enter_context(context.wrap_socket(plain, server_hostname=service.host))
        stream.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings)
        header = exactly(stream, 9)
    if header[3] != 4:
        raise ProbeError("does not speak HTTP/2: another service has this port")
    return "speaks HTTP/2"


def probe_name(service: Service, timeout: float) -> str:
    """``timeout`` is kept by whoever runs the probes: the resolver has its own."""
    found = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(service.host, None, type=socket.SOCK_STREAM)})
    return f"resolves to {', '.join(found)}"


def exactly(stream: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = stream.recv(count - len(data))
        if not piece:
            raise ProbeError(f"ends the connection after {len(data)} bytes")
        data += piece
    return data


AUTHENTICATION = {0: "no password", 3: "a password", 5: "md5", 7: "GSSAPI", 9: "SSPI", 10: "SCRAM"}


def probe_postgresql(service: Service, timeout: float) -> str:
    """The first half of a connection: TLS if there is any, the start-up message, and what the server then asks for."""
    with contextlib.ExitStack() as stack:
        stream: socket.socket = stack.enter_context(
            socket.create_connection((service.host, service.port), timeout=timeout)
        )
        encryption = "without TLS"
        if service.tls != "off":
            stream.sendall(struct.pack(">II", 8, 80877103))
            offer = exactly(stream, 1)
            if offer == b"S":
                wrapped = context_for(service).wrap_socket(stream, server_hostname=service.host)
                stream = stack.enter_context(wrapped)
                encryption = f"with {wrapped.version()}"
            elif offer != b"N":
                raise ProbeError("does not speak PostgreSQL's protocol: another service has this port")
            elif service.tls == "require":
                raise ProbeError("PostgreSQL offers no TLS, and tls is require")
        words = ["user", service.user, "database", service.database, "application_name", "citadel-network-checks"]
        body = struct.pack(">I", 196608) + b"".join(word.encode() + b"\0" for word in words) + b"\0"
        stream.sendall(struct.pack(">I", len(body) + 4) + body)
        kind = exactly(stream, 1)
        length = struct.unpack(">I", exactly(stream, 4))[0]
        if kind not in b"RE" or not 8 <= length <= MOST:
            raise ProbeError("does not speak PostgreSQL's protocol: another service has this port")
        message = exactly(stream, length - 4)
        with contextlib.suppress(OSError):
            stream.sendall(b"X" + struct.pack(">I", 4))
    if kind == b"R":
        asked = AUTHENTICATION.get(struct.unpack(">I", message[:4])[0], "another kind of proof")
        return f"PostgreSQL {encryption}, asks for {asked}"
    return refusal(message, encryption)


def refusal(message: bytes, encryption: str) -> str:
    """What an error of PostgreSQL means here. It passes if only our made-up user or database is wrong."""
    fields = {part[:1].decode(): part[1:].decode("utf-8", "replace") for part in message.split(b"\0") if part}
    code, said = fields.get("C", ""), fields.get("M", "no reason given")
    if fields.get("R") == "ClientAuthentication":
        raise ProbeError(f"PostgreSQL lets no client of this host in (pg_hba.conf): {said}")
    if code.startswith(("28", "3D")):
        return f"PostgreSQL {encryption}, answers: {said}"
    raise ProbeError(f"PostgreSQL refuses with {code}: {said}")


PROBES: Mapping[str, Callable[[Service, float], str]] = {
    "alertmanager": probe_ready,
    "grafana": probe_grafana,
    "grpc": probe_grpc,
    "http": probe_http,
    "name": probe_name,
    "postgresql": probe_postgresql,
    "prometheus": probe_ready,
    "qdrant": probe_qdrant,
    "tcp": probe_tcp,
}


def reason(error: Exception, timeout: float) -> str:
    """A failure in words that say where to look."""
    if isinstance(error, ProbeError):
        return str(error)
    if isinstance(error, TimeoutError):
        return f"no answer within {timeout:g} s: is the host up, does a firewall drop this?"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused: the host answers, the service does not"
    if isinstance(error, socket.gaierror):
        return f"the name does not resolve: {error.strerror}"
    if isinstance(error, ssl.SSLError):
        return f"TLS fails: {getattr(error, 'verify_message', '') or error.reason or error}"
    if isinstance(error, http.client.HTTPException):
        return f"does not speak HTTP ({type(error).__name__}): another service has this port"
    return f"{error.strerror or error}" if isinstance(error, OSError) else f"{type(error).__name__}: {error}"


def probe(service: Service, timeout: float) -> Row:
    """Ask one service."""
    started = time.monotonic()
    try:
        passed, detail = True, PROBES[service.kind](service, timeout)
    except Exception as error:  # whatever a stranger's answer makes of us is a line of the table
        passed, detail = False, reason(error, timeout)
    return Row(service.name, service.kind, service.target, passed, round(time.monotonic() - started, 3), detail)


def probe_all(services: Sequence[Service], timeout: float) -> list[Row]:
    """Ask all at once; a service that drips its answer is given up like one that says nothing."""
    rows: dict[int, Row] = {}

    def ask(index: int) -> None:
        rows[index] = probe(services[index], timeout)

    threads = [threading.Thread(target=ask, args=(index,), daemon=True) for index in range(len(services))]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, started + 2 * timeout + 1 - time.monotonic()))
    elapsed = round(time.monotonic() - started, 3)
    return [
        rows.get(index)
        or Row(service.name, service.kind, service.target, False, elapsed, f"no whole answer within {elapsed:g} s")
        for index, service in enumerate(services)
    ]


# --- ports of this host ---------------------------------------------------------------------------------------------


def address_of(text: str) -> str:
    """An address as /proc/net/tcp and tcp6 write it: words of the machine's byte order."""
    words = [text[start : start + 8] for start in range(0, len(text), 8)]
    packed = b"".join(struct.pack("=I", int(word, 16)) for word in words)
    return str(ipaddress.ip_address(packed))


def listeners(proc: Path = Path("/proc")) -> list[Listener]:
    found = []
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):
            for line in (proc / "net" / name).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A":
                    address, port = fields[1].split(":")
                    found.append(Listener(address_of(address), int(port, 16), int(fields[9])))
    return found


def collides(wanted: str, held: str) -> bool:
    """Whether two addresses cannot both have the port. ``::`` takes IPv4 along, as Linux does unless told not to."""
    every = {"", "0.0.0.0", "::"}  # noqa: S104  compared, not listened on
    return wanted in every or held in every or wanted == held or held == f"::ffff:{wanted}"


def holders(inodes: Iterable[int], proc: Path = Path("/proc")) -> dict[int, list[int]]:
    """Which processes have these sockets open."""
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    found: dict[int, list[int]] = {inode: [] for inode in wanted.values()}
    for process in proc.glob("[0-9]*") if wanted else ():
        try:
            for descriptor in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    inode = wanted.get(str(descriptor.readlink()))
                    if inode is not None:
                        found[inode].append(int(process.name))
        except OSError:
            continue  # it ended meanwhile, or is not ours to look at
    return {inode: sorted(set(processes)) for inode, processes in found.items()}


def unit_of(process: int, proc: Path = Path("/proc")) -> str:
    """The systemd unit of a process, from its control group."""
    try:
        lines = (proc / str(process) / "cgroup").read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if controllers == "name=systemd" or (number == "0" and not controllers):
            parts = [part for part in path.split("/") if part.endswith((".service", ".scope"))]
            if parts:
                return parts[-1]
    return ""


def socket_units(text: str) -> dict[int, str]:
    """Port -> active socket unit, from ``systemctl show '*.socket' --property=Id,Listen,ActiveState``."""
    found = {}
    for block in text.split("\n\n"):
        values = re.findall(r"^(Id|Listen|ActiveState)=(.*)$", block, re.MULTILINE)
        named = dict(values)
        if named.get("ActiveState") == "active":
            for key, value in values:
                match = re.search(r":(\d+) \(Stream\)", value) if key == "Listen" else None
                if match:
                    found[int(match.group(1))] = named.get("Id", "")
    return found


def ask_systemd() -> str:
    argv = ["systemctl", "show", "*.socket", "--property=Id,Listen,ActiveState"]
    try:
        return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def check_ports(
    ports: Sequence[Port], proc: Path = Path("/proc"), systemd: Callable[[], str] = ask_systemd
) -> list[Row]:
    """Each port is free, or held by a unit that may hold it."""
    started = time.monotonic()
    everyone = listeners(proc)
    relevant = {
        port: [one for one in everyone if one.port == port.port and collides(port.address, one.address)]
        for port in ports
    }
    owners = holders({one.inode for found in relevant.values() for one in found}, proc)
    sockets = socket_units(systemd()) if any(1 in processes for processes in owners.values()) else {}
    rows = []
    for port, found in relevant.items():
        processes = sorted({process for one in found for process in owners[one.inode]})
        units = sorted({sockets.get(port.port) or unit_of(process, proc) or f"pid {process}" for process in processes})
        strangers = [unit for unit in units if not any(fnmatch.fnmatchcase(unit, mine) for mine in port.units)]
        if not found:
            passed, detail = True, "free"
        elif strangers or not units:
            passed = False
            detail = (
                f"held by {', '.join(strangers) or 'an unknown process'}: stop it, or give {port.name} another port"
            )
        else:
            passed, detail = True, f"held by {', '.join(units)}"
        took = round(time.monotonic() - started, 3)
        rows.append(Row(port.name, "port", port.target, passed, took, detail, ", ".join(units)))
    return rows


# --- around it ------------------------------------------------------------------------------------------------------


def connection(start: int | None = None, proc: Path = Path("/proc")) -> dict[str, str]:
    """Addresses of the SSH connection that this process runs under. sudo hides the variable: parents are asked too."""
    process = os.getpid() if start is None else start
    while process > 1:
        try:
            environment = (proc / str(process) / "environ").read_bytes().split(b"\0")
            status = (proc / str(process) / "status").read_text()
        except OSError:
            break
        for entry in environment:
            if entry.startswith(b"SSH_CONNECTION="):
                client, _, server, _ = entry.split(b"=", 1)[1].decode().split()
                return {"client": client, "server": server}
        parent = re.search(r"^PPid:\s+(\d+)", status, re.MULTILINE)
        process = int(parent.group(1)) if parent else 0
    return {"client": "", "server": ""}


def within(address: str, networks: Iterable[str]) -> bool:
    """Whether one of the networks holds the address."""
    one = ipaddress.ip_address(address.partition("%")[0])
    every = [ipaddress.ip_network(network, strict=False) for network in networks]
    return any(one in network for network in every)


def table(rows: Sequence[Row]) -> list[str]:
    """The rows as aligned lines under a head, and a sum."""
    head = ("result", "name", "check", "target", "took", "what it said")
    cells = [
        ("passed" if row.passed else "FAILED", row.name, row.check, row.target, f"{row.seconds:.3f} s", row.detail)
        for row in rows
    ]
    widths = [max(len(line[column]) for line in [head, *cells]) for column in range(5)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[5]])
        for line in [head, *cells]
    ]
    failed = sum(not row.passed for row in rows)
    return [*lines, f"{len(rows) - failed} passed, {failed} failed"]
