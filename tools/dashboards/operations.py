"""Operations: are we keeping our word, and if not, where is it tight?"""

from tools.dashboards.panels import (
    AMBER,
    BLUE,
    GREEN,
    GREY,
    HOST,
    JOB,
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
    dot,
    lines,
    paint,
    table,
    tile,
    variable,
)

UP = ((0, "down", RED), (1, "up", GREEN))
BURN = ((1, AMBER), (3, "#E8762D"), (6, RED))
FULL = ((0.8, AMBER), (0.9, RED))
NO_ENGINE, NO_DATA = "no engine", "no data"


def p95(name: str, quantile: str = "0.95") -> str:
    return f'model:{name}_seconds:quantile_rate5m{{quantile="{quantile}", {MODEL}}}'


def build() -> Json:
    rows = [at_a_glance(), levels(), traffic(), saturation(), engines(), hosts(), stores(), itself(), gpus()]
    return dashboard(
        "operations",
        rows,
        last="6h",
        refresh="30s",
        variables=[variable("job", "Job", "label_values(job:up:avg, job)")],
    )


def at_a_glance() -> Row:
    return Row(
        "At a glance",
        [
            tile(
                "Firing alerts",
                "Alerts of this suite that fire now, without the copies that an escalation sends.",
                "none",
                Query('count(ALERTS{suite="citadel", alertstate="firing", severity=~"critical|warning"}) or vector(0)'),
                steps=((1, AMBER), (3, RED)),
            ),
            tile(
                "Models serving",
                "Share of the models of which every worker believes all backends to be up (llm_gateway_backend_up).",
                "percentunit",
                Query(f"avg(model:llm_gateway_backend_up:min{{{MODEL}}})"),
                base=RED,
                steps=((0.75, AMBER), (1, GREEN)),
                decimals=0,
            ),
            tile(
                "Requests a second",
                "Over five minutes, all models, without questions for the list of models.",
                "reqps",
                Query(f"sum(model:llm_gateway_requests:rate5m{{{MODEL}}})"),
                decimals=2,
            ),
            tile(
                "Failures",
                "Share of requests that end in a 5xx or a timeout. Clients that leave, and limits, are none.",
                "percentunit",
                Query(
                    f"sum(model:llm_gateway_errors:rate5m{{{MODEL}}}) / "
                    f"(sum(model:llm_gateway_requests:rate5m{{{MODEL}}}) > 0)"
                ),
                steps=((0.005, AMBER), (0.02, RED)),
                decimals=2,
            ),
            tile(
                "Slowest against its target",
                "The worst model's p95 duration as a share of its latency target from the inventory: over 100 "
                "% is too slow.",
                "percentunit",
                Query(
                    f"max({p95('llm_gateway_request_duration')} / on (model) "
                    f"model:llm_objective_latency_seconds:target{{{MODEL}}})"
                ),
                steps=((0.9, AMBER), (1, RED)),
                decimals=0,
            ),
            tile(
                "Smallest budget left",
                "The least of what is left of the thirty-day error budgets. 100 % is untouched, below 0 overdrawn.",
                "percentunit",
                Query(f"min(slo:error_budget_remaining:ratio{{{MODEL}}})"),
                base=RED,
                steps=((0, AMBER), (0.25, GREEN)),
                decimals=0,
            ),
        ],
    )


