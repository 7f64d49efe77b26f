"""The workers' connection to Redis and what limits do when Redis is away, slow, full or new."""

import asyncio
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import hiredis
import pytest
import uvloop
from citadel_gateway.books import Books
from citadel_gateway.core.limits import Denied, Limiter, Reservation
from citadel_gateway.core.limitstore import MemoryStore
from citadel_gateway.redis_address import RedisAddress
from citadel_gateway.settings import ConfigError, Redis, Tier
from citadel_gateway.worker.redis import RedisStore, limit_store

from gateway.tests.client import until
from gateway.tests.servers import RedisServer
from gateway.tests.test_limits import Someone, settings_with

serial = iter(range(10_000))


def redis_settings(server: RedisServer, **more: Any) -> Redis:
    given: dict[str, Any] = {"url": server.unix_url, "password_file": str(server.password_file)}
    return Redis(**(given | {"prefix": f"citadel-net{next(serial)}", "timeout": 0.25} | more))


class Worker:
    """A limiter with its clockwork, as a worker has it."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self.took: list[float] = []
        self.store = RedisStore(redis, time.monotonic, self.took.append)
        self.limiter = Limiter(
            self.store,
            f"w{next(serial)}",
            time.monotonic,
            time.time,
            on_failure=redis.on_failure,
            patience=redis.timeout,
        )
        self.ticking: asyncio.Task[None] | None = None

    async def start(self, wait: bool = True) -> "Worker":
        self.store.start(asyncio.get_running_loop())
        self.ticking = asyncio.create_task(self.tick())
        if wait:
            await until(lambda: self.store.up)
        return self

    async def tick(self) -> None:
        while True:
            self.limiter.tick(time.monotonic())
            await asyncio.sleep(0.02)

    async def reserve(self, who: Someone, tokens: int = 0) -> Reservation | Denied:
        future: asyncio.Future[Reservation | Denied] = asyncio.get_running_loop().create_future()
        found = self.limiter.reserve(who, tokens, time.monotonic(), future.set_result)
        return found if found is not None else await future

    async def use(self, who: Someone, tokens: int = 0, count: int = 1) -> None:
        """Requests that are admitted and use all that they have reserved."""
        for _ in range(count):
            found = await self.reserve(who, tokens)
            assert isinstance(found, Reservation)
            self.limiter.settle(found, tokens, time.monotonic())

    async def stop(self) -> None:
        if self.ticking is not None:
            self.ticking.cancel()
            await asyncio.gather(self.ticking, return_exceptions=True)
            self.ticking = None
        self.limiter.close()
        await asyncio.sleep(0)


Make = Callable[..., Awaitable[Worker]]


@pytest.fixture
async def worker() -> AsyncIterator[Make]:
    made: list[Worker] = []

    async def make(redis: Redis, wait: bool = True) -> Worker:
        made.append(Worker(redis))
        return await made[-1].start(wait)

    yield make
    for one in made:
        await one.stop()


@pytest.fixture
def books() -> Iterator[Callable[[Redis], Books]]:
    made: list[Books] = []

    def make(redis: Redis) -> Books:
        made.append(Books(settings_with(redis)))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def own_server() -> Iterator[Callable[..., RedisServer]]:
    """Servers that a test may ill-treat."""
    made: list[RedisServer] = []

    def make(*arguments: str, **more: Any) -> RedisServer:
        made.append(RedisServer(*arguments, **more))
        return made[-1].start()

    yield make
    for one in made:
        one.remove()


TIER = Tier("t", requests_per_minute=10_000, tokens_per_minute=1_000_000, tokens_per_day=10_000_000, concurrency=1000)


@pytest.mark.parametrize("over", ["unix", "tcp"])
async def test_workers_count_together(worker: Make, redis_server: RedisServer, books: Any, over: str) -> None:
    redis = redis_settings(redis_server, url=redis_server.unix_url if over == "unix" else redis_server.url)
    tier = Tier("t", requests_per_minute=30, concurrency=20)
    workers = [await worker(redis) for _ in range(3)]
    people = [Someone("a", tier) for _ in workers]
    results = await asyncio.gather(*(workers[index % 3].reserve(people[index % 3]) for index in range(30)))
    admitted = [one for one in results if isinstance(one, Reservation)]
    assert len(admitted) == 20
    assert {one.kind for one in results if isinstance(one, Denied)} == {"concurrency"}
    assert books(redis).usage("a")["concurrency"] == 20
    assert all(0 <= seconds < 5 for one in workers for seconds in one.took)


async def test_calls_are_written_together(worker: Make, redis_server: RedisServer) -> None:
    one = await worker(redis_settings(redis_server))
    assert one.store.link is not None
    transport = one.store.link.transport
    assert transport is not None
    writes: list[bytes] = []
    plain = transport.write

    def write(data: Any) -> None:
        writes.append(data)
        plain(data)

    one.store.link.transport = type("Spy", (), {"write": staticmethod(write), "close": transport.close})()
    people = [Someone(f"u{number}", TIER) for number in range(50)]
    results = await asyncio.gather(*(one.reserve(who, 10) for who in people))
    assert all(isinstance(found, Reservation) for found in results)
    assert len(writes) < 10


async def test_a_redis_that_forgot_the_script_is_given_it_again(worker: Make, own_server: Any) -> None:
    server = own_server()
    one = await worker(redis_settings(server))
    server.command("SCRIPT", "FLUSH")
    someone = Someone("a", TIER)
    assert isinstance(await one.reserve(someone, 10), Reservation)
    assert one.store.up


async def test_what_was_used_while_redis_was_away_is_added_once(worker: Make, own_server: Any, books: Any) -> None:
    server = own_server(keep=True)
    redis = redis_settings(server)
    one = await worker(redis)
    someone = Someone("a", TIER)
    await one.use(someone, 100, 7)
    server.kill()
    await until(lambda: not one.store.up)
    began = time.monotonic()
    await one.use(someone, 100, 20)
    assert time.monotonic() - began < 5
    running = await one.reserve(someone, 500)
    server.start()
    await until(lambda: one.store.up, 10)
    view = books(redis)
    await until(lambda: view.usage("a")["tokens_per_day"] == 2700 and view.usage("a")["concurrency"] == 1, 10)
    assert isinstance(running, Reservation)
    one.limiter.settle(running, 300, time.monotonic())
    await until(lambda: view.usage("a")["tokens_per_minute"] == 3000)
    assert view.usage("a") == {
        "requests_per_minute": 28,
        "tokens_per_minute": 3000,
        "concurrency": 0,
        "tokens_per_day": 3000,
        "tokens_per_month": 3000,
    }


@pytest.mark.alone
async def test_a_frozen_redis_delays_by_its_timeout_only(worker: Make, own_server: Any, books: Any) -> None:
    server = own_server()
    redis = redis_settings(server)
    one = await worker(redis)
    someone = Someone("a", TIER)
    await one.use(someone, 100, 3)
    server.freeze()
    began = time.monotonic()
    await asyncio.gather(*(one.use(someone, 100, 5) for _ in range(5)))
    assert time.monotonic() - began < 3  # a machine may be busy; alone it is 0.3
    assert not one.store.up
    began = time.monotonic()
    await one.use(someone, 100, 10)
    assert time.monotonic() - began < 0.2  # nobody waits for it any more
    server.thaw()  # now it also does all that was sent to it before
    await until(lambda: one.store.up, 10)
    view = books(redis)
    await until(lambda: view.usage("a")["tokens_per_day"] == 3800, 10)
    await asyncio.sleep(0.3)
    assert view.usage("a")["tokens_per_day"] == 3800
    assert view.usage("a")["requests_per_minute"] == 38


async def test_calls_under_way_when_it_breaks_are_counted_once(worker: Make, own_server: Any, books: Any) -> None:
    """The connection is cut again and again, at any moment, under traffic."""
    server = own_server()
    redis = redis_settings(server, timeout=0.5)
    workers = [await worker(redis) for _ in range(2)]
    people = [Someone("a", TIER) for _ in workers]
    stop = asyncio.Event()
    counts = [0, 0]

    async def traffic(index: int) -> None:
        while not stop.is_set():
            await workers[index].use(people[index], 10)
            counts[index] += 1
            await asyncio.sleep(0.001)

    async def cuts() -> None:
        for _ in range(12):
            await asyncio.sleep(0.08)
            await asyncio.to_thread(server.command, "CLIENT", "KILL", "TYPE", "normal")

    tasks = [asyncio.create_task(traffic(index)) for index in (0, 1)]
    await cuts()
    stop.set()
    await asyncio.gather(*tasks)
    view = books(redis)
    await until(lambda: view.usage("a")["tokens_per_day"] == 10 * sum(counts), 15)
    await asyncio.sleep(0.2)
    assert view.usage("a")["tokens_per_day"] == 10 * sum(counts)
    assert view.usage("a")["requests_per_minute"] == sum(counts)


async def test_a_redis_without_memory_is_away_until_it_has_some(worker: Make, own_server: Any, books: Any) -> None:
    server = own_server("--maxmemory-policy", "noeviction")
    redis = redis_settings(server)
    one = await worker(redis)
    someone = Someone("a", TIER)
    await one.use(someone, 100, 3)
    server.command("CONFIG", "SET", "maxmemory", 1)
    await one.use(someone, 100, 5)
    await until(lambda: not one.store.up)
    await one.use(someone, 100, 5)
    server.command("CONFIG", "SET", "maxmemory", 0)
    await until(lambda: one.store.up, 10)
    view = books(redis)
    await until(lambda: view.usage("a")["tokens_per_day"] == 1300, 10)
    assert view.usage("a")["requests_per_minute"] == 13


async def test_closed_refuses_while_redis_is_away(worker: Make, own_server: Any) -> None:
    server = own_server()
    one = await worker(redis_settings(server, on_failure="closed"))
    someone, free = Someone("a", TIER), Someone("b", Tier("free"))
    await one.use(someone, 10)
    server.kill()
    await until(lambda: not one.store.up)
    await asyncio.sleep(0.3)
    denied = await one.reserve(someone, 10)
    assert isinstance(denied, Denied)
    assert denied.kind == "limits_unavailable"
    assert isinstance(await one.reserve(free, 10), Reservation)
    server.start()
    await until(lambda: one.store.up, 10)
    assert isinstance(await one.reserve(someone, 10), Reservation)


async def test_a_redis_that_lost_everything_is_told_what_is_held(worker: Make, own_server: Any, books: Any) -> None:
    server = own_server()  # it keeps nothing
    redis = redis_settings(server)
    one = await worker(redis)
    someone = Someone("a", TIER)
    running = [await one.reserve(someone, 100) for _ in range(4)]
    server.kill()
    await until(lambda: not one.store.up)
    server.start()
    await until(lambda: one.store.up, 10)
    view = books(redis)
    await until(lambda: view.usage("a")["concurrency"] == 4)
    for reservation in running:
        assert isinstance(reservation, Reservation)
        one.limiter.settle(reservation, 50, time.monotonic())
    await until(lambda: view.usage("a")["tokens_per_minute"] == 200)


async def test_a_request_waits_for_the_first_connection(worker: Make, own_server: Any) -> None:
    server = own_server()
    one = await worker(redis_settings(server, on_failure="closed", timeout=5.0), wait=False)
    assert not one.store.up
    assert isinstance(await one.reserve(Someone("a", TIER), 10), Reservation)


async def test_a_short_break_is_noticed_by_nobody(worker: Make, own_server: Any) -> None:
    server = own_server()
    one = await worker(redis_settings(server, on_failure="closed", timeout=5.0))
    server.command("CLIENT", "KILL", "TYPE", "normal")
    await until(lambda: not one.store.up)
    assert isinstance(await one.reserve(Someone("a", TIER), 10), Reservation)


async def test_whoever_goes_while_redis_is_asked_leaves_nothing(
    worker: Make, redis_server: RedisServer, books: Any
) -> None:
    redis = redis_settings(redis_server)
    one = await worker(redis)
    someone = Someone("a", TIER)
    called: list[Any] = []
    assert one.limiter.reserve(someone, 10, time.monotonic(), called.append) is None
    one.limiter.cancel(called.append)
    view = books(redis)
    await until(lambda: someone.account.empty())
    await until(lambda: view.usage("a")["concurrency"] == 0)
    assert called == []
    assert view.usage("a")["requests_per_minute"] == 0


@pytest.mark.parametrize("wrong", ["password", "user", "database"])
async def test_a_redis_that_lets_us_not_in_is_away(
    worker: Make, redis_server: RedisServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, wrong: str
) -> None:
    (tmp_path / "password").write_text("wrong\n")
    given = {
        "password": {"password_file": str(tmp_path / "password")},
        "user": {"url": redis_server.url.replace("gateway@", "stranger@")},
        "database": {"url": redis_server.url[:-1] + "99"},
    }[wrong]
    one = await worker(redis_settings(redis_server, **given), wait=False)
    await until(lambda: one.store.failures > 1)
    assert not one.store.up
    said = [record.message for record in caplog.records if "Redis is away" in record.message]
    assert len(said) == 1  # not once for each attempt
    assert redis_server.password not in caplog.text


async def test_a_worker_that_stood_still_does_not_blame_redis(worker: Make, redis_server: RedisServer) -> None:
    one = await worker(redis_settings(redis_server))
    someone = Someone("a", TIER)
    assert one.limiter.reserve(someone, 10, time.monotonic(), lambda result: None) is None
    await asyncio.sleep(0)  # it is written
    time.sleep(0.4)  # noqa: ASYNC251  # the loop stands still: that is what this is about
    link = one.store.link
    await until(lambda: someone.account.open_slots == 1)
    await asyncio.sleep(0.05)
    assert one.store.up
    assert one.store.link is link


async def test_nothing_that_speaks_another_language_is_taken_for_redis(worker: Make, tmp_path: Path) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    path = tmp_path / "s"
    server = await asyncio.start_unix_server(answer, str(path))
    one = await worker(Redis(f"unix://{path}"), wait=False)
    await until(lambda: one.store.failures > 1)
    assert "no Redis" in one.store.reported or "closed" in one.store.reported
    await one.stop()
    server.close()


def test_tls_is_checked_with_the_ca_of_the_settings(tmp_path: Path) -> None:
    address = RedisAddress(Redis("rediss://gateway@redis.example:6380/2", ca_file=str(make_ca(tmp_path))))
    assert (address.host, address.port, address.user, address.database) == ("redis.example", 6380, "gateway", 2)
    context = address.context()
    assert context is not None
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert len(context.get_ca_certs()) == 1


async def test_tls_is_spoken(worker: Make, own_server: Any, books: Any, tmp_path: Path) -> None:
    cert = make_ca(tmp_path)
    files = ("--tls-cert-file", str(cert), "--tls-key-file", str(tmp_path / "key.pem"), "--tls-auth-clients", "no")
    try:
        server = own_server("--tls-port", "0", *files)
    except RuntimeError:
        pytest.skip("this Redis was built without TLS")
    server.command("CONFIG", "SET", "port", 0)
    server.command("CONFIG", "SET", "tls-port", server.port)
    redis = redis_settings(server, url=server.url.replace("redis://", "rediss://"), ca_file=str(cert))
    one = await worker(redis)
    await one.use(Someone("a", TIER), 10)
    view = books(redis)
    await until(lambda: view.usage("a")["tokens_per_day"] == 10)
    stranger = await worker(redis_settings(server, url=redis.url), wait=False)
    await until(lambda: stranger.store.failures > 1)
    assert "certificate" in stranger.store.reported


def make_ca(folder: Path) -> Path:
    """A certificate for 127.0.0.1 that vouches for itself."""
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ]
    command += ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    command += ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "cert.pem"


@pytest.mark.parametrize(
    "url", ["http://host", "redis://", "redis://host:port", "redis://host/nine", "unix://", "redis://u:secret@host"]
)
def test_a_wrong_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ConfigError) as refused:
        RedisAddress(Redis(url))
    assert "secret" not in str(refused.value)


async def test_books_are_read_and_written_from_any_thread(own_server: Any, books: Any) -> None:
    server = own_server(keep=True)
    view = books(redis_settings(server, url=server.url))
    told = await asyncio.gather(
        *(asyncio.to_thread(view.settle_lost, "a", 10, time.time(), f"id-{number % 10}") for number in range(30))
    )
    assert sum(told) == 10
    assert view.usage("a")["tokens_per_month"] == 100
    server.kill()
    with pytest.raises(OSError, match=r"closed|refused|reset|pipe"):
        view.usage("a")
    server.start()
    assert view.usage("a")["tokens_per_month"] == 100
    view.close()


def test_books_say_when_redis_refuses_them(redis_server: RedisServer, books: Any, tmp_path: Path) -> None:
    (tmp_path / "password").write_text("wrong\n")
    with pytest.raises(hiredis.ReplyError, match="WRONGPASS"):
        books(redis_settings(redis_server, password_file=str(tmp_path / "password"))).usage("a")


async def test_without_redis_there_is_memory() -> None:
    settings = settings_with(Redis())
    assert isinstance(limit_store(settings, time.monotonic, time.time, lambda seconds: None), MemoryStore)
    books = Books(settings)
    assert books.usage("a") == {}
    assert not books.settle_lost("a", 1, 0.0, "id")
    books.close()


@pytest.mark.parametrize("over", ["unix", "tcp"])
def test_it_runs_on_the_loop_of_the_workers(redis_server: RedisServer, over: str) -> None:
    async def run() -> None:
        redis = redis_settings(redis_server, url=redis_server.unix_url if over == "unix" else redis_server.url)
        one = await Worker(redis).start()
        someone = Someone("a", TIER)
        await one.use(someone, 100, 3)
        view = Books(settings_with(redis))
        await until(lambda: view.usage("a")["tokens_per_minute"] == 300)
        view.close()
        await until(lambda: one.limiter.remaining(someone)["tokens_per_day"] == TIER.tokens_per_day - 300)
        await one.stop()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


async def test_the_store_of_the_settings_connects(redis_server: RedisServer) -> None:
    settings = settings_with(redis_settings(redis_server))
    store = limit_store(settings, time.monotonic, time.time, lambda seconds: None)
    await until(lambda: store.up)
    store.close()
