"""Business: what it is worth, who uses it, and what is coming."""

from tools.dashboards.panels import (
    AMBER,
    ANY_MODEL,
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
    ahead,
    alerts,
    bars,
    dash,
    dashboard,
    lines,
    paint,
    table,
    tile,
    variable,
)

USD = "currencyUSD"


def forecast(quantile: str, horizon: str, target: str, more: str = "") -> str:
    return f'target:llm_forecast_value:max{{target="{target}", quantile="{quantile}", horizon="{horizon}"{more}}}'


def build() -> Json:
    return dashboard(
        "business",
        [at_a_glance(), value(), adoption(), coming()],
        last="30d",
        refresh="5m",
        variables=[
            variable("capacity", "Capacity", "label_values(target:llm_forecast_limit:max, target)", many=False),
        ],
    )


def at_a_glance() -> Row:
    return Row(
        "At a glance",
        [
            tile(
                "Value an hour",
                "US dollars realised less those lost by corrections, over a day (llm_business_value_usd_total).",
                USD,
                Query(f"sum(model:llm_business_value_usd_per_hour:rate1d{{{MODEL}}})"),
                base=RED,
                steps=((0, GREEN),),
                decimals=2,
            ),
            tile(
                "Cost an hour",
                "What requests cost: hardware, energy, tokens.",
                USD,
                Query(f"sum(model:llm_gateway_cost_usd_per_hour:rate1h{{{MODEL}}})"),
                decimals=2,
            ),
            tile(
                "Return",
                "Value over cost of the same day: below 1 the platform costs more than it brings.",
                "none",
                Query("platform:llm_business_return:ratio_rate1d"),
                base=RED,
                steps=((1, AMBER), (2, GREEN)),
                decimals=1,
            ),
            tile(
                "Value at risk an hour",
                "The usual value of an hour, times the share of requests that fail or are shed right now.",
                USD,
                Query(f"sum(model:llm_business_value_at_risk_usd_per_hour:ratio{{{MODEL}}})"),
                steps=((1, AMBER), (10, RED)),
                decimals=2,
            ),
            tile(
                "Users today",
                "Users who were served today (UTC), all hosts.",
                "none",
                Query('window:llm_gateway_active_users:max{window="day"}'),
                absent="no users",
            ),
            tile(
                "Of the week's users, today",
                "Adoption: how much of the week's users came today. A tool of every day is above 50 %.",
                "percentunit",
                Query("platform:llm_gateway_adoption:ratio"),
                base=AMBER,
                steps=((0.3, GREEN),),
                decimals=0,
                absent="no users",
            ),
        ],
    )


def value() -> Row:
    return Row(
        "Value and return",
        [
            lines(
                "Value by use case",
                "US dollars an hour realised, over a day. What an answer is worth is the operator's setting "
                "for each use case.",
                USD,
                Query("use_case:llm_business_value_usd_per_hour:rate1d", "{{use_case}}"),
                size=(12, 8),
                stack=True,
            ),
            lines(
                "Value and cost",
                "Platform: US dollars an hour. The gap between the curves is what the platform earns.",
                USD,
                Query("platform:llm_business_value_usd_per_hour:rate1d", "value"),
                Query("platform:llm_gateway_cost_usd_per_hour:rate1h", "cost"),
                size=(12, 8),
                paints=[paint("^value$", GREEN), paint("^cost$", RED)],
            ),
            lines(
                "Return by model",
                "Value over cost of the same day. Below 1 a model costs more than it brings.",
                "none",
                Query(f"model:llm_business_return:ratio_rate1d{{{MODEL}}}", "{{model}}"),
                size=(6, 8),
                steps=((1, RED),),
            ),
            lines(
                "Value by model",
                "US dollars an hour, what corrections cost taken off.",
                USD,
                Query(f"model:llm_business_value_usd_per_hour:rate1d{{{MODEL}}}", "{{model}}"),
                size=(6, 8),
            ),
            lines(
                "Estimated value",
                "US dollars an hour of answers whose worth nobody has told: the policies' estimate, in no sum "
                "elsewhere.",
                USD,
                Query(f"model:llm_business_estimated_usd_per_hour:rate1h{{{MODEL}}}", "{{model}}"),
                size=(6, 8),
                stack=True,
            ),
            lines(
                "Value at risk",
                "US dollars an hour that present failures put at risk.",
                USD,
                Query(f"model:llm_business_value_at_risk_usd_per_hour:ratio{{{MODEL}}}", "{{model}}"),
                size=(6, 8),
                stack=True,
            ),
            table(
                "Models as an investment",
                "What each model brings, costs and risks, and how content those are who use it.",
                {"model": "Model"},
                Column(
                    "Value / h",
                    f"max by (model) (model:llm_business_value_usd_per_hour:rate1d{{{MODEL}}})",
                    USD,
                    decimals=2,
                ),
                Column(
                    "Cost / h",
                    f"max by (model) (model:llm_gateway_cost_usd_per_hour:rate1h{{{MODEL}}})",
                    USD,
                    decimals=2,
                ),
                Column(
                    "Return",
                    f"max by (model) (model:llm_business_return:ratio_rate1d{{{MODEL}}})",
                    "none",
                    ((1, AMBER), (2, GREEN)),
                    RED,
                    1,
                ),
                Column(
                    "At risk / h",
                    f"max by (model) (model:llm_business_value_at_risk_usd_per_hour:ratio{{{MODEL}}})",
                    USD,
                    ((1, AMBER), (10, RED)),
                    decimals=2,
                ),
                Column(
                    "Satisfaction",
                    f"max by (model) (model:llm_feedback_satisfaction:mean1d{{{MODEL}}})",
                    "none",
                    ((6, AMBER), (7, GREEN)),
                    RED,
                    1,
                ),
                size=(16, 7),
                sort=("Value / h", True),
            ),
            alerts(
                "Alerts of the business",
                "Pending and firing: value at risk, return, budget.",
                'suite="citadel", team="business"',
                size=(8, 7),
            ),
        ],
    )