def levels() -> Row:
    return Row(
        "Service levels",
        [
            alerts(
                "Pending and firing",
                "Pending and firing alerts of this suite. Each has a runbook; a silence whose comment begins with "
                "“ack” stops the escalation.",
                'suite="citadel", severity!="info"',
                size=(8, 9),
            ),
            table(
                "Levels and budgets",
                "Availability, time to the first token, and latency of each model: share of bad requests in "
                "the last hour and "
                "in thirty days, how fast the budget burns (1 uses it up in exactly thirty days), and what is "
                "left of it.",
                {"model": "Model", "slo": "Indicator"},
                Column(
                    "Bad, 1 h",
                    f"max by (model, slo) (slo:sli_error:ratio_rate1h{{{MODEL}}})",
                    "percentunit",
                    decimals=2,
                ),
                Column(
                    "Bad, 30 d",
                    f"max by (model, slo) (slo:sli_error:ratio_rate30d{{{MODEL}}})",
                    "percentunit",
                    decimals=2,
                ),
                Column(
                    "Burn rate", f"max by (model, slo) (slo:burn_rate:ratio1h{{{MODEL}}})", "none", BURN, decimals=2
                ),
                Column(
                    "Budget left",
                    f"min by (model, slo) (slo:error_budget_remaining:ratio{{{MODEL}}})",
                    "percentunit",
                    ((0, AMBER), (0.25, GREEN)),
                    RED,
                    0,
                ),
                size=(16, 9),
                sort=("Budget left", False),
            ),
            lines(
                "Burn rate of the error budgets",
                "Errors of the last hour over what the objective allows. 14.4 for an hour, or 6 for six "
                "hours, wakes somebody.",
                "none",
                Query(f"slo:burn_rate:ratio1h{{{MODEL}}}", "{{model}} {{slo}}"),
                size=(12, 8),
                paints=[dash(" ttft$"), dot(" latency$")],
                steps=((1, AMBER), (6, RED)),
            ),
            lines(
                "Error budget left",
                "Of the last thirty days. The steeper it falls, the sooner changes have to stop.",
                "percentunit",
                Query(f"slo:error_budget_remaining:ratio{{{MODEL}}}", "{{model}} {{slo}}"),
                size=(12, 8),
                paints=[dash(" ttft$"), dot(" latency$")],
                high=1,
                low=None,
            ),
        ],
    )


def traffic() -> Row:
    target = f"model:llm_objective_latency_seconds:target{{{MODEL}}}"
    reasons = "{{model}} {{reason}}"
    return Row(
        "Traffic and failures",
        [
            lines(
                "Requests",
                "Requests a second of each model (model:llm_gateway_requests:rate5m).",
                "reqps",
                Query(f"model:llm_gateway_requests:rate5m{{{MODEL}}}", "{{model}}"),
                stack=True,
            ),
            lines(
                "Requests by outcome",
                "By HTTP status, timeout, and clients that left (client_closed).",
                "reqps",
                Query(f"sum by (code) (model_code:llm_gateway_requests:rate5m{{{MODEL}}})", "{{code}}"),
                stack=True,
                paints=[paint("^2", GREEN), paint("^4", AMBER), paint("^(5|timeout)", RED), paint("client", GREY)],
            ),
            lines(
                "Failure ratio",
                "Share of 5xx and timeouts. The objective of availability allows 0.5 %.",
                "percentunit",
                Query(f"model:llm_gateway_errors:ratio_rate5m{{{MODEL}}}", "{{model}}"),
                steps=((0.005, RED),),
                high=0.01,
            ),
            lines(
                "Duration, p95",
                "95 % of the requests took no longer; dashed: the target from the inventory (llm_models, "
                "targets.latency_ms).",
                "s",
                Query(p95("llm_gateway_request_duration"), "{{model}}"),
                Query(target, "{{model}} target"),
                paints=[dash(" target$")],
            ),
            lines(
                "Time to the first token, p95",
                "Of streams, from the complete request. The objective: 95 % within a second.",
                "s",
                Query(p95("llm_gateway_time_to_first_token"), "{{model}}"),
                steps=((1, RED),),
            ),
            lines(
                "Mean duration",
                "Sum of durations over their number, five minutes. Far below the p95: a few are slow; near "
                "it: all are.",
                "s",
                Query(f"model:llm_gateway_request_duration_seconds:mean_rate5m{{{MODEL}}}", "{{model}}"),
            ),
            lines(
                "Shed",
                "Refused by the queue: full, wait, deadline, evicted, expired, limit.",
                "reqps",
                Query(f"model_reason:llm_gateway_shed:rate5m{{{MODEL}}}", reasons),
                size=(6, 7),
            ),
            lines(
                "Over a limit",
                "Refused by a limit of the user: his own doing, and no failure.",
                "reqps",
                Query(f"model_reason:llm_gateway_ratelimited:rate5m{{{MODEL}}}", reasons),
                size=(6, 7),
            ),
            lines(
                "Failures of backends",
                "What an engine did wrong, before any retry: connect, reset, timeout, bad_reply, status.",
                "reqps",
                Query(f"model_reason:llm_gateway_upstream_errors:rate5m{{{MODEL}}}", reasons),
                size=(6, 7),
            ),
            lines(
                "Retries and fallbacks",
                "Sent again to another backend, or handed on to another model.",
                "reqps",
                Query(f"model:llm_gateway_retries:rate5m{{{MODEL}}}", "{{model}} retries"),
                Query(f"model_to:llm_gateway_fallbacks:rate5m{{{MODEL}}}", "{{model}} to {{to_model}}"),
                size=(6, 7),
                paints=[dash(" to ")],
            ),
            lines(
                "Clients that left",
                "Share of requests whose client closed first. It rises before complaints do.",
                "percentunit",
                Query(f"model:llm_gateway_closed_by_client:ratio_rate5m{{{MODEL}}}", "{{model}}"),
                size=(12, 7),
            ),
            lines(
                "Requests by tier",
                "Requests of known users by tier, all outcomes.",
                "reqps",
                Query("sum by (tier) (tier_outcome:llm_gateway_requests:rate5m)", "{{tier}}"),
                size=(12, 7),
                stack=True,
            ),
        ],
    )


