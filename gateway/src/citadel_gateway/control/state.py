"""What the control process knows: the files, the people and run-time changes of the database, the drain states, and the
snapshot made of them.

Other parts use `database`; `subscribe` tells them of each new snapshot, and `every` does something now and then.
"""

import asyncio
import hmac
import inspect
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from sqlalchemy.exc import SQLAlchemyError

from citadel_gateway.control.sql import Database, DatabaseAwayError
from citadel_gateway.control.stored import read_people, read_version
from citadel_gateway.keys import digest, new_key
from citadel_gateway.metrics import write_atomically
from citadel_gateway.overrides import Files, Standing, read_files
from citadel_gateway.settings import ConfigError, Gateway, Key, Policies, Tier, User, local_key_path
from citadel_gateway.snapshot import (
    Mark,
    Marks,
    People,
    Snapshot,
    compose,
    load_marks,
    load_people,
    save_marks,
    save_people,
    stamp,
    write,
)

log = logging.getLogger("citadel_gateway")

Reason = Literal["engine", "operator"]
LOOK_SECONDS = 0.5
LOCAL = "local"  # the key id of whoever came with the local key


class State:
    """Files as they were last found, people as the database last had them, and what is made of both.

    `look` and `poll` may run in different threads: whatever changes what is published holds the lock.
    """

    def __init__(self, settings: Gateway, wall: Callable[[], float] = time.time) -> None:
        self.settings = settings
        self.wall = wall
        self.database = Database(settings)
        names = (settings.models_file, settings.keys_file, settings.policies_file)
        self.paths = tuple(Path(name) for name in names if name)
        self.seen: tuple[object, ...] = ()
        self.marks: Marks = load_marks(settings)
        self.people: People = load_people(settings)
        self.snapshot: Snapshot | None = None
        self.files: Files | None = None  # what is declared, without any change
        self.standings: list[Standing] = []
        self.problem = ""
        self.unreadable = ""
        self.lock = threading.RLock()
        self.by_digest: dict[str, Key] = {}
        self.expiry = 0.0  # when the next key expires
        self.listeners: list[Callable[[Snapshot], None]] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.parts: dict[str, Any] = {}  # what a subject has for the others
        self.pages: list[Callable[[], str]] = []  # what a subject adds to /metrics: lines, each with its end
        self.local_digest = digest(local_key(settings))

    # the snapshot ---------------------------------------------------------------------------------------------------
    def look(self) -> bool:
        """Take the files over if one has changed. Files that cannot be used change nothing, and are reported once."""
        now = tuple(stamp(path) for path in self.paths)
        if now == self.seen and self.snapshot is not None:
            return 0 < self.expiry <= self.wall() and self.try_publish()
        self.seen = now
        try:
            files = read_files(self.settings)
        except (ConfigError, OSError) as error:
            if str(error) != self.problem:
                log.error("the workers keep what they have: %s", error)
            self.problem = str(error)
            return False
        self.problem = ""
        with self.lock:
            self.files = files
            return self.try_publish()

    def poll(self) -> bool:
        """Take over what has changed in the database, perhaps by another host. While it is away, the last known
        people are kept.
        """
        try:
            with self.database.read() as connection:
                if read_version(connection) == self.people.version:
                    return False
                people = read_people(connection)
        except DatabaseAwayError:
            return False  # said by the database, once
        except SQLAlchemyError as error:
            if str(error) != self.unreadable:
                log.error("users and keys cannot be read: %s", error)
            self.unreadable = str(error)
            return False
        self.unreadable = ""
        with self.lock:
            self.people = people
            save_people(self.settings, people)
            return self.try_publish()

    def try_publish(self) -> bool:
        """`publish` for what is done now and then: tried again when it fails."""
        try:
            self.publish()
        except OSError as error:
            log.error("the snapshot cannot be written: %s", error)
            self.seen = ()
            return False
        return True

    def publish(self) -> None:
        """Write the snapshot of what is known. With files that cannot be used, those before them still count."""
        with self.lock:
            if self.files is None:
                return
            snapshot, self.standings = compose(self.settings, self.files, self.marks, self.people, self.wall())
            write(self.settings, snapshot)
            self.by_digest = {key.sha256: key for key in snapshot.keys}
            self.expiry = min((key.expires for key in snapshot.keys if key.expires), default=0.0)
            self.snapshot = snapshot
        for listener in self.listeners:
            listener(snapshot)

    def subscribe(self, listener: Callable[[Snapshot], None]) -> None:
        """`listener` is called with each new snapshot, from any thread, and must return at once."""
        self.listeners.append(listener)

    # now and then ---------------------------------------------------------------------------------------------------
    def every(self, seconds: float, function: Callable[[], Any]) -> None:
        """Call `function` now and then until the process ends; from the event loop (a `lifespan`). A plain function
        runs in a thread, an `async` one on the loop. What it raises is logged and does not end it.
        """

        async def repeat() -> None:
            while True:
                try:
                    await call(function)
                except Exception:
                    log.exception("%s failed", getattr(function, "__qualname__", function))
                await asyncio.sleep(seconds)

        self.tasks.append(asyncio.create_task(repeat()))

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        self.database.close()

    # questions ------------------------------------------------------------------------------------------------------
    @property
    def reasons(self) -> dict[str, list[str]]:
        """Why this host alone drains a model."""
        return {name: sorted(marks) for name, marks in self.marks.items()}

    def find(self, name: str) -> str | None:
        """The model's own name for a name or an alias."""
        for model in self.snapshot.models if self.snapshot is not None else ():
            if name == model.name or name in model.aliases:
                return model.name
        return None

    def user(self, key: Key) -> User:
        """To whom the key belongs."""
        users = self.snapshot.users if self.snapshot is not None else ()
        name = key.user or key.id
        return next((user for user in users if user.id == name), User(name))

    def tier(self, user: User) -> Tier:
        """The user's tier, or the default one."""
        policies = self.snapshot.policies if self.snapshot is not None else Policies()
        name = user.tier or policies.default_tier
        return next((tier for tier in policies.tiers if tier.name == name), policies.tiers[0])

    def key(self, authorization: str, *, local: bool = False) -> Key | None:
        """The key that was sent. `local`: it came over the control socket itself, where the local key counts too.

        Looked up by its digest: how long that takes says nothing about any other key.
        """
        kind, _, token = authorization.partition(" ")
        if kind.lower() != "bearer":
            return None
        sent = digest(token.strip())
        if local and hmac.compare_digest(sent, self.local_digest):
            return Key(LOCAL, self.local_digest, ("admin", "read", "metrics", "alerts"), user=LOCAL)
        key = self.by_digest.get(sent)
        return None if key is None or 0 < key.expires <= self.wall() else key

    # drain on this host ---------------------------------------------------------------------------------------------
    def change(self, model: str, reason: Reason, *, drain: bool, who: str = "") -> bool:
        """Drain or resume for one reason; whether the model is draining now. Kept on disk before anybody acts on it."""
        with self.lock:
            marks = dict(self.marks.get(model, {}))
            if drain:
                marks.setdefault(reason, Mark(self.wall(), who or reason))
            else:
                marks.pop(reason, None)
            changed = {name: why for name, why in self.marks.items() if name != model}
            if marks:
                changed[model] = marks
            if changed != self.marks:
                save_marks(self.settings, changed)
                self.marks = changed
                self.publish()
                log.warning("model %s: %s by %s", model, "drain" if drain else "resume", who or reason)
            return self.draining(model)

    def draining(self, model: str) -> bool:
        return self.snapshot is not None and bool(self.snapshot.draining.get(model))


async def call(function: Callable[[], Any]) -> None:
    if inspect.iscoroutinefunction(function):
        found: Awaitable[Any] = function()
        await found
    else:
        await asyncio.to_thread(function)


def local_key(settings: Gateway) -> str:
    """The key of root and of the gateway's own user on this host, made once. It counts on the control socket only,
    never through a worker.
    """
    path = local_key_path(settings)
    try:
        found = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        found = ""
    if not found:
        found = new_key()
        write_atomically(path, f"{found}\n".encode(), 0o600)
    return found
