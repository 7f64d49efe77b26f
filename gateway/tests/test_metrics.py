"""Counting in a worker, adding up in the control process."""

from pathlib import Path

from citadel_gateway import __version__
from citadel_gateway.core.tally import DURATION, TTFT
from citadel_gateway.metrics import Metrics, decode, encode, read_report, read_reports, render
from citadel_gateway.metrics import write_atomically as write


def counted(requests: int) -> Metrics:
    metrics = Metrics()
    for _ in range(requests):
        series = metrics.of("one", "chat", True)
        series.codes["200"] = series.codes.get("200", 0) + 1
        series.duration.observe(0.3, DURATION)
        series.first_token.observe(0.05, TTFT)
        series.bytes_out += 10
    metrics.count("llm_gateway_retries_total", ("one", "stale_connection"))
    return metrics


def gauges(up: float, inflight: float) -> dict[str, dict[tuple[str, ...], float]]:
    return {
        "llm_gateway_inflight_requests": {("one",): inflight},
        "llm_gateway_backend_up": {("one", "h:1"): up},
        "llm_gateway_connections": {(): 2.0},
    }


def test_the_page_adds_up_all_workers() -> None:
    reports = [counted(3).report(1, gauges(1, 2), 100.0), counted(4).report(2, gauges(0, 1), 100.0)]
    page = render(reports, {"one": True}, wall=101.0).splitlines()
    for line in (
        'llm_gateway_requests_total{model="one",endpoint="chat",code="200"} 7',
        'llm_gateway_request_duration_seconds_bucket{model="one",endpoint="chat",stream="true",le="0.25"} 0',
        'llm_gateway_request_duration_seconds_bucket{model="one",endpoint="chat",stream="true",le="0.5"} 7',
        'llm_gateway_request_duration_seconds_bucket{model="one",endpoint="chat",stream="true",le="+Inf"} 7',
        'llm_gateway_request_duration_seconds_count{model="one",endpoint="chat",stream="true"} 7',
        'llm_gateway_time_to_first_token_seconds_bucket{model="one",le="0.05"} 7',
        'llm_gateway_inflight_requests{model="one"} 3',
        'llm_gateway_backend_up{model="one",backend="h:1"} 0',
        'llm_gateway_draining{model="one"} 1',
        "llm_gateway_connections 4",
        "llm_gateway_workers 2",
        'llm_gateway_bytes_total{model="one",direction="out"} 70',
        f'llm_gateway_build_info{{version="{__version__}"}} 1',
    ):
        assert line in page
    assert page.count("# TYPE llm_gateway_requests_total counter") == 1


def test_the_gauges_of_a_dead_worker_count_no_more_but_its_counters_do() -> None:
    reports = [counted(3).report(1, gauges(1, 2), 100.0), counted(4).report(2, gauges(0, 1), 10.0)]
    page = render(reports, {}, wall=101.0)
    assert 'llm_gateway_inflight_requests{model="one"} 2' in page
    assert 'llm_gateway_backend_up{model="one",backend="h:1"} 1' in page
    assert 'code="200"} 7' in page


def test_counters_never_go_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics-1.json"
    write(path, encode(counted(5).report(1, {}, 100.0)))
    former = read_report(path)
    assert former is not None
    again = Metrics()
    again.add(former)
    again.of("one", "chat", True).codes["200"] = 1
    report = decode(encode(again.report(1, {}, 101.0)))
    page = render([report], {}, wall=101.0)
    assert 'llm_gateway_requests_total{model="one",endpoint="chat",code="200"} 6' in page
    assert 'llm_gateway_request_duration_seconds_sum{model="one",endpoint="chat",stream="true"} 1.5' in page
    assert 'llm_gateway_retries_total{model="one",reason="stale_connection"} 1' in page


def test_damaged_or_foreign_files_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "metrics-1.json").write_text("{half")
    write(tmp_path / "metrics-2.json", encode(counted(1).report(2, {}, 1.0)))
    assert [report.worker for report in read_reports(tmp_path)] == [2]
    assert read_report(tmp_path / "metrics-3.json") is None
    other = decode(
        b'{"worker":1,"written":1,"counters":{"gone_total":[{"labels":[],"value":1}]},'
        b'"histograms":{"llm_gateway_time_to_first_token_seconds":[{"labels":["m"],"counts":[1,2],"total":1}]}}'
    )
    metrics = Metrics()
    metrics.add(other)  # of a version with other names and buckets
    assert "gone_total" not in metrics.counters
    assert not metrics.histograms["llm_gateway_time_to_first_token_seconds"]


def test_labels_are_escaped() -> None:
    page = render([], {'a"b\\c\nd': False}, wall=0.0)
    assert 'llm_gateway_draining{model="a\\"b\\\\c\\nd"} 0' in page
