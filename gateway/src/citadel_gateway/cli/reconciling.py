"""The work of `citadel-gateway reconcile`: reads counters, asks the ledger."""

import argparse
import time
from pathlib import Path
from urllib.parse import quote, urlencode

import msgspec

from citadel_gateway.cli.client import Client, Failed
from citadel_gateway.cli.ledger import opened
from citadel_gateway.control.reconcile import Counters, Line, Reading, Share, Span, canaries, engines, lines, load, span
from citadel_gateway.control.sql import reports
from citadel_gateway.settings import Gateway, Models, read

QUIET = 0.5


class Reconciling:
    """`client`: the control process; None: the database is opened here."""

    def __init__(self, options: argparse.Namespace, settings: Gateway, client: Client | None) -> None:
        self.options = options
        self.settings = settings
        self.client = client
        # Those that this host's engines serve; a replica behind another gateway is that host's to reconcile.
        self.local = {
            model.name: [f"{one.host}:{one.port}" for one in model.backends if not one.gateway]
            for model in read(settings.models_file, Models).models
        }
        unknown = [name for name in options.model if not self.local.get(name)]
        if unknown:
            raise Failed(f"reconcile: {unknown[0]} has no engine on this host")
        self.models = options.model or [name for name, found in self.local.items() if found]

    def read(self) -> Reading:
        """The counters of now, when no request is running."""
        if self.client is not None:
            self.wait(self.client)
        files = dict(one.partition("=")[::2] for one in self.options.metrics)
        for model in files:
            if not self.local.get(model):
                raise Failed(f"reconcile: {model} has no engine on this host")
        folder = Path(self.options.canaries)
        while True:
            probed = canaries(folder)
            found = {
                model: engines(self.page(model, files.get(model)), self.local[model][0])
                for model in files or self.models
            }
            if probed == canaries(folder):  # else an engine was probed between its counters and what it says of probes
                return Reading(time.time(), found, probed)

    def page(self, model: str, path: str | None) -> str:
        if path is not None:
            try:
                return Path(path).read_text(encoding="utf-8", errors="replace")
            except OSError as error:
                raise Failed(f"{path}: {error.strerror}") from None
        assert self.client is not None
        return self.client.raw("GET", f"/metrics/engines/{quote(model)}").decode("utf-8", "replace")

    def wait(self, client: Client) -> None:
        """A request that is running is in the engine's counters and not in the ledger."""
        end = time.monotonic() + self.options.wait
        while True:
            found = client.ask("GET", "/admin/ledger/check?sums=false")
            if not found["open"] and found["lag_seconds"] < QUIET:
                return
            if time.monotonic() >= end:
                raise Failed(
                    f"reconcile: {found['open']} requests are running or not settled: ask again when it is quiet"
                )
            time.sleep(QUIET / 2)

    def compare(self, now: Reading) -> list[Line]:
        before = self.baseline()
        found = []
        for model, counters in now.engines.items():
            spans = self.spans(model, counters, before)
            canary = now.canaries.get(model, Counters())
            if before is not None and not any(one.restarted for one in spans.values()):
                canary = canary.less(before.canaries.get(model, Counters()))
            shares = {backend: self.share(model, backend, one.since, now.at) for backend, one in spans.items()}
            latest = max(one.since for one in spans.values())
            shares |= {label: self.share(model, label, latest, now.at) for label in self.options.also}
            found += lines(model, spans, shares, canary)
        return found

    def baseline(self) -> Reading | None:
        if not self.options.since:
            return None
        try:
            return load(Path(self.options.since))
        except (OSError, msgspec.DecodeError) as error:
            raise Failed(f"{self.options.since}: {error}") from None

    def spans(self, model: str, counters: dict[str, Counters], before: Reading | None) -> dict[str, Span]:
        known = before.engines.get(model, {}) if before is not None else {}
        found = {}
        for backend, one in counters.items():
            part = span(one, known.get(backend), before.at if before is not None else 0.0)
            if part is None:
                raise Failed(
                    f"reconcile: {model} does not say when it was started: make a baseline first (--save FILE)"
                )
            found[backend] = part
        if not found:
            raise Failed(f"reconcile: the page of {model} has no token counters")
        return found

    def share(self, model: str, backend: str, since: float, until: float) -> Share:
        if self.client is not None:
            asked = urlencode({"model": model, "from": repr(since), "to": repr(until)})
            rows = self.client.ask("GET", f"/admin/ledger/tokens?{asked}")
        else:
            with opened(self.settings) as connection:
                rows = reports.tokens(connection, since, until, model)
        return msgspec.convert(rows.get(backend, {}), Share)