def saturation() -> Row:
    return Row(
        "Saturation",
        [
            bars(
                "Load against the target",
                "Requests a minute over what the inventory says the model is to serve (targets.requests_per_minute).",
                "percentunit",
                Query(
                    f"60 * model:llm_gateway_requests:rate5m{{{MODEL}}}"
                    f" / on (model) (model:llm_objective_requests_per_minute:target{{{MODEL}}} > 0)",
                    "{{model}}",
                ),
                high=1,
                steps=FULL,
            ),
            lines(
                "In flight",
                "Requests that a model is working on, as the gateway counts them.",
                "none",
                Query(f"model:llm_gateway_inflight_requests:sum{{{MODEL}}}", "{{model}}"),
            ),
            lines(
                "Waiting in the gateway",
                "Requests that wait for a slot. A queue that grows for minutes is shed before it helps anybody.",
                "none",
                Query(f"model:llm_gateway_queue_length:sum{{{MODEL}}}", "{{model}}"),
            ),
            lines(
                "KV cache",
                "Share in use. When it is full, vLLM preempts: the work of the youngest requests is thrown away.",
                "percentunit",
                Query(f"model:llm_engine_kv_cache_usage:ratio{{{MODEL}}}", "{{model}}"),
                size=(6, 8),
                high=1,
                steps=((0.9, RED),),
                absent=NO_ENGINE,
            ),
            lines(
                "Preemptions",
                "A second. Any that last mean that the KV cache is too small for what is admitted.",
                "ops",
                Query(f"model:llm_engine_preemptions:rate5m{{{MODEL}}}", "{{model}}"),
                size=(6, 8),
                absent=NO_ENGINE,
            ),
            lines(
                "Waiting in the engine",
                "Requests that vLLM has taken and not begun.",
                "none",
                Query(f"model:llm_engine_waiting_requests:sum{{{MODEL}}}", "{{model}}"),
                size=(6, 8),
                absent=NO_ENGINE,
            ),
            lines(
                "Wait for a slot, p95",
                "In the gateway's queue; dashed: in the engine's. Below 0.3 s vLLM's figure is interpolated.",
                "s",
                Query(p95("llm_gateway_queue"), "{{model}}"),
                Query(p95("llm_engine_queue"), "{{model}} engine"),
                size=(6, 8),
                paints=[dash(" engine$")],
            ),
        ],
    )


