"""The settings: what the README shows is what is read, and what is wrong is refused with its remedy."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from citadel_predictor import settings
from citadel_predictor.settings import ConfigError, Settings, Target

README = (Path(__file__).parents[2] / "README.md").read_text()
SAMPLE = re.findall(r"```json\n(.*?)```", README, re.DOTALL)[0]


def written(folder: Path, content: str) -> Path:
    path = folder / "predictor.json"
    path.write_text(content)
    return path


def test_the_documented_sample_is_read_and_shows_the_defaults(tmp_path: Path) -> None:
    read = settings.read(written(tmp_path, SAMPLE))
    assert [target.name for target in read.targets] == ["requests", "disk"]
    shown = json.loads(SAMPLE)
    for name in set(Settings.__struct_fields__) - {"prometheus", "targets"}:
        assert getattr(Settings(read.prometheus, read.targets), name) == getattr(read, name), name
    first, bare = shown["targets"][0], Target("requests", first_query := shown["targets"][0]["query"])
    assert first_query == "model:llm_gateway_requests:rate5m"
    for name in set(first) - {"labels"}:
        assert getattr(bare, name) == getattr(read.targets[0], name), name


def test_every_setting_is_documented() -> None:
    keys = re.findall(r"^\| (`.*?) \|", README, re.MULTILINE)
    documented = set(re.findall(r"`(?:targets\[\]\.)?(\w+)`", " ".join(keys)))
    for struct in (Settings, Target):
        assert set(struct.__struct_fields__) <= documented


def changed(**target: Any) -> str:
    return json.dumps(
        {"prometheus": {"url": "http://127.0.0.1:9090"}, "targets": [{"name": "a", "query": "a:b:c", **target}]}
    )


def test_a_minimal_file(tmp_path: Path) -> None:
    assert settings.read(written(tmp_path, changed())).targets[0].step == 3600


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "truncated"),
        (changed(quary="a:b:c"), "unknown field `quary`"),
        (changed(step="3600"), "Expected `int`, got `str` - at `$.targets[0].step`"),
        (changed(step=60), "`int` >= 300"),
        (changed(step=7000), "step: 7000 seconds do not divide a day: take 300, 900 or 3600"),
        (changed(season=5000), "season: 5000 is no multiple of the step of 3600"),
        (changed(step=300, season=7 * 86400, horizons=["1d"]), ""),
        (changed(name="A b"), "matching regex"),
        (changed(query="llm_gateway_requests_total"), "does not select a recording rule"),
        (changed(query="sum(a:b:c)"), "record the expression in a rule"),
        (changed(query='a:b:c{x="}"}'), ""),
        (changed(limit="up"), "limit: 'up' is neither a number nor a recording rule"),
        (changed(limit=3), ""),
        (changed(capacity=True), "capacity: true needs a limit"),
        (changed(capacity=True, limit=3, horizons=["1h"]), "needs the horizon '30d'"),
        (changed(horizons=["2h"]), "Invalid enum value '2h'"),
        (changed(step=7200, season=86400, horizons=["1h"]), "horizons: '1h' is shorter than the step of 7200"),
        (changed(horizons=["1d", "1d"]), "horizons: '1d' is there twice"),
        (changed(detectors=["magic"]), "detectors: there is no 'magic': take some of ensemble"),
        (changed(detectors=["threshold"]), "'threshold' needs a limit"),
        (changed(labels=["quantile"]), "labels: 'quantile' is a name of the predictor's own"),
        (changed(direction="up"), "Invalid enum value 'up'"),
    ],
)
def test_what_is_wrong_is_refused(tmp_path: Path, content: str, said: str) -> None:
    path = written(tmp_path, content)
    if not said:
        settings.read(path)
        return
    with pytest.raises(ConfigError, match=re.escape(said)) as refused:
        settings.read(path)
    assert all(line.startswith(f"{path}: ") for line in refused.value.lines)


@pytest.mark.parametrize(
    ("top", "said"),
    [
        ({"state_dir": "var"}, "state_dir: 'var' is no absolute path"),
        ({"methods": ["prophet"]}, "methods: there is no 'prophet': take some of naive"),
        ({"prometheus": {"url": "localhost:9090"}}, "prometheus.url: 'localhost:9090' is no address"),
        ({"prometheus": {"url": "http://a:b@c"}}, "holds a password"),
        ({"prometheus": {"url": "http://c", "username": "x"}}, "username and password_file belong together"),
        (
            {"prometheus": {"url": "http://c", "username": "x", "password_file": "/p", "bearer_file": "/b"}},
            "exclude each other",
        ),
        ({"targets": [{"name": "a", "query": "a:b:c"}] * 2}, "targets: the name 'a' is there 2 times"),
        ({"targets": []}, "length >= 1"),
        ({"retrain_second": 3}, "unknown field `retrain_second`"),
    ],
)
def test_what_is_wrong_above_targets_is_refused(tmp_path: Path, top: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        settings.read(written(tmp_path, json.dumps(json.loads(changed()) | top)))


def test_all_problems_are_said_at_once_and_the_password_is_not(tmp_path: Path) -> None:
    content = json.loads(changed(step=7000)) | {"state_dir": "x", "prometheus": {"url": "http://a:secret@c"}}
    with pytest.raises(ConfigError) as refused:
        settings.read(written(tmp_path, json.dumps(content)))
    assert len(refused.value.lines) >= 3
    assert "secret" not in str(refused.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        settings.read(tmp_path / "none.json")


def test_lstm_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"install citadel-predictor\[lstm\], or leave it out"):
        settings.read(written(tmp_path, json.dumps(json.loads(changed()) | {"methods": ["lstm"]})))
