"""Figures in words, as the units of the panels have it."""

import math

SHORT = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))
BINARY = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
DECIMAL = ((1e9, "GB/s"), (1e6, "MB/s"), (1e3, "kB/s"))
TIMES = ((604_800, "weeks"), (86_400, "days"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"), (1e-6, "µs"))
# Grafana's names of the units that the dashboards use, with what goes after the figure
UNITS = {
    "none": "", "short": "", "percentunit": " %", "s": "", "d": " d", "bytes": "", "Bps": "", "reqps": " req/s",
    "ops": " ops/s", "currencyUSD": "", "celsius": " °C", "watt": " W",
}  # fmt: skip


def digits(value: float, decimals: int | None) -> str:
    """With as many decimals as the panel asks for; else with three figures that count, without zeros at the end."""
    if decimals is not None:
        return f"{value:,.{decimals}f}"
    if value == 0:
        return "0"
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{min(places, 6)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def scaled(
    value: float, steps: tuple[tuple[float, str], ...], rest: str, decimals: int | None, space: str = " "
) -> str:
    for size, name in steps:
        if abs(value) >= size:
            return f"{digits(value / size, decimals)}{space}{name}"
    return f"{digits(value, decimals)}{rest}"


def shown(value: float, unit: str, decimals: int | None = None) -> str:
    """The value with its unit. Raises KeyError for a unit that no panel should have."""
    after = UNITS[unit]
    if math.isinf(value):
        return "∞"
    if unit == "percentunit":
        return digits(100 * value, decimals) + after
    if unit == "s":
        return scaled(value, TIMES, " s", decimals) if value else "0 s"
    if unit == "bytes":
        return scaled(value, BINARY, " B", decimals)
    if unit == "Bps":
        return scaled(value, DECIMAL, " B/s", decimals)
    if unit == "currencyUSD":
        text = scaled(abs(value), SHORT, "", decimals, "")
        return f"-${text}" if value < 0 else f"${text}"
    if unit == "short" or (unit == "none" and abs(value) >= 1e6):
        return scaled(value, SHORT, "", decimals, "") + after
    return digits(value, decimals) + after
