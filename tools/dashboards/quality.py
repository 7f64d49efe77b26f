"""Quality: are the answers right, the people content, the days usual, and the forecasts as good as they say?"""

from tools.dashboards.panels import (
    AMBER,
    ANY_MODEL,
    BLUE,
    GREEN,
    GREY,
    MODEL,
    RED,
    Column,
    Json,
    Query,
    Row,
    alerts,
    dashboard,
    lines,
    paint,
    table,
    tile,
    variable,
)

TARGET = 'target=~"$target"'


def build() -> Json:
    return dashboard(
        "quality",
        [at_a_glance(), answers(), conversations(), anomalies(), skill()],
        last="7d",
        refresh="5m",
        variables=[variable("target", "Forecast target", "label_values(target:llm_forecast_history_days:max, target)")],
    )


def weighted(share: str, weight: str) -> str:
    """The mean of a share over models, each by its number of opinions: else the rarely asked would decide."""
    return f"sum({share}{{{MODEL}}} * on (model) {weight}{{{MODEL}}}) / (sum({weight}{{{MODEL}}}) > 0)"


def at_a_glance() -> Row:
    return Row(
        "At a glance",
        [
            tile(
                "Accuracy, all",
                "Share of votes that say “correct”, over a day, each model by its number of votes.",
                "percentunit",
                Query(weighted("model:llm_feedback_accuracy:ratio_rate1d", "model:llm_feedback_votes:increase1d")),
                base=RED,
                steps=((0.8, AMBER), (0.9, GREEN)),
                decimals=1,
                absent="no votes",
            ),
            tile(
                "Satisfaction, all",
                "Mean of the ratings from 1 to 10, over a day.",
                "none",
                Query(weighted("model:llm_feedback_satisfaction:mean1d", "model:llm_feedback_ratings:increase1d")),
                base=RED,
                steps=((6, AMBER), (7, GREEN)),
                decimals=1,
                absent="no ratings",
            ),
            tile(
                "Low ratings, all",
                "Share of ratings of 4 and less, over a day.",
                "percentunit",
                Query(
                    weighted(
                        "model:llm_feedback_satisfaction_low:ratio_rate1d", "model:llm_feedback_ratings:increase1d"
                    )
                ),
                steps=((0.15, AMBER), (0.3, RED)),
                decimals=1,
                absent="no ratings",
            ),
            tile(
                "Votes and ratings",
                "Opinions in a day: below some thirty a model, shares say little.",
                "none",
                Query(
                    f"sum(model:llm_feedback_votes:increase1d{{{MODEL}}}) + "
                    f"sum(model:llm_feedback_ratings:increase1d{{{MODEL}}})"
                ),
                base=AMBER,
                steps=((60, GREEN),),
                decimals=0,
                absent="none",
            ),
            tile(
                "Conversations open",
                "Not over yet, all hosts.",
                "none",
                Query("platform:llm_gateway_conversations_open:max"),
                absent="none",
            ),
            tile(
                "Anomalies now",
                "Series in which two independent detectors agree that something is unusual.",
                "none",
                Query(f"count(target:llm_anomaly_detectors:count{{{TARGET}, {ANY_MODEL}}} >= 2) or vector(0)"),
                steps=((1, AMBER), (3, RED)),
            ),
        ],
    )


