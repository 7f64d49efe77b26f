"""The file that the workers serve from."""

import pytest
from citadel_gateway import snapshot
from citadel_gateway.settings import ConfigError
from citadel_gateway.snapshot import Mark

from gateway.tests.site import Site


def test_a_worker_starts_without_the_control_process(site: Site) -> None:
    site.model("one", 1)
    settings = site.settings
    snapshot.save_marks(settings, {"one": {"operator": Mark(1.0, "root")}, "gone": {"engine": Mark()}})
    first = snapshot.Watcher(settings).first()
    assert [model.name for model in first.models] == ["one"]
    assert first.draining == {"one": ["operator"]}
    assert first.created > 0


def test_changes_are_seen_once(site: Site) -> None:
    site.model("one", 1)
    settings = site.settings
    watcher = snapshot.Watcher(settings)
    assert watcher.changed() is None
    snapshot.write(settings, snapshot.merge(settings, {}))
    found = watcher.first()
    assert found.draining == {}
    assert watcher.changed() is None
    snapshot.write(settings, snapshot.merge(settings, {"one": {"engine": Mark()}}))
    changed = watcher.changed()
    assert changed is not None
    assert changed.draining == {"one": ["engine"]}


def test_a_damaged_snapshot_changes_nothing(site: Site) -> None:
    site.model("one", 1)
    watcher = snapshot.Watcher(site.settings)
    watcher.path.write_text("{")
    assert watcher.changed() is None
    assert watcher.first().models[0].name == "one"


def test_files_that_cannot_be_used(site: Site) -> None:
    site.model("one", 1)
    site.model("one", 2)
    with pytest.raises(ConfigError, match="used 2 times"):
        snapshot.merge(site.settings, {})
    snapshot.drain_path(site.settings).write_text("[]")
    assert snapshot.load_marks(site.settings) == {}
    snapshot.drain_path(site.settings).write_text('{"one": ["operator"]}')  # as releases before wrote it
    assert snapshot.load_marks(site.settings) == {"one": {"operator": Mark()}}
