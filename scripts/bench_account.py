"""The account of a benchmark: what loads were told, what the store has, what was done.

Three parties say what became of the sagas, and none knows what the others say: the loads, which
were told of each end; the store; and the participant, which counts the effects of each step of each
saga. An account is settled when all three say the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from amends_runtime.core.records import SagaState
from scripts.bench_processes import STEPS

ENDS: Final = {"refused": SagaState.COMPENSATED}
"""How the sagas of a definition end, if not COMPLETED."""

OPEN: Final = frozenset({"later"})
"""Definitions whose sagas do not end, and have no effects."""

Stored = Mapping[str, Mapping[int, int]]
"""By definition and state: sagas in a store."""

Report = Mapping[str, Mapping[str, Mapping[str, int]]]
"""What a participant reports: `done` and `undone`, see `bench_participant.Ledger.report`."""


def end_of(definition: str) -> SagaState:
    """How a saga of this definition is to end."""
    return ENDS.get(definition, SagaState.COMPLETED)


def pattern_of(definition: str) -> str:
    """The effects of one of its sagas, each step's count, as a participant reports them."""
    if definition.startswith("steps-"):
        count = int(definition.removeprefix("steps-"))
    else:
        count = len(STEPS) - 1 if definition == "refused" else len(STEPS)
    return " ".join("1" * count)


@dataclass
class Account:
    """What loads were told."""

    told: Counter[str] = field(default_factory=Counter)
    """Sagas by definition."""
    naive: int = 0
    """Pieces of naive work, whose effects are those of `bench`."""
    is_certain: bool = True
    """Whether a start that a load was not told of has certainly not happened."""

    def faults(self, stored: Stored, report: Report) -> list[str]:
        """What does not agree, in words."""
        return [
            fault
            for definition in sorted({*self.told, *stored, *report["done"], *report["undone"]})
            for fault in (
                *self._against_store(definition, stored.get(definition, {})),
                *self._against_effects(definition, stored.get(definition, {}), report),
            )
        ]

    def _against_store(self, definition: str, states: Mapping[int, int]) -> list[str]:
        told, total = self.told[definition], sum(states.values())
        expected = SagaState.RUNNING if definition in OPEN else end_of(definition)
        faults = []
        if set(states) - {expected}:
            named = {SagaState(state).name: count for state, count in states.items()}
            faults.append(f"{definition}: the store has {named}, all were to be {expected.name}")
        # A start whose answer was lost may have happened: then the store has more.
        if told > total or (self.is_certain and told != total):
            faults.append(f"{definition}: loads were told of {told} sagas, the store has {total}")
        return faults

    def _against_effects(
        self, definition: str, states: Mapping[int, int], report: Report
    ) -> list[str]:
        end = end_of(definition)
        sagas = states.get(end, 0) + (self.naive if definition == "bench" else 0)
        whole = {pattern_of(definition): sagas} if sagas and definition not in OPEN else {}
        faults = []
        for kind, expected in (
            ("done", whole),
            ("undone", whole if end is SagaState.COMPENSATED else {}),
        ):
            found = report[kind].get(definition, {})
            if found != expected:
                faults.append(
                    f"{definition}: sagas by their effects {kind}: {found} instead of {expected}"
                )
        return faults
