"""The command beside a real Prometheus that is stopped, killed and started again."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from citadel_predictor.cli.main import main
from citadel_predictor.settings import DAY

from .fakes import HOUR, traffic
from .servers import PrometheusServer, check, environment, free_port, promtool

LOST = 9  # days ago: the day that is not there


def sample_times(now: int) -> list[int]:
    """Every 20 minutes, every five in the last two and a half days."""
    recent = now - 5 * DAY // 2
    old = range(now - 26 * DAY, recent, 1200)
    return [at for at in (*old, *range(recent, now, 300)) if not LOST * DAY < now - at < (LOST + 1) * DAY]


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrometheusServer]:
    folder = tmp_path_factory.mktemp("prometheus")
    now = int(time.time()) // 300 * 300 + 300
    lines = ["# TYPE model:requests:rate5m gauge"]
    for model in ("small", "large"):
        values = traffic(len(model))
        lines += [f'model:requests:rate5m{{model="{model}"}} {values(at)} {at}' for at in sample_times(now)]
    (folder / "values").write_text("\n".join([*lines, "# EOF", ""]))
    options = ("--max-block-duration=744h", "--quiet")
    made = check(promtool(), "tsdb", "create-blocks-from", "openmetrics", *options, folder / "values", folder / "data")
    assert made.returncode == 0, made.stderr
    config = folder / "prometheus.yml"
    config.write_text("global: {scrape_interval: 15s}\n")
    server = PrometheusServer(config, folder / "data")
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture
def config(tmp_path: Path, prometheus: PrometheusServer) -> Path:
    path = tmp_path / "predictor.json"
    requests = {
        "name": "requests",
        "query": "model:requests:rate5m",
        "labels": ["model"],
        "limit": 1000,
        "capacity": True,
    }
    renamed = {"name": "renamed", "query": "model:requests_old:rate5m"}
    path.write_text(
        json.dumps(
            {
                "prometheus": {"url": prometheus.url, "timeout_seconds": 2},
                "listen": {"port": free_port()},
                "state_dir": str(tmp_path / "state"),
                "cycle_seconds": 10,
                "targets": [requests | {"detectors": ["robust", "ensemble"], "history_days": 26}, renamed],
            }
        )
    )
    return path


class Running:
    """`citadel-predictor serve` as a process."""

    def __init__(self, config: Path) -> None:
        self.config = config
        self.port = json.loads(config.read_text())["listen"]["port"]
        self.log = config.with_name("log")
        command = [sys.executable, "-m", "citadel_predictor", "serve", "--config", str(config)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env=env, stdout=log, stderr=log)

    def metrics(self) -> str:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=5) as reply:
                return bytes(reply.read()).decode()
        except urllib.error.URLError:
            return ""

    def until(self, shown: Callable[[str], bool]) -> str:
        deadline = time.monotonic() + 90
        while not shown(text := self.metrics()):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text() + text
            time.sleep(0.1)
        return text

    def events(self, name: str) -> list[dict[str, object]]:
        return [each for line in self.log.read_text().splitlines() if (each := json.loads(line))["event"] == name]

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)


def test_it_forecasts_survives_kill_9_and_a_prometheus_that_is_slow_then_down(
    config: Path, prometheus: PrometheusServer
) -> None:
    running = Running(config)
    try:
        text = running.until(lambda text: "llm_predictor_up_to_date 1.0" in text)
        assert 'llm_forecast_value{target="requests",model="small",horizon="30d"' in text
        judged = subprocess.run(
            [promtool(), "check", "metrics"], input=text, text=True, capture_output=True, check=False,
            env=environment(str(promtool())),
        )  # fmt: skip
        meant = (
            'non-summary metrics should not have "quantile" label',
            'llm_forecast_history_days use base unit "seconds"',
        )
        assert not [line for line in judged.stderr.splitlines() if not any(each in line for each in meant)]
        assert 'llm_predictor_degraded{target="requests",reason="gaps"} 1.0' in text, "the lost day"
        assert 'llm_predictor_degraded{target="renamed",reason="no_series"} 1.0' in text
        assert text.count('llm_forecast_limit_eta_seconds{target="requests",model="large"') == 3
        assert len(running.events("model_card")) == 2 * 4
        assert running.end(signal.SIGKILL) == -signal.SIGKILL

        running = Running(config)
        running.until(lambda text: "llm_predictor_up_to_date 1.0" in text)
        assert "llm_forecast_value{" in running.metrics()
        assert not running.events("model_card"), "what was chosen before is used"

        prometheus.freeze()
        running.until(lambda text: 'errors_total{reason="timeout"}' in text)
        began = time.monotonic()
        assert "llm_forecast_value{" in running.metrics()
        assert time.monotonic() - began < 2
        prometheus.thaw()
        prometheus.kill()
        running.until(lambda text: 'errors_total{reason="unreachable"}' in text)
        prometheus.start()
        running.until(lambda text: 'degraded{target="requests",reason="gaps"}' in text)

        assert running.end(signal.SIGTERM) == 0
        assert running.events("stopped")
        saved = json.loads((config.parent / "state" / "targets" / "requests.json").read_text())
        assert len(saved["series"]) == 2
        assert saved["series"][0]["asked"] % HOUR == 0
    finally:
        running.process.kill()
        running.process.wait()


FORECASTS = re.compile(r"^llm_forecast_(?:value|mase|coverage_ratio|limit|history_days)\{.*$", re.MULTILINE)
SUCCESS = re.compile(r'^llm_forecast_last_success_timestamp_seconds\{target="requests"\} (.*)$', re.MULTILINE)
ETA = 'llm_forecast_limit_eta_seconds{target="requests"'


def test_it_starts_beside_a_prometheus_that_is_down_with_the_forecasts_of_before(
    config: Path, prometheus: PrometheusServer
) -> None:
    running = Running(config)
    try:
        before = running.until(lambda text: "llm_predictor_up_to_date 1.0" in text)
        assert running.end(signal.SIGTERM) == 0
        prometheus.stop()
        began = time.time()
        running = Running(config)
        text = running.until(lambda text: "llm_predictor_build_info" in text)
        assert len(FORECASTS.findall(text)) > 200
        assert sorted(FORECASTS.findall(text)) == sorted(FORECASTS.findall(before))
        assert text.count(ETA) == before.count(ETA) == 6
        assert "llm_predictor_up_to_date 0.0" in text
        assert text.count("llm_anomaly_score{") == before.count("llm_anomaly_score{") == 4
        assert float(SUCCESS.findall(text)[0]) < began, "so that their age is known"
        text = running.until(lambda text: 'degraded{target="requests",reason="unreachable"}' in text)
        assert sorted(FORECASTS.findall(text)) == sorted(FORECASTS.findall(before))
        prometheus.start()
        text = running.until(lambda text: "llm_predictor_up_to_date 1.0" in text)
        assert float(SUCCESS.findall(text)[0]) > began
        assert not running.events("model_card"), "what was chosen before is used"
        assert running.end(signal.SIGTERM) == 0
    finally:
        running.process.kill()
        running.process.wait()


def test_check_asks_for_each_target(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--config", str(config)]) == 0
    assert main(["check", "--config", str(config), "--live"]) == 1
    said = capsys.readouterr().out
    assert "2 targets, no problem" in said
    assert "requests: 2 series" in said
    assert "renamed: no series: is its rule loaded" in said


def test_explain_says_which_method_and_why(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "requests", "--config", str(config)]) == 0
    said = capsys.readouterr().out
    assert "target requests, model small" in said
    assert "<- used" in said
    assert "missing and are filled in" in said
    assert "limit reached in days" in said
    assert main(["explain", "requests", "--config", str(config), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found[0]["forecasts"][0]["mase"] <= found[0]["forecasts"][0]["mase_naive"]
    assert main(["explain", "renamed", "--config", str(config)]) == 1
    assert "has no series" in capsys.readouterr().err
    assert main(["explain", "nobody", "--config", str(config)]) == 1
    assert "take one of requests, renamed" in capsys.readouterr().err


def test_backtest_compares_with_what_came(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backtest", "requests", "--config", str(config), "--folds", "1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    day = next(row for row in rows if row["horizons"] == "1d")
    assert day["mase"] < day["mase_naive"]
    month = next(row for row in rows if row["horizons"] == "30d")
    assert month["folds"] == 0
    assert "too few" in month["why"]