def engines() -> Row:
    def worst(name: str) -> str:
        return f"max by (model) ({name}{{{MODEL}}})"

    return Row(
        "Engines",
        [
            table(
                "Each engine",
                "Each model's engine as systemd, the canary and the gateway see it.",
                {"model": "Model"},
                Column("Scraped", worst("model:llm_engine_up:min"), "none", words=UP),
                Column("Backends", worst("model:llm_gateway_backend_up:min"), "none", words=UP),
                Column("Backends up", worst("model:llm_gateway_backend_up:sum"), "none"),
                Column(
                    "Circuit",
                    worst("model:llm_gateway_circuit_state:max"),
                    "none",
                    words=((0, "closed", GREEN), (1, "half open", AMBER), (2, "open", RED)),
                ),
                Column(
                    "Takes requests",
                    worst("model:llm_gateway_draining:max"),
                    "none",
                    words=((0, "yes", GREEN), (1, "draining", AMBER)),
                ),
                Column("Canary", worst("model:citadel_engine_canary_seconds:max"), "s", ((5, AMBER), (15, RED))),
                Column(
                    "Canaries failed", worst("model:citadel_engine_canary_failures:max"), "none", ((1, AMBER), (2, RED))
                ),
                Column(
                    "OOM kills, 1 h", worst("model:citadel_unit_oom_kills:increase1h"), "none", ((1, RED),), decimals=0
                ),
                Column("Cores", worst("model:citadel_unit_cpu_cores:rate5m"), "none", decimals=1),
                Column("Memory", worst("model:citadel_unit_memory_bytes:sum"), "bytes", decimals=1),
                Column(
                    "Engine errors",
                    worst("model:llm_engine_failed_requests:ratio_rate5m"),
                    "percentunit",
                    ((0.01, RED),),
                    decimals=2,
                ),
                size=(24, 7),
                absent=NO_ENGINE,
            ),
            lines(
                "Cores in use",
                "CPU of the whole unit citadel-llm@MODEL, all its processes.",
                "none",
                Query(f"model:citadel_unit_cpu_cores:rate5m{{{MODEL}}}", "{{model}}"),
                absent=NO_ENGINE,
            ),
            lines(
                "Memory",
                "Memory of the whole unit, page cache that is charged to it included.",
                "bytes",
                Query(f"model:citadel_unit_memory_bytes:sum{{{MODEL}}}", "{{model}}"),
                absent=NO_ENGINE,
            ),
            lines(
                "Time between tokens, p95",
                "What a reader of a stream feels (vllm:inter_token_latency_seconds or its older name).",
                "s",
                Query(p95("llm_engine_inter_token_latency"), "{{model}}"),
                absent=NO_ENGINE,
            ),
            lines(
                "Tokens",
                "Generated tokens a second; dashed: tokens of prompts.",
                "none",
                Query(f"model:llm_engine_generation_tokens:rate5m{{{MODEL}}}", "{{model}}"),
                Query(f"model:llm_engine_prompt_tokens:rate5m{{{MODEL}}}", "{{model}} prompt"),
                paints=[dash(" prompt$")],
                absent=NO_ENGINE,
            ),
            lines(
                "Prefix cache",
                "Share of prompt tokens found in vLLM's prefix cache.",
                "percentunit",
                Query(f"model:llm_engine_prefix_cache_hits:ratio_rate5m{{{MODEL}}}", "{{model}}"),
                high=1,
                absent=NO_ENGINE,
            ),
            lines(
                "First token inside the engine, p95",
                "Without the gateway's queue: the difference to the panel above is the gateway's.",
                "s",
                Query(p95("llm_engine_time_to_first_token"), "{{model}}"),
                absent=NO_ENGINE,
            ),
            lines(
                "How requests end",
                "stop: the model was done; length: a limit cut it off; abort: the client left; error: the "
                "engine failed.",
                "reqps",
                Query(
                    f"sum by (finished_reason) (model_reason:llm_engine_finished_requests:rate5m{{{MODEL}}})",
                    "{{finished_reason}}",
                ),
                size=(12, 7),
                stack=True,
                paints=[
                    paint("stop", GREEN),
                    paint("length", BLUE),
                    paint("abort", GREY),
                    paint("error|repetition", RED),
                ],
                absent=NO_ENGINE,
            ),
            lines(
                "Requests running",
                "Sequences that vLLM works on at the same time; the limit is max_num_seqs of the model.",
                "none",
                Query(f"model:llm_engine_running_requests:sum{{{MODEL}}}", "{{model}}"),
                size=(12, 7),
                absent=NO_ENGINE,
            ),
        ],
    )


