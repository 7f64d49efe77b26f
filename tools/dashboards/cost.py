"""Cost: what it costs, for what, and what to change. The advice is computed by recording_recommendations.yml."""

from tools.dashboards.panels import (
    AMBER,
    BLUE,
    GREEN,
    GREY,
    MODEL,
    RED,
    VIOLET,
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

USD = "currencyUSD"


def build() -> Json:
    return dashboard("cost", [at_a_glance(), advice(), where(), efficiency()], last="7d", refresh="5m")


def at_a_glance() -> Row:
    return Row(
        "At a glance",
        [
            tile(
                "Cost an hour",
                "US dollars, of the chosen models: hardware at work, energy, tokens.",
                USD,
                Query(f"sum(model:llm_gateway_cost_usd_per_hour:rate1h{{{MODEL}}})"),
                decimals=2,
            ),
            tile(
                "Cost in a day",
                "US dollars of the last 24 hours, the whole platform.",
                USD,
                Query("platform:llm_gateway_cost_usd:increase1d"),
                decimals=2,
            ),
            tile(
                "Dearest million tokens",
                "US dollars for a million tokens, in and out: the dearest of the chosen models.",
                USD,
                Query(f"max(model:llm_gateway_cost_usd_per_megatoken:ratio_rate1h{{{MODEL}}})"),
                decimals=2,
            ),
            tile(
                "Idle in a day",
                "US dollars for hardware that did nothing in the last day.",
                USD,
                Query(f"sum(model:llm_recommendation_idle_usd_per_day:product{{{MODEL}}})"),
                steps=((10, AMBER), (50, RED)),
                decimals=2,
                absent="no data",
            ),
            tile(
                "Budget of the day",
                "US dollars that may be spent (budget_usd of the policies).",
                USD,
                Query('period:llm_budget_usd:max{period="day"}'),
                curve=False,
                decimals=0,
                absent="no budget",
            ),
            tile(
                "Budget used",
                "Of the day's and of the month's budget.",
                "percentunit",
                Query("period:llm_budget_used:ratio", "{{period}}"),
                steps=((0.8, AMBER), (1, RED)),
                decimals=0,
                curve=False,
                absent="no budget",
            ),
        ],
    )


def advice() -> Row:
    def of(name: str) -> str:
        return f"max by (model) ({name}{{{MODEL}}})"

    return Row(
        "What to change",
        [
            table(
                "The right model",
                "Price of an answer that satisfies: cost of a request over the share of ratings above 4. "
                "Moved to the cheapest model, "
                "the satisfied requests of a day would save so much: an upper bound, since some questions "
                "need the larger model.",
                {"model": "Model"},
                Column(
                    "Advice",
                    of("model:llm_recommendation_cheapest:bool"),
                    "none",
                    words=((0, "-", GREY), (1, "cheapest", GREEN)),
                ),
                Column(
                    "Satisfaction",
                    of("model:llm_feedback_satisfaction:mean1d"),
                    "none",
                    ((6, AMBER), (7, GREEN)),
                    RED,
                    1,
                ),
                Column("A request", of("model:llm_recommendation_usd_per_request:ratio1d"), USD, decimals=5),
                Column(
                    "A satisfied request",
                    of("model:llm_recommendation_usd_per_satisfied_request:ratio1d"),
                    USD,
                    decimals=5,
                ),
                Column(
                    "Saved by moving, a day",
                    of("model:llm_recommendation_move_saving_usd_per_day:product"),
                    USD,
                    ((1, AMBER),),
                    decimals=2,
                ),
                size=(14, 7),
                absent="few ratings",
                sort=("A satisfied request", False),
            ),
            bars(
                "Idle hardware",
                "US dollars a day for hardware that a model holds while it has nothing to do. Give it back, "
                "or share it.",
                USD,
                Query(f"model:llm_recommendation_idle_usd_per_day:product{{{MODEL}}}", "{{model}}"),
                size=(10, 7),
                steps=((5, AMBER), (20, RED)),
                absent="no data",
            ),
            table(
                "The right size",
                "Cores: what 95 % of the week stayed below, and a quarter more. Memory: the week's peak and a "
                "sixth more. Spare can be "
                "given back (llm_models: cores, memory); below 0 the model is short.",
                {"model": "Model"},
                Column("Cores given", of("model:llm_given_cores:sum"), "none", decimals=0),
                Column("Cores advised", of("model:llm_recommendation_cores:ceil"), "none", decimals=0),
                Column(
                    "Cores spare",
                    of("model:llm_recommendation_cores_spare:difference"),
                    "none",
                    ((0, GREEN), (1, AMBER)),
                    RED,
                    0,
                ),
                Column("Memory given", of("model:llm_given_memory_bytes:sum"), "bytes", decimals=1),
                Column("Memory advised", of("model:llm_recommendation_memory_bytes:max7d"), "bytes", decimals=1),
                Column(
                    "Memory spare",
                    of("model:llm_recommendation_memory_spare_bytes:difference"),
                    "bytes",
                    ((0, GREEN), (4 * 2**30, AMBER)),
                    RED,
                    1,
                ),
                size=(16, 7),
                absent="no data",
                sort=("Model", False),
            ),
            alerts(
                "Alerts of cost",
                "Pending and firing: budget, cost of a request.",
                'suite="citadel", team="business"',
                size=(8, 7),
            ),
        ],
    )


def where() -> Row:
    return Row(
        "Where it goes",
        [
            lines(
                "By model",
                "US dollars an hour.",
                USD,
                Query(f"model:llm_gateway_cost_usd_per_hour:rate1h{{{MODEL}}}", "{{model}}"),
                size=(12, 8),
                stack=True,
            ),
            lines(
                "By component",
                "US dollars an hour: hardware at work, energy, tokens.",
                USD,
                Query(
                    f"sum by (component) (model_component:llm_gateway_cost_usd_per_hour:rate1h{{{MODEL}}})",
                    "{{component}}",
                ),
                size=(12, 8),
                stack=True,
                paints=[paint("hardware", BLUE), paint("energy", AMBER), paint("tokens", VIOLET)],
            ),
            lines(
                "A request",
                "US dollars, mean of an hour.",
                USD,
                Query(f"model:llm_gateway_cost_usd_per_request:ratio_rate1h{{{MODEL}}}", "{{model}}"),
            ),
            lines(
                "A million tokens",
                "US dollars, in and out.",
                USD,
                Query(f"model:llm_gateway_cost_usd_per_megatoken:ratio_rate1h{{{MODEL}}}", "{{model}}"),
            ),
            lines(
                "Cost in a day against the budget",
                "US dollars of the last 24 hours, and what a day may cost.",
                USD,
                Query("platform:llm_gateway_cost_usd:increase1d", "cost"),
                Query('period:llm_budget_usd:max{period="day"}', "budget"),
                paints=[paint("^cost$", BLUE), paint("^budget$", RED, dashed=True)],
            ),
        ],
    )


def efficiency() -> Row:
    return Row(
        "What a dollar buys",
        [
            lines(
                "Tokens out for a dollar",
                "What the same money buys of each model.",
                "short",
                Query(f"model:llm_gateway_tokens_per_usd:ratio_rate1h{{{MODEL}}}", "{{model}}"),
                size=(6, 8),
            ),
            lines(
                "Tokens per core and second",
                "Generated tokens over the cores in use.",
                "none",
                Query(f"model:llm_engine_tokens_per_core_second:ratio_rate5m{{{MODEL}}}", "{{model}}"),
                size=(6, 8),
                absent="no engine",
            ),
            lines(
                "Busy",
                "Share of a day in which the engine had something to do. What is idle is paid for all the same.",
                "percentunit",
                Query(f"model:llm_engine_busy:ratio_avg1d{{{MODEL}}}", "{{model}}"),
                size=(6, 8),
                high=1,
                absent="no engine",
            ),
            lines(
                "Prompt tokens from cache",
                "Share that was not computed again.",
                "percentunit",
                Query(f"model:llm_gateway_cached_tokens:ratio_rate5m{{{MODEL}}}", "{{model}}"),
                size=(6, 8),
                high=1,
            ),
            lines(
                "Price of an idle hour",
                "US dollars for the hardware of an hour in which the model does nothing.",
                USD,
                Query(f"model:llm_gateway_idle_usd_per_hour:sum{{{MODEL}}}", "{{model}}"),
                absent="no data",
            ),
            lines(
                "Cores: used, given",
                "Of the whole unit; dashed: what the inventory gives it.",
                "none",
                Query(f"model:citadel_unit_cpu_cores:rate5m{{{MODEL}}}", "{{model}}"),
                Query(f"model:llm_given_cores:sum{{{MODEL}}}", "{{model}} given"),
                paints=[dash(" given$")],
                absent="no engine",
            ),
            lines(
                "Forecast of the cost",
                "US dollars an hour, mean of a day: what it was, and what the predictor said of that day a "
                "week before.",
                USD,
                Query("avg_over_time(platform:llm_gateway_cost_usd_per_hour:rate1h[1d])", "cost"),
                Query(
                    'max(target:llm_forecast_value:max{target="cost", horizon="7d", quantile="0.5"} offset 7d)',
                    "said a week before",
                ),
                paints=[paint("^cost$", BLUE), paint("^said", AMBER, dashed=True)],
            ),
        ],
    )
