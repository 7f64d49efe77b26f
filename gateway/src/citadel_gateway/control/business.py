"""What answers are worth, by the operator's own rules (`values` of policies.json).

A rule says what an outcome is worth for a use case, or for all of them. Two kinds of value are kept apart. *Realised*:
somebody has said by feedback what became of a request. *Estimated*: the outcome `served` is reserved, and its rule says
what a request is expected to be worth that was answered. They are two views of the same requests and never added up.
"""

from collections.abc import Iterable, Sequence

from citadel_gateway.records import Settled
from citadel_gateway.settings import Model, Policies
from citadel_gateway.snapshot import Snapshot

SERVED = "served"
OTHER = "other"

FEEDBACK = "llm_feedback_total"
SATISFACTION = "llm_feedback_satisfaction"
VALUE = "llm_business_value_usd_total"


class Rules:
    """The outcomes that exist, their values, and the closed sets of labels."""

    def __init__(self, policies: Policies, models: Iterable[Model]) -> None:
        self.values = {(rule.use_case, rule.outcome): rule.usd for rule in policies.values}
        self.use_cases = frozenset(policies.use_cases)
        self.models = frozenset(model.name for model in models)
        self.outcomes = tuple(sorted({rule.outcome for rule in policies.values} - {SERVED} | {OTHER}))
        self.estimates = any(rule.outcome == SERVED for rule in policies.values)

    @classmethod
    def of(cls, snapshot: Snapshot | None) -> "Rules":
        return cls(snapshot.policies, snapshot.models) if snapshot is not None else cls(Policies(), ())

    def value(self, outcome: str, use_case: str) -> float:
        """USD. The rule of the use case goes before the one for all."""
        return self.values.get((use_case, outcome), self.values.get(("", outcome), 0.0)) if outcome else 0.0

    def model(self, name: str) -> str:
        return name if name in self.models else OTHER

    def use_case(self, name: str) -> str:
        return name if name in self.use_cases else OTHER


Count = tuple[str, tuple[str, ...], float]  # name, labels, how much more


def realised(rules: Rules, model: str, use_case: str, change: float) -> list[Count]:
    """A counter cannot go back: what a correction takes away is counted as lost, and realised less lost is exact."""
    if not change:
        return []
    kind = "realised" if change > 0 else "lost"
    return [(VALUE, (rules.model(model), rules.use_case(use_case), kind), abs(change))]


def estimated(rules: Rules, records: Sequence[Settled]) -> list[Count]:
    """What requests that have just been settled are expected to be worth."""
    if not rules.estimates:
        return []
    sums: dict[tuple[str, str, str], float] = {}
    for record in records:
        usd = rules.value(SERVED, record.use_case) if record.outcome == "ok" else 0.0
        if usd > 0:
            labels = (rules.model(record.model), rules.use_case(record.use_case), "estimated")
            sums[labels] = sums.get(labels, 0.0) + usd
    return [(VALUE, labels, usd) for labels, usd in sums.items()]
