"""Forecasts and anomalies from a Prometheus, each with its measured skill."""

__version__ = "0.1.0"