def answers() -> Row:
    return Row(
        "Answers",
        [
            lines(
                "Accuracy",
                "Share of votes that say “correct”, over a day.",
                "percentunit",
                Query(f"model:llm_feedback_accuracy:ratio_rate1d{{{MODEL}}}", "{{model}}"),
                low=None,
                high=1,
                steps=((0.8, RED),),
                absent="no votes",
            ),
            lines(
                "Satisfaction",
                "Mean of the ratings from 1 to 10, over a day.",
                "none",
                Query(f"model:llm_feedback_satisfaction:mean1d{{{MODEL}}}", "{{model}}"),
                low=None,
                high=10,
                steps=((6, RED),),
                absent="no ratings",
            ),
            lines(
                "Low ratings",
                "Share of ratings of 4 and less, over a day.",
                "percentunit",
                Query(f"model:llm_feedback_satisfaction_low:ratio_rate1d{{{MODEL}}}", "{{model}}"),
                steps=((0.3, RED),),
                absent="no ratings",
            ),
            table(
                "Models",
                "What is said of each model, and by how many.",
                {"model": "Model"},
                Column(
                    "Accuracy",
                    f"max by (model) (model:llm_feedback_accuracy:ratio_rate1d{{{MODEL}}})",
                    "percentunit",
                    ((0.8, AMBER), (0.9, GREEN)),
                    RED,
                    1,
                ),
                Column(
                    "Votes",
                    f"max by (model) (model:llm_feedback_votes:increase1d{{{MODEL}}})",
                    "none",
                    ((30, GREEN),),
                    AMBER,
                    0,
                ),
                Column(
                    "Satisfaction",
                    f"max by (model) (model:llm_feedback_satisfaction:mean1d{{{MODEL}}})",
                    "none",
                    ((6, AMBER), (7, GREEN)),
                    RED,
                    1,
                ),
                Column(
                    "Low",
                    f"max by (model) (model:llm_feedback_satisfaction_low:ratio_rate1d{{{MODEL}}})",
                    "percentunit",
                    ((0.15, AMBER), (0.3, RED)),
                    decimals=1,
                ),
                Column(
                    "Ratings",
                    f"max by (model) (model:llm_feedback_ratings:increase1d{{{MODEL}}})",
                    "none",
                    ((30, GREEN),),
                    AMBER,
                    0,
                ),
                Column(
                    "Given up",
                    f"max by (model) (model:llm_gateway_conversations_abandoned:ratio_rate1d{{{MODEL}}})",
                    "percentunit",
                    ((0.2, AMBER), (0.4, RED)),
                    decimals=0,
                ),
                size=(12, 8),
                absent="no votes",
                sort=("Accuracy", True),
            ),
            lines(
                "Accuracy by source",
                "user: people; judge: another model; golden: questions whose answer is known. Where they "
                "part, look at the judge.",
                "percentunit",
                Query(f"avg by (source) (model_source:llm_feedback_accuracy:ratio_rate1d{{{MODEL}}})", "{{source}}"),
                size=(12, 8),
                low=None,
                high=1,
                paints=[paint("user", BLUE), paint("judge", AMBER), paint("golden", GREEN)],
                absent="no votes",
            ),
        ],
    )


def conversations() -> Row:
    return Row(
        "Conversations",
        [
            lines(
                "Given up",
                "Share of conversations that their user abandoned, over a day.",
                "percentunit",
                Query(f"model:llm_gateway_conversations_abandoned:ratio_rate1d{{{MODEL}}}", "{{model}}"),
            ),
            lines(
                "Turns",
                "Mean number of turns of those that are over. More turns for the same end: the answers do not fit.",
                "none",
                Query(f"model:llm_gateway_conversations_turns:mean1d{{{MODEL}}}", "{{model}}"),
            ),
            lines(
                "Ended in a day",
                "By how they ended.",
                "short",
                Query(
                    f"sum by (outcome) (model_outcome:llm_gateway_conversations:increase1d{{{MODEL}}})", "{{outcome}}"
                ),
                stack=True,
                paints=[paint("completed", GREEN), paint("abandoned", AMBER)],
            ),
        ],
    )


def anomalies() -> Row:
    return Row(
        "Anomalies",
        [
            lines(
                "Scores of the detectors",
                "How unusual the last value is; 1 is each detector's threshold. The largest of each detector "
                "and target.",
                "none",
                Query(
                    f"max by (target, detector) (target_detector:llm_anomaly_score:max{{{TARGET}, {ANY_MODEL}}})",
                    "{{target}} {{detector}}",
                ),
                size=(16, 8),
                steps=((1, RED),),
                absent="no predictor",
            ),
            alerts("Alerts of quality", "Pending and firing.", 'suite="citadel", team="quality"', size=(8, 8)),
            lines(
                "Detectors that agree",
                "How many saw something within ten minutes. Two that agree raise an alert.",
                "none",
                Query(
                    f"max by (target, model) (target:llm_anomaly_detectors:count{{{TARGET}, {ANY_MODEL}}})",
                    "{{target}} {{model}}",
                ),
                steps=((2, RED),),
                bars=True,
                absent="nothing unusual",
            ),
            lines(
                "Requests against the last day",
                "In standard deviations: the detector that needs no predictor.",
                "none",
                Query(f"model:llm_gateway_requests:zscore1d{{{MODEL}}}", "{{model}}"),
                low=-3,
                high=3,
                steps=((3, RED),),
            ),
            lines(
                "Duration against the last day",
                "In standard deviations.",
                "none",
                Query(f"model:llm_gateway_request_duration_seconds:zscore1d{{{MODEL}}}", "{{model}}"),
                low=-3,
                high=3,
                steps=((3, RED),),
            ),
        ],
    )


