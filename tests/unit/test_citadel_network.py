"""Probes against real sockets: each fake service speaks as much of its protocol as a test needs."""

import contextlib
import http.server
import json
import os
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from module_utils import citadel_network as net
from module_utils.citadel_network import Listener, Port, Row, Service

Serve = Callable[[Callable[[socket.socket], None]], int]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Listen on a free port and hand each connection to a function."""
    with contextlib.ExitStack() as stack:

        def start(talk: Callable[[socket.socket], None]) -> int:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

            def accept() -> None:
                with contextlib.suppress(OSError):
                    while True:
                        connection, _ = listener.accept()
                        with connection, contextlib.suppress(OSError):
                            talk(connection)

            threading.Thread(target=accept, daemon=True).start()
            stack.callback(listener.shutdown, socket.SHUT_RDWR)
            return int(listener.getsockname()[1])

        yield start


@pytest.fixture
def web() -> Iterator[Callable[[dict[str, tuple[int, Any]]], int]]:
    """An HTTP server with these answers."""
    with contextlib.ExitStack() as stack:

        def start(answers: dict[str, tuple[int, Any]]) -> int:
            class Handler(http.server.BaseHTTPRequestHandler):
                def do_GET(self) -> None:
                    status, body = answers.get(self.path, (404, "no such page\nhere"))
                    if body == "key":
                        status, body = (200, {}) if self.headers["api-key"] == "sesame" else (401, "no key")
                    text = body if isinstance(body, str) else json.dumps(body)
                    self.send_response(status)
                    self.end_headers()
                    self.wfile.write(text.encode())

                def log_message(self, *_: Any) -> None: ...

            server = stack.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            return int(server.server_address[1])

        yield start


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate for localhost, in one file."""
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost", "-keyout", "key.pem", "-out", "cert.pem"],
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip
    both = folder / "both.pem"
    both.write_text((folder / "key.pem").read_text() + (folder / "cert.pem").read_text())
    return both


def ask(kind: str, port: int, **options: Any) -> Row:
    return net.probe(Service("it", kind, options.pop("host", "127.0.0.1"), port, **options), 1.0)


def verdict(row: Row) -> tuple[bool, str]:
    return row.passed, row.detail


# --- HTTP ---


def test_ready_services_pass(web: Callable[[dict[str, tuple[int, Any]]], int]) -> None:
    port = web(
        {
            "/-/ready": (200, "ready"),
            "/api/health": (200, {"database": "ok", "version": "11.1"}),
            "/readyz": (200, "all shards are ready"),
            "/collections": (200, {"result": {"collections": [{"name": "documents"}, {"name": "chats"}]}}),
            "/page": (204, ""),
            "/locked": (0, "key"),
        }
    )
    assert verdict(ask("prometheus", port)) == (True, "ready")
    assert verdict(ask("alertmanager", port)) == (True, "ready")
    assert verdict(ask("grafana", port)) == (True, "healthy, version 11.1")
    assert verdict(ask("qdrant", port)) == (True, "ready, 2 collections")
    assert verdict(ask("qdrant", port, collections=("chats",))) == (True, "ready, 2 collections")
    missing = ask("qdrant", port, collections=("chats", "x", "a"))
    assert verdict(missing) == (False, "ready, but without the collections a, x")
    assert verdict(ask("http", port, path="/page", status=204)) == (True, "/page answers 204")
    assert ask("http", port, path="/locked", api_key="sesame").passed
    assert verdict(ask("http", port, path="/locked")) == (False, "/locked answers 401 instead of 200: no key")


