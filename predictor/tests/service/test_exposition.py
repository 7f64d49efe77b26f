"""The text that is scraped, judged by a parser that is not ours."""

import math
import re

from citadel_predictor.exposition import FAMILIES, Histogram, Metrics, Sheet, line
from prometheus_client.parser import text_string_to_metric_families


def test_numbers_and_labels_as_the_format_has_them() -> None:
    assert line("a", (), 1) == "a 1.0"
    assert line("a", [("b", 'x"y\\z\n')], math.inf) == 'a{b="x\\"y\\\\z\\n"} +Inf'
    assert [line("a", (), value) for value in (-math.inf, math.nan)] == ["a -Inf", "a NaN"]


def test_a_histogram_counts_what_is_at_its_bounds() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 5.0):
        histogram.observe(value)
    assert histogram.lines("a", (("b", "c"),)) == [
        'a_bucket{b="c",le="1.0"} 2.0',
        'a_bucket{b="c",le="2.0"} 3.0',
        'a_bucket{b="c",le="+Inf"} 4.0',
        'a_sum{b="c"} 8.0',
        'a_count{b="c"} 4.0',
    ]


def test_a_parser_reads_all_of_it() -> None:
    metrics = Metrics()
    metrics.add("llm_predictor_errors_total", reason="timeout")
    metrics.add("llm_predictor_errors_total", 2, reason="timeout")
    metrics.observe("llm_forecast_fit_seconds", 0.2, method="ridge")
    sheet = Sheet()
    sheet.add("llm_anomaly_score", {"target": "a", "detector": "ar"}, 0.5)
    metrics.publish("a", sheet)
    families = {family.name: family for family in text_string_to_metric_families(metrics.text(up_to_date=False))}
    assert families["llm_predictor_errors"].samples[0].value == 3
    assert families["llm_forecast_fit_seconds"].type == "histogram"
    assert families["llm_anomaly_score"].samples[0].labels == {"target": "a", "detector": "ar"}
    assert families["llm_predictor_up_to_date"].samples[0].value == 0
    assert families["process_resident_memory_bytes"].samples[0].value > 1e6
    assert metrics.get("llm_predictor_errors_total", reason="none") == 0
    metrics.publish("a", Sheet())
    assert "llm_anomaly_score" not in metrics.text(up_to_date=True)


def test_names_and_their_types_agree() -> None:
    for name, (kind, said) in FAMILIES.items():
        assert re.fullmatch(r"(llm|process)_[a-z_]+", name)
        assert (kind == "counter") == name.endswith("_total")
        assert said.endswith(".")
