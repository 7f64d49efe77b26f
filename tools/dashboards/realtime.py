"""Real time: the last fifteen minutes, drawn anew every five seconds. Few queries, each a recorded series."""

from tools.dashboards.panels import (
    AMBER,
    ANY_MODEL,
    GREEN,
    GREY,
    HOST,
    MODEL,
    RED,
    Column,
    Json,
    Query,
    Row,
    alerts,
    bars,
    dash,
    dashboard,
    lines,
    paint,
    table,
    tile,
)


def build() -> Json:
    return dashboard("realtime", [now(), models(), load(), unusual()], last="15m", refresh="5s")


def now() -> Row:
    requests = f"sum(model:llm_gateway_requests:rate5m{{{MODEL}}})"
    return Row(
        "Now",
        [
            tile("Requests a second", "A second, over five minutes.", "reqps", Query(requests), decimals=2),
            tile(
                "Tokens",
                "In and out, a second.",
                "none",
                Query(f"sum(model:llm_gateway_tokens:rate5m{{{MODEL}}})"),
                decimals=0,
            ),
            tile(
                "In flight, all",
                "Requests that models are working on.",
                "none",
                Query(f"sum(model:llm_gateway_inflight_requests:sum{{{MODEL}}})"),
            ),
            tile(
                "Waiting, all",
                "Requests that wait for a slot in the gateway.",
                "none",
                Query(f"sum(model:llm_gateway_queue_length:sum{{{MODEL}}})"),
                steps=((10, AMBER), (100, RED)),
            ),
            tile(
                "Failures",
                "Share of 5xx and timeouts.",
                "percentunit",
                Query(f"sum(model:llm_gateway_errors:rate5m{{{MODEL}}}) / ({requests} > 0)"),
                steps=((0.005, AMBER), (0.02, RED)),
                decimals=2,
            ),
            tile(
                "First token, slowest model",
                "The largest p95 of the time to the first token.",
                "s",
                Query(
                    f'max(model:llm_gateway_time_to_first_token_seconds:quantile_rate5m{{quantile="0.95", {MODEL}}})'
                ),
                steps=((1, AMBER), (2.5, RED)),
                decimals=2,
            ),
        ],
    )


def models() -> Row:
    def most(name: str, more: str = "") -> str:
        return f"max by (model) ({name}{{{more}{MODEL}}})"

    return Row(
        "Models",
        [
            table(
                "Each model",
                "What each model does at this moment.",
                {"model": "Model"},
                Column(
                    "State",
                    most("model:llm_gateway_backend_up:min"),
                    "none",
                    words=((0, "down", RED), (1, "up", GREEN)),
                ),
                Column("Requests / s", most("model:llm_gateway_requests:rate5m"), "none", decimals=2),
                Column("Tokens out / s", most("model:llm_gateway_output_tokens:rate5m"), "none", decimals=0),
                Column("In flight", most("model:llm_gateway_inflight_requests:sum"), "none"),
                Column("Waiting", most("model:llm_gateway_queue_length:sum"), "none", ((10, AMBER), (50, RED))),
                Column(
                    "First token, p50",
                    most("model:llm_gateway_time_to_first_token_seconds:quantile_rate5m", 'quantile="0.5", '),
                    "s",
                    ((1, AMBER), (2.5, RED)),
                ),
                Column(
                    "Duration, p99",
                    most("model:llm_gateway_request_duration_seconds:quantile_rate5m", 'quantile="0.99", '),
                    "s",
                ),
                Column(
                    "Failures",
                    most("model:llm_gateway_errors:ratio_rate5m"),
                    "percentunit",
                    ((0.005, AMBER), (0.02, RED)),
                    decimals=2,
                ),
                Column(
                    "KV cache",
                    most("model:llm_engine_kv_cache_usage:ratio"),
                    "percentunit",
                    ((0.8, AMBER), (0.9, RED)),
                    decimals=0,
                ),
                size=(16, 7),
            ),
            alerts(
                "Alerts", "Pending and firing alerts of this suite.", 'suite="citadel", severity!="info"', size=(8, 7)
            ),
        ],
    )