def hosts() -> Row:
    def by_host(name: str) -> Query:
        return Query(f"{name}{{{HOST}}}", "{{instance}}")

    network = [
        Query(f"instance:node_network_receive_bytes:rate5m{{{HOST}}}", "{{instance}} in"),
        Query(f"instance:node_network_transmit_bytes:rate5m{{{HOST}}}", "{{instance}} out"),
    ]
    space = Query(f"instance_mountpoint:node_filesystem_used:ratio{{{HOST}}}", "{{instance}} {{mountpoint}}")
    return Row(
        "Hosts",
        [
            lines(
                "CPU",
                "Share of all cores at work.",
                "percentunit",
                by_host("instance:node_cpu_utilisation:rate5m"),
                size=(6, 7),
                high=1,
                steps=((0.9, RED),),
                absent=NO_DATA,
            ),
            lines(
                "Load per core",
                "Processes that run or wait, per core, one minute.",
                "none",
                by_host("instance:node_load1_per_core:ratio"),
                size=(6, 7),
                steps=((1.5, RED),),
                absent=NO_DATA,
            ),
            lines(
                "Memory of the hosts",
                "Share that is not available.",
                "percentunit",
                by_host("instance:node_memory_used:ratio"),
                size=(6, 7),
                high=1,
                steps=((0.9, RED),),
                absent=NO_DATA,
            ),
            bars(
                "File systems",
                "Share in use of each file system that is on a disk.",
                "percentunit",
                space,
                size=(6, 7),
                high=1,
                steps=FULL,
                absent=NO_DATA,
            ),
            lines(
                "Network",
                "Bytes a second of all interfaces but lo; dashed: out.",
                "Bps",
                *network,
                size=(12, 7),
                paints=[dash(" out$")],
                absent=NO_DATA,
            ),
            lines(
                "Disk",
                "Share of the time in which the busiest disk has something to do.",
                "percentunit",
                by_host("instance:node_disk_io_time:rate5m"),
                size=(12, 7),
                high=1,
                absent=NO_DATA,
            ),
        ],
    )


def stores() -> Row:
    def by_host(name: str, more: str = "") -> Query:
        return Query(f"{name}{{{more}{HOST}}}", "{{instance}}")

    return Row(
        "Stores and gateway",
        [
            tile(
                "Redis",
                "redis_up: the store of the limits. Without it the gateway lets pass or refuses, as the site "
                "has chosen.",
                "none",
                by_host("instance:redis_up:min"),
                said=UP,
                curve=False,
                absent=NO_DATA,
            ),
            tile(
                "PostgreSQL",
                "pg_up: users, keys, ledger, feedback. Without it the gateway serves on and writes its journal.",
                "none",
                by_host("instance:pg_up:min"),
                said=UP,
                curve=False,
                absent=NO_DATA,
            ),
            tile(
                "Limits reachable",
                "1 when every worker of the gateway reaches the store of limits.",
                "none",
                by_host("instance:llm_gateway_limit_store_up:min"),
                said=UP,
                curve=False,
                absent=NO_DATA,
            ),
            tile(
                "Workers",
                "Workers of the gateway that have reported in the last five seconds.",
                "none",
                by_host("instance:llm_gateway_workers:sum"),
                base=RED,
                steps=((1, AMBER), (2, GREEN)),
                absent=NO_DATA,
            ),
            tile(
                "Lost records",
                "Records of the journal and lines of the access log that found no space, last hour. None is right.",
                "none",
                by_host("instance:llm_gateway_lost_records:increase1h"),
                steps=((1, RED),),
                decimals=0,
                absent=NO_DATA,
            ),
            tile(
                "Dropped labels",
                "Label values that became “other” because they are in no closed set, last hour: somebody asks "
                "for what is not served.",
                "none",
                by_host("instance:llm_gateway_dropped_labels:increase1h"),
                steps=((1, AMBER), (100, RED)),
                decimals=0,
                absent=NO_DATA,
            ),
            lines(
                "Answers of the store of limits, p95",
                "Every request waits for one.",
                "s",
                by_host("instance:llm_gateway_limit_store_seconds:quantile_rate5m", 'quantile="0.95", '),
                size=(6, 7),
                absent=NO_DATA,
            ),
            lines(
                "Journal behind",
                "Age of the oldest record that is not in the database yet.",
                "s",
                by_host("instance:llm_gateway_journal_lag_seconds:max"),
                size=(6, 7),
                steps=((60, AMBER), (300, RED)),
                absent=NO_DATA,
            ),
            lines(
                "Redis commands",
                "A second.",
                "ops",
                by_host("instance:redis_commands:rate5m"),
                size=(6, 7),
                absent=NO_DATA,
            ),
            bars(
                "Shares in use",
                "Redis: memory of maxmemory. PostgreSQL: connections of max_connections.",
                "percentunit",
                Query(f"instance:redis_memory_used:ratio{{{HOST}}}", "{{instance}} Redis memory"),
                Query(f"instance:pg_connections:ratio{{{HOST}}}", "{{instance}} SQL connections"),
                size=(6, 7),
                high=1,
                steps=FULL,
                absent=NO_DATA,
            ),
            lines(
                "Connections of clients",
                "Open at the gateway.",
                "none",
                by_host("instance:llm_gateway_connections:sum"),
                size=(12, 7),
                absent=NO_DATA,
            ),
            lines(
                "Size of the databases",
                "All databases of the server together.",
                "bytes",
                by_host("instance:pg_database_size_bytes:sum"),
                size=(12, 7),
                absent=NO_DATA,
            ),
        ],
    )