def adoption() -> Row:
    return Row(
        "Adoption",
        [
            lines(
                "Active users",
                "Users who were served today, and in the last seven days (UTC).",
                "none",
                Query("window:llm_gateway_active_users:max", "{{window}}"),
                paints=[paint("^day$", BLUE), paint("^week$", VIOLET)],
                absent="no users",
            ),
            lines(
                "Requests an hour",
                "Of each model.",
                "short",
                Query(f"model:llm_gateway_requests:increase1h{{{MODEL}}}", "{{model}}"),
                stack=True,
            ),
            lines(
                "How conversations end",
                "In a day: completed, or abandoned by their user.",
                "short",
                Query(
                    f"sum by (outcome) (model_outcome:llm_gateway_conversations:increase1d{{{MODEL}}})", "{{outcome}}"
                ),
                stack=True,
                paints=[paint("completed", GREEN), paint("abandoned", AMBER)],
            ),
            bars(
                "Budget used",
                "Of the day's and of the month's budget (platform_policies, budget_usd). Above 100 % it is overdrawn.",
                "percentunit",
                Query("period:llm_budget_used:ratio", "{{period}}"),
                size=(6, 7),
                high=1,
                steps=((0.8, AMBER), (1, RED)),
                absent="no budget",
            ),
            lines(
                "Requests by end",
                "Of known users, a second: how many get what they came for.",
                "reqps",
                Query("sum by (outcome) (tier_outcome:llm_gateway_requests:rate5m)", "{{outcome}}"),
                size=(9, 7),
                stack=True,
            ),
            lines(
                "Requests by tier",
                "Of known users, a second.",
                "reqps",
                Query("sum by (tier) (tier_outcome:llm_gateway_requests:rate5m)", "{{tier}}"),
                size=(9, 7),
                stack=True,
            ),
        ],
    )


def coming() -> Row:
    capacity = 'target="$capacity", ' + ANY_MODEL

    def share(quantile: str) -> str:
        return (
            f"max by (horizon_days) (max by (target, model, horizon_days) (target:llm_forecast_value:max{{{capacity}, "
            f'horizon_days=~".+", quantile="{quantile}"}})'
            f" / on (target, model) group_left () max by (target, model) (target:llm_forecast_limit:max{{{capacity}}}))"
        )

    return Row(
        "What is coming",
        [
            lines(
                "Requests: forecast beside actual",
                "Thick: what came. Dashed: what the predictor said of that moment a day before.",
                "reqps",
                Query(f"model:llm_gateway_requests:rate5m{{{MODEL}}}", "{{model}}"),
                Query(
                    f"max by (model) ({forecast('0.5', '1d', 'requests', ', ' + MODEL)} offset 1d)",
                    "{{model}} forecast",
                ),
                size=(12, 9),
                paints=[dash(" forecast$")],
            ),
            lines(
                "Cost: forecast beside actual",
                "US dollars an hour of the platform; dashed: said a day before, with the range that was to "
                "hold four times of five.",
                USD,
                Query("platform:llm_gateway_cost_usd_per_hour:rate1h", "cost"),
                Query(f"max({forecast('0.5', '1d', 'cost')} offset 1d)", "forecast"),
                Query(f"max({forecast('0.1', '1d', 'cost')} offset 1d)", "low"),
                Query(f"max({forecast('0.9', '1d', 'cost')} offset 1d)", "high"),
                size=(12, 9),
                paints=[
                    paint("^cost$", BLUE),
                    paint("^forecast$", AMBER, dashed=True),
                    paint("^(low|high)$", GREY, dashed=True),
                ],
            ),
            ahead(
                "Capacity in the next thirty days",
                "The forecast of the chosen target as a share of its limit, for the model that is nearest to "
                "it; four of five "
                "days are to lie between low and high. At 100 % it is exhausted.",
                "percentunit",
                Query(share("0.5"), "expected"),
                Query(share("0.1"), "low"),
                Query(share("0.9"), "high"),
                steps=((0.8, AMBER), (1, RED)),
                size=(12, 9),
            ),
            table(
                "Days until the limit",
                "When the forecast reaches the limit: early (one in ten), expected, late (nine in ten). "
                "Empty: not within the horizon.",
                {"target": "Target", "model": "Model"},
                *(
                    Column(
                        title,
                        "min by (target, model) "
                        f'(target:llm_forecast_limit_eta_seconds:min{{quantile="{quantile}", {ANY_MODEL}}} < Inf)',
                        "s",
                        ((7 * 86_400, AMBER), (21 * 86_400, GREEN)),
                        RED,
                        1,
                    )
                    for title, quantile in (("Early", "0.1"), ("Expected", "0.5"), ("Late", "0.9"))
                ),
                size=(12, 9),
                absent="beyond",
                sort=("Expected", False),
            ),
        ],
    )