def load() -> Row:
    def by_model(name: str, more: str = "") -> Query:
        return Query(f"{name}{{{more}{MODEL}}}", "{{model}}")

    return Row(
        "Load",
        [
            lines(
                "Requests",
                "A second, of each model.",
                "reqps",
                by_model("model:llm_gateway_requests:rate5m"),
                stack=True,
            ),
            lines(
                "Tokens out",
                "A second, of each model.",
                "none",
                by_model("model:llm_gateway_output_tokens:rate5m"),
                stack=True,
            ),
            lines(
                "Requests by outcome",
                "By HTTP status, timeout, and clients that left.",
                "reqps",
                Query(f"sum by (code) (model_code:llm_gateway_requests:rate5m{{{MODEL}}})", "{{code}}"),
                stack=True,
                paints=[paint("^2", GREEN), paint("^4", AMBER), paint("^(5|timeout)", RED), paint("client", GREY)],
            ),
            lines(
                "Time to the first token",
                "p95; dashed: p50.",
                "s",
                by_model("model:llm_gateway_time_to_first_token_seconds:quantile_rate5m", 'quantile="0.95", '),
                Query(
                    f'model:llm_gateway_time_to_first_token_seconds:quantile_rate5m{{quantile="0.5", {MODEL}}}',
                    "{{model}} p50",
                ),
                paints=[dash(" p50$")],
            ),
            lines(
                "Duration",
                "p95; dashed: p50.",
                "s",
                by_model("model:llm_gateway_request_duration_seconds:quantile_rate5m", 'quantile="0.95", '),
                Query(
                    f'model:llm_gateway_request_duration_seconds:quantile_rate5m{{quantile="0.5", {MODEL}}}',
                    "{{model}} p50",
                ),
                paints=[dash(" p50$")],
            ),
            lines(
                "In flight",
                "Requests that a model is working on.",
                "none",
                by_model("model:llm_gateway_inflight_requests:sum"),
            ),
            lines("Waiting", "Requests that wait for a slot.", "none", by_model("model:llm_gateway_queue_length:sum")),
            lines(
                "Shed",
                "Share of requests that the queue refuses.",
                "percentunit",
                by_model("model:llm_gateway_shed:ratio_rate5m"),
                steps=((0.01, RED),),
                high=0.02,
            ),
            lines(
                "KV cache",
                "Share in use.",
                "percentunit",
                by_model("model:llm_engine_kv_cache_usage:ratio"),
                high=1,
                steps=((0.9, RED),),
                absent="no engine",
            ),
        ],
    )


def unusual() -> Row:
    return Row(
        "Is this unusual?",
        [
            lines(
                "Requests against the last day",
                "Deviation from the mean of a day in standard deviations; beyond 3 either way is rare.",
                "none",
                Query(f"model:llm_gateway_requests:zscore1d{{{MODEL}}}", "{{model}}"),
                low=-3,
                high=3,
                steps=((3, RED),),
            ),
            bars(
                "Requests against last week",
                "Half an hour as a share of the same half hour a week ago.",
                "percentunit",
                Query(f"model:llm_gateway_requests:ratio_offset1w{{{MODEL}}}", "{{model}}"),
                high=2,
                steps=((0.5, GREEN), (1.5, AMBER)),
                base=RED,
            ),
            bars(
                "Detectors that see something",
                "Of the predictor's independent detectors, in ten minutes. Two that agree raise an alert.",
                "none",
                Query(
                    f"max by (target, model) (target:llm_anomaly_detectors:count{{{ANY_MODEL}}})",
                    "{{target}} {{model}}",
                ),
                high=3,
                steps=((1, AMBER), (2, RED)),
                absent="nothing unusual",
            ),
            lines(
                "CPU of the hosts",
                "Share of all cores at work.",
                "percentunit",
                Query(f"instance:node_cpu_utilisation:rate5m{{{HOST}}}", "{{instance}}"),
                high=1,
                steps=((0.9, RED),),
                absent="no data",
            ),
            lines(
                "Connections of clients",
                "Open at the gateway.",
                "none",
                Query(f"instance:llm_gateway_connections:sum{{{HOST}}}", "{{instance}}"),
                absent="no data",
            ),
            lines(
                "Cost",
                "US dollars an hour, of each model.",
                "currencyUSD",
                Query(f"model:llm_gateway_cost_usd_per_hour:rate1h{{{MODEL}}}", "{{model}}"),
                stack=True,
            ),
        ],
    )