def test_the_wrong_service_is_noticed(web: Callable[[dict[str, tuple[int, Any]]], int], serve: Serve) -> None:
    sick = web({"/api/health": (200, {"database": "failing"}), "/readyz": (200, ""), "/collections": (200, {})})
    assert verdict(ask("grafana", sick)) == (False, "Grafana's database is 'failing'")
    assert verdict(ask("prometheus", sick)) == (False, "/-/ready answers 404 instead of 200: no such page here")
    assert "does not list collections" in ask("qdrant", sick).detail
    page = web({"/api/health": (200, "<html>"), "/readyz": (200, "")})
    assert "no JSON object" in ask("grafana", page).detail
    ssh = serve(lambda connection: connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n"))
    assert ask("http", ssh).detail == "does not speak HTTP (BadStatusLine): another service has this port"


def test_certificates_are_verified(serve: Serve, certificate: Path, tmp_path: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)

    def talk(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as stream:
            stream.recv(4096)
            stream.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    port = serve(talk)
    trusted = ask("http", port, host="localhost", tls="require", ca_file=str(certificate))
    assert verdict(trusted) == (True, "/ answers 200")
    assert ask("http", port, host="localhost", tls="require").detail.startswith("TLS fails: self")


# --- failures of the way there ---


def test_reasons_say_where_to_look(serve: Serve) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert verdict(ask("tcp", port)) == (False, "connection refused: the host answers, the service does not")
    silent = serve(lambda connection: time.sleep(1.5))
    row = ask("http", silent)
    assert (row.passed, row.detail[:24]) == (False, "no answer within 1 s: is")
    assert 0.9 < row.seconds < 3
    assert ask("name", 0, host="no-such-host.invalid").detail.startswith("the name does not resolve")
    assert verdict(ask("name", 0, host="127.0.0.1")) == (True, "resolves to 127.0.0.1")
    assert ask("tcp", 9, host="::ffff:0:0:0:1").passed is False
    assert net.reason(RuntimeError("odd"), 1) == "RuntimeError: odd"


def test_a_service_that_drips_is_given_up(serve: Serve) -> None:
    def drip(connection: socket.socket) -> None:
        for _ in range(40):
            connection.sendall(b"H")
            time.sleep(0.1)

    slow = Service("slow", "http", "127.0.0.1", serve(drip))
    quick = Service("quick", "tcp", "127.0.0.1", serve(lambda connection: None))
    started = time.monotonic()
    rows = net.probe_all([slow, quick], 0.3)
    assert time.monotonic() - started < 3
    assert [(row.name, row.passed) for row in rows] == [("slow", False), ("quick", True)]
    assert "no whole answer" in rows[0].detail
    assert net.probe_all([], 1) == []


def test_grpc_is_http2(serve: Serve) -> None:
    def settings(connection: socket.socket) -> None:
        assert connection.recv(100).startswith(b"PRI * HTTP/2.0")
        connection.sendall(b"\0\0\0\x04\0\0\0\0\0")

    assert verdict(ask("grpc", serve(settings))) == (True, "speaks HTTP/2")
    other = serve(lambda connection: connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"))
    assert "does not speak HTTP/2" in ask("grpc", other).detail
    closing = serve(lambda connection: None)
    assert ask("grpc", closing).passed is False


def test_grpc_with_tls(serve: Serve, certificate: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    context.set_alpn_protocols(["h2"])

    def talk(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as stream:
            stream.sendall(b"\0\0\0\x04\0\0\0\0\0")
            stream.recv(100)

    assert ask("grpc", serve(talk), host="localhost", tls="require", ca_file=str(certificate)).passed


# --- PostgreSQL ---


def postgresql(offer: bytes, answer: bytes, context: ssl.SSLContext | None = None) -> Callable[[socket.socket], None]:
    def talk(connection: socket.socket) -> None:
        stream = connection
        if offer:
            assert struct.unpack(">II", connection.recv(8)) == (8, 80877103)
            connection.sendall(offer)
        if context is not None and offer == b"S":
            stream = context.wrap_socket(connection, server_side=True)
        start = stream.recv(4096)
        assert not start or b"user\0citadel\0database\0postgres\0" in start
        stream.sendall(answer)
        stream.recv(10)
        if stream is not connection:
            stream.close()

    return talk


def message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack(">I", len(body) + 4) + body


def error(code: str, routine: str, text: str) -> bytes:
    return message(b"E", f"SFATAL\0C{code}\0M{text}\0R{routine}\0\0".encode())


SCRAM = message(b"R", struct.pack(">I", 10) + b"SCRAM-SHA-256\0\0")


def test_postgresql_answers(serve: Serve, certificate: Path) -> None:
    assert verdict(ask("postgresql", serve(postgresql(b"N", SCRAM)))) == (
        True,
        "PostgreSQL without TLS, asks for SCRAM",
    )
    assert ask("postgresql", serve(postgresql(b"", SCRAM)), tls="off").passed
    odd = message(b"R", struct.pack(">I", 99))
    assert "another kind of proof" in ask("postgresql", serve(postgresql(b"N", odd))).detail
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    port = serve(postgresql(b"S", SCRAM, context))
    assert verdict(ask("postgresql", port)) == (True, "PostgreSQL with TLSv1.3, asks for SCRAM")
    known = ask("postgresql", port, host="localhost", tls="require", ca_file=str(certificate))
    assert known.passed
    assert not ask("postgresql", port, tls="require", ca_file=str(certificate)).passed, "not the name it has"


def test_postgresql_refuses(serve: Serve) -> None:
    def said(answer: bytes, **options: Any) -> tuple[bool, str]:
        return verdict(ask("postgresql", serve(postgresql(b"N", answer)), **options))

    assert said(SCRAM, tls="require") == (False, "PostgreSQL offers no TLS, and tls is require")
    role = error("28000", "InitializeSessionUserId", "no such role")
    assert said(role) == (True, "PostgreSQL without TLS, answers: no such role")
    entry = error("28000", "ClientAuthentication", "no pg_hba.conf entry")
    assert said(entry)[1].startswith("PostgreSQL lets no client of this host in")
    starting = error("57P03", "ProcessStartupPacket", "starting up")
    assert said(starting) == (False, "PostgreSQL refuses with 57P03: starting up")
    assert "another service" in said(b"HTTP/1.1 400")[1]
    banner = serve(lambda connection: connection.sendall(b"220 mail\r\n"))
    assert "another service" in ask("postgresql", banner).detail


# --- ports ---


def test_addresses_of_proc_are_read() -> None:
    little = sys.byteorder == "little"
    assert net.address_of("0100007F" if little else "7F000001") == "127.0.0.1"
    assert net.address_of("00000000000000000000000001000000" if little else "0" * 31 + "1") == "::1"


@pytest.mark.parametrize(
    ("wanted", "held", "collide"),
    [
        ("", "127.0.0.1", True),
        ("127.0.0.1", "0.0.0.0", True),  # noqa: S104  compared, not listened on
        ("127.0.0.1", "::", True),
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "::ffff:127.0.0.1", True),
        ("127.0.0.1", "10.0.0.1", False),
        ("10.0.0.1", "::1", False),
    ],
)
def test_addresses_collide(wanted: str, held: str, collide: bool) -> None:
    assert net.collides(wanted, held) is collide


def test_a_port_of_our_own_process_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        found = [one for one in net.listeners() if one.port == port]
        assert [one.address for one in found] == ["127.0.0.1"]
        assert os.getpid() in net.holders([found[0].inode])[found[0].inode]
        rows = net.check_ports([Port("gateway", port)], systemd=lambda: "")
    assert not rows[0].passed
    assert "give gateway another port" in rows[0].detail
    assert net.check_ports([Port("gateway", port)])[0].detail == "free"
    assert net.holders([]) == {}


def fake_proc(root: Path, *, process: int, port: int, cgroup: str) -> Path:
    (root / "net").mkdir(parents=True)
    head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
    loopback = "0100007F" if sys.byteorder == "little" else "7F000001"
    line = "   0: {}:{:04X} 00000000:0000 {} 00000000:00000000 00:00000000 00000000     0        0 {} 1\n"
    listening = line.format(loopback, port, "0A", 4711)
    connected = line.format(loopback, port, "01", 4712)
    (root / "net/tcp").write_text(head + listening + connected)
    (root / f"{process}/fd").mkdir(parents=True)
    (root / f"{process}/fd/3").symlink_to("socket:[4711]")
    (root / f"{process}/fd/4").write_text("not a link")
    (root / f"{process}/cgroup").write_text(cgroup)
    (root / "999").mkdir()
    return root


def test_the_owner_of_a_port_is_named(tmp_path: Path) -> None:
    proc = fake_proc(
        tmp_path, process=77, port=11400, cgroup="12:pids:/x\n1:name=systemd:/system.slice/nginx.service\n"
    )
    assert net.listeners(proc) == [Listener("127.0.0.1", 11400, 4711)]
    ours = Port("mixtral", 11400, "127.0.0.1", ("nginx.*",))
    stranger = Port("other", 11400, "127.0.0.1", ("citadel-llm@*.service",))
    elsewhere = Port("third", 11400, "10.0.0.1")
    rows = net.check_ports([ours, stranger, elsewhere], proc)
    assert verdict(rows[0]) == (True, "held by nginx.service")
    assert verdict(rows[1]) == (False, "held by nginx.service: stop it, or give other another port")
    assert verdict(rows[2]) == (True, "free")
    assert rows[1].unit == "nginx.service"


def test_a_socket_unit_is_asked_for_what_systemd_holds(tmp_path: Path) -> None:
    proc = fake_proc(tmp_path, process=1, port=8000, cgroup="0::/init.scope\n")
    told = (
        "Id=dbus.socket\nListen=/run/dbus/system_bus_socket (Stream)\nActiveState=active\n\n"
        "Id=citadel-gateway.socket\nListen=0.0.0.0:8000 (Stream)\nListen=[::]:8000 (Stream)\nActiveState=active\n\n"
        "Id=old.socket\nListen=0.0.0.0:8000 (Stream)\nActiveState=inactive"
    )
    row = net.check_ports([Port("gateway", 8000, units=("citadel-gateway.socket",))], proc, lambda: told)[0]
    assert verdict(row) == (True, "held by citadel-gateway.socket")
    assert isinstance(net.ask_systemd(), str)


def test_units_come_from_control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unit(text: str) -> str:
        (tmp_path / "5").mkdir(exist_ok=True)
        (tmp_path / "5/cgroup").write_text(text)
        return net.unit_of(5, tmp_path)

    assert unit("0::/system.slice/system-citadel.slice/citadel-llm@phi.service/x\n") == "citadel-llm@phi.service"
    assert unit("0::/user.slice/user-0.slice/session-3.scope\n") == "session-3.scope"
    assert unit("0::/\n") == ""
    assert net.unit_of(6, tmp_path) == ""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert net.ask_systemd() == ""


# --- the connection, the table ---


def test_the_connection_is_found_above_sudo(tmp_path: Path) -> None:
    for process, parent, environment in (
        (30, 20, b"A=b\0"),
        (20, 10, b""),
        (10, 1, b"SSH_CONNECTION=192.0.2.1 50000 192.0.2.9 22\0X=y\0"),
        (40, 1, b""),
    ):
        (tmp_path / str(process)).mkdir()
        (tmp_path / f"{process}/environ").write_bytes(environment)
        (tmp_path / f"{process}/status").write_text(f"Name:\tx\nPPid:\t{parent}\n")
    assert net.connection(30, tmp_path) == {"client": "192.0.2.1", "server": "192.0.2.9"}
    assert net.connection(40, tmp_path) == {"client": "", "server": ""}
    assert net.connection(50, tmp_path) == {"client": "", "server": ""}
    assert set(net.connection()) == {"client", "server"}


def test_networks_hold_addresses() -> None:
    assert net.within("10.1.2.3", ["192.0.2.0/24", "10.0.0.1/8"])
    assert net.within("fe80::1%eth0", ["fe80::/10"])
    assert not net.within("10.1.2.3", ["10.2.0.0/16", "::/0"])
    assert not net.within("10.1.2.3", [])


def test_the_table_has_a_line_a_check() -> None:
    rows = [
        Row("sql", "postgresql", "192.0.2.1:5432", False, 5.0, "no answer"),
        Row("gateway", "port", "*:8000", True, 0.0012, "free"),
    ]
    assert net.table(rows) == [
        "result  name     check       target          took     what it said",
        "FAILED  sql      postgresql  192.0.2.1:5432  5.000 s  no answer",
        "passed  gateway  port        *:8000          0.001 s  free",
        "1 passed, 1 failed",
    ]
    assert net.table([])[-1] == "0 passed, 0 failed"
    assert (Service("a", "tcp", "::1", 5).target, Port("b", 6, "::1").target) == ("[::1]:5", "[::1]:6")
    assert (Service("a", "name", "h").target, Port("b", 6).target) == ("h", "*:6")


def test_the_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], serve: Serve) -> None:
    monkeypatch.setitem(sys.modules, "ansible.module_utils.citadel_network", net)
    from ansible.module_utils.testing import patch_module_args
    from modules import citadel_network_probe as module

    def play(**options: Any) -> dict[str, Any]:
        with patch_module_args(options), pytest.raises(SystemExit):
            module.main()
        answer: dict[str, Any] = json.loads(capsys.readouterr().out)
        return answer

    port = serve(lambda connection: None)
    monkeypatch.setattr(module, "connection", lambda: {"client": "192.0.2.1", "server": "192.0.2.9"})
    answer = play(
        services=[{"name": "up", "kind": "tcp", "host": "127.0.0.1", "port": port, "api_key": "hidden"}],
        ports=[{"name": "mine", "port": port, "units": ["x.service"]}],
        timeout=1,
        networks=["192.0.2.0/24"],
    )
    assert (answer["changed"], answer["failed_services"], answer["failed_ports"]) == (False, [], ["mine"])
    assert answer["client_known"] is True
    assert answer["table"][-1] == "1 passed, 1 failed"
    assert "hidden" not in json.dumps(answer)
    assert play(networks=["10.0.0.0/8"])["client_known"] is False
    assert "networks: " in play(networks=["10.0.0.0/99"])["msg"]
