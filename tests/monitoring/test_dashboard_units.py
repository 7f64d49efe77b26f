"""Figures as the drawings show them."""

import math

import pytest

from tools.dashboards.units import shown


@pytest.mark.parametrize(
    ("value", "unit", "decimals", "text"),
    [
        (0.0457, "percentunit", 2, "4.57 %"),
        (1, "percentunit", None, "100 %"),
        (0.72859, "s", None, "729 ms"),
        (0.0009, "s", None, "900 µs"),
        (0, "s", None, "0 s"),
        (90, "s", None, "1.5 min"),
        (9 * 86_400, "s", 1, "1.3 weeks"),
        (math.inf, "s", None, "∞"),
        (15 * 2**30, "bytes", 1, "15.0 GiB"),
        (12, "bytes", None, "12 B"),
        (2.1e6, "Bps", None, "2.1 MB/s"),
        (5.302, "reqps", 2, "5.30 req/s"),
        (12_345, "short", None, "12.3K"),
        (12_345, "none", None, "12,345"),
        (-3.5, "currencyUSD", 2, "-$3.50"),
        (0.00011, "currencyUSD", None, "$0.00011"),
        (4_200_000, "currencyUSD", None, "$4.2M"),
        (61.5, "celsius", None, "61.5 °C"),
        (60, "d", 0, "60 d"),
    ],
)
def test_a_figure_is_shown_with_its_unit(value: float, unit: str, decimals: int | None, text: str) -> None:
    assert shown(value, unit, decimals) == text


def test_an_unknown_unit_is_refused() -> None:
    with pytest.raises(KeyError):
        shown(1, "furlong")