def skill() -> Row:
    def least(name: str) -> str:
        return f"max by (target) ({name}{{{TARGET}, {ANY_MODEL}}})"

    said = f'target="requests", horizon="1d", {MODEL}'
    ahead = f'horizon="1d", {TARGET}, {ANY_MODEL}'
    return Row(
        "Skill of the forecasts",
        [
            table(
                "Forecasts",
                "How good each forecast has been on values held out: MASE below 1 is better than repeating "
                "the last season. An "
                "interval of 80 % is right when it covers 75 to 85 %.",
                {"target": "Target"},
                Column(
                    "MASE, 1 d",
                    f"max by (target) (target:llm_forecast_mase:max{{{ahead}}})",
                    "none",
                    ((0.9, AMBER), (1, RED)),
                    decimals=2,
                ),
                Column(
                    "Coverage of 80 %",
                    least("target:llm_forecast_coverage:ratio"),
                    "percentunit",
                    ((0.75, GREEN), (0.85, AMBER)),
                    AMBER,
                    0,
                ),
                Column(
                    "History",
                    f"min by (target) (target:llm_forecast_history_days:max{{{TARGET}, {ANY_MODEL}}})",
                    "d",
                    ((7, AMBER), (21, GREEN)),
                    RED,
                    0,
                ),
                Column("Age", least("target:llm_forecast_age_seconds:min"), "s", ((900, AMBER), (3600, RED))),
                size=(12, 8),
                absent="no forecast",
                sort=("MASE, 1 d", True),
            ),
            lines(
                "MASE by horizon",
                "Of the method in use, largest of each horizon's series. 1 is the seasonal naive.",
                "none",
                Query(f"max by (horizon) (target:llm_forecast_mase:max{{{TARGET}, {ANY_MODEL}}})", "{{horizon}}"),
                steps=((1, RED),),
                high=1.2,
                absent="no forecast",
                size=(6, 8),
            ),
            lines(
                "Methods in use",
                "Series by the method that won on values held out.",
                "none",
                Query(f"count by (method) (target:llm_forecast_mase:max{{{TARGET}, {ANY_MODEL}}})", "{{method}}"),
                absent="no forecast",
                stack=True,
                size=(6, 8),
            ),
            lines(
                "Requests: the interval of yesterday",
                "All models: what came, and what the predictor said of that moment a day before. Low and high "
                "are the sums of the models' bounds, which is wider than four of five.",
                "reqps",
                Query(f"sum(model:llm_gateway_requests:rate5m{{{MODEL}}})", "requests"),
                *(
                    Query(f'sum(target:llm_forecast_value:max{{{said}, quantile="{quantile}"}} offset 1d)', name)
                    for name, quantile in (("low", "0.1"), ("expected", "0.5"), ("high", "0.9"))
                ),
                size=(18, 8),
                paints=[
                    paint("^requests$", BLUE),
                    paint("^expected$", AMBER, dashed=True),
                    paint("^(low|high)$", GREY, dashed=True),
                ],
            ),
            tile(
                "Series left out",
                "More series than the predictor may watch, within an hour: raise its bound, or name fewer labels.",
                "none",
                Query("platform:llm_predictor_series_limited:increase1h"),
                size=(6, 8),
                steps=((1, AMBER),),
                decimals=0,
                absent="no predictor",
            ),
        ],
    )