def itself() -> Row:
    return Row(
        "The monitoring itself",
        [
            table(
                "Scrapes",
                "Share of the targets of each job that answer, what the largest brings, and how long the "
                "slowest takes.",
                {"job": "Job"},
                Column("Up", f"min by (job) (job:up:avg{{{JOB}}})", "percentunit", ((0.5, AMBER), (1, GREEN)), RED, 0),
                Column(
                    "Samples",
                    f"max by (job) (job:scrape_samples:max{{{JOB}}})",
                    "short",
                    ((20_000, AMBER), (50_000, RED)),
                ),
                Column("Time", f"max by (job) (job:scrape_duration_seconds:max{{{JOB}}})", "s", ((2, AMBER), (8, RED))),
                size=(12, 9),
                absent=NO_DATA,
                sort=("Up", False),
            ),
            lines(
                "Targets up",
                "Each job and host; 0 is a scrape that failed.",
                "none",
                Query(f"job_instance:up:min{{{JOB}, {HOST}}}", "{{job}} {{instance}}"),
                size=(12, 9),
                high=1,
                absent=NO_DATA,
            ),
            tile(
                "Rules failing",
                "Evaluations of our rules that failed within fifteen minutes.",
                "none",
                Query("sum(rule_group:prometheus_rule_evaluation_failures:increase15m)"),
                size=(6, 5),
                steps=((1, RED),),
                decimals=0,
                absent=NO_DATA,
            ),
            tile(
                "Alerts not handed over",
                "Alerts that Prometheus could not give to Alertmanager within fifteen minutes.",
                "none",
                Query("platform:prometheus_notifications_failed:increase15m"),
                size=(6, 5),
                steps=((1, RED),),
                decimals=0,
                absent=NO_DATA,
            ),
            lines(
                "Messages not delivered",
                "By the way they go, within fifteen minutes: mail, Slack, PagerDuty, webhook.",
                "none",
                Query("integration:alertmanager_notifications_failed:increase15m", "{{integration}}"),
                size=(6, 5),
                absent=NO_DATA,
            ),
            lines(
                "Escalations",
                "Alerts that nobody acknowledged in time, by the level they went to, within a day.",
                "none",
                Query("platform:citadel_escalations:increase1d", "level {{level}}"),
                size=(6, 5),
                absent="none",
            ),
        ],
    )


def gpus() -> Row:
    def by_gpu(name: str) -> Query:
        return Query(f"{name}{{{HOST}}}", "{{instance}} {{gpu}}")

    return Row(
        "GPUs (sites that have some)",
        [
            lines(
                "GPU",
                "Share of the time in which a kernel runs.",
                "percentunit",
                by_gpu("instance_gpu:gpu_utilisation:ratio"),
                size=(6, 7),
                high=1,
                absent="no GPU",
            ),
            lines(
                "GPU memory",
                "Share in use.",
                "percentunit",
                by_gpu("instance_gpu:gpu_memory_used:ratio"),
                size=(6, 7),
                high=1,
                absent="no GPU",
            ),
            lines(
                "Temperature",
                "Of each GPU.",
                "celsius",
                by_gpu("instance_gpu:gpu_temperature_celsius:max"),
                size=(6, 7),
                steps=((85, RED),),
                absent="no GPU",
            ),
            lines(
                "Power",
                "From the energy counter.",
                "watt",
                by_gpu("instance_gpu:gpu_power_watts:rate5m"),
                size=(6, 7),
                absent="no GPU",
            ),
        ],
        collapsed=True,
    )
