"""The plan of a soak: which sagas there are, how their clients behave, and who is killed when.

What is soaked is a `Trade`: orders of the shop (`soak_orders.py`) or transfers of its bank
(`soak_transfers.py`). Everything is drawn from one seed.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import amends
from scripts.soak_victims import ProcessVictim, Victim
from shop.processes import Process, Processes

JOURNAL_NAME: Final = "journal.jsonl"

RUNTIME: Final = "amends"
"""The runtime's process."""

AGAIN_KILLS: Final = 0.15
"""The share of the runtime's kills that strike it while it comes up from the one before."""

AGAIN_WITHIN_S: Final = 1.5
"""About what a start takes, so that such a kill strikes any part of one."""

KILL_DELAY_S: Final = 0.03
"""At most so long after the news: longer than a step, so that any part of one can be struck."""

LAST_NEWS: Final = 0.95
"""No kill is planned beyond this share of the news that is certain to come."""

CANCELLED: Final = 0.04

CANCEL_WITHIN_S: Final = 0.2

HURRIED: Final = 0.04

FORGETFUL: Final = 0.15

IMPATIENT: Final = 0.03

PATIENCE_S: Final = (0.001, 0.02)
"""Around what a start takes: some are acknowledged, and of some nobody ever hears."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """What clients do, by the share of their errands."""

    hurried: float = HURRIED
    """Have a deadline of their own."""
    deadline_s: tuple[float, float] = (0.02, 0.3)
    """From, to."""


@dataclass(frozen=True, slots=True)
class Errand:
    """One saga, and how its client behaves."""

    saga_id: str
    definition: str
    input: Mapping[str, object]
    entry: Mapping[str, object]
    """What the journal is told of it."""
    deadline_s: float | None
    cancel_after_s: float | None
    patience_s: float | None
    """How long an impatient client tries to start it; None: until it is acknowledged."""
    is_forgetful: bool

    @classmethod
    def drawn(
        cls,
        saga_id: str,
        definition: str,
        content: Mapping[str, object],
        entry: Mapping[str, object],
        dice: random.Random,
        *,
        behaviour: Behaviour,
    ) -> Errand:
        """Draw how the client of a saga behaves."""
        return cls(
            saga_id=saga_id,
            definition=definition,
            input=content,
            entry=entry,
            deadline_s=(
                dice.uniform(*behaviour.deadline_s) if dice.random() < behaviour.hurried else None
            ),
            cancel_after_s=dice.uniform(0, CANCEL_WITHIN_S) if dice.random() < CANCELLED else None,
            patience_s=dice.uniform(*PATIENCE_S) if dice.random() < IMPATIENT else None,
            is_forgetful=dice.random() < FORGETFUL,
        )

    @property
    def certain_news(self) -> int:
        """How many pieces of news there will be of it, whatever happens."""
        if self.patience_s is not None:
            return 0
        return 1 if self.is_forgetful else 2


@dataclass(frozen=True, slots=True)
class Kill:
    """A process that is killed `delay_s` after the client's news number `after_news`."""

    after_news: int
    delay_s: float
    victim: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What an auditor found."""

    sagas: int
    completed: int
    compensated: int
    unknown_starts: int
    effects: Mapping[str, int]
    by_participant: Sequence[tuple[str, int]]
    """The same effects by who has them."""
    violations: int
    lines: Sequence[str]
    """For people."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """What only this trade has, for the last line."""


NOTHING_FOUND: Final = Findings(
    sagas=0,
    completed=0,
    compensated=0,
    unknown_starts=0,
    effects={},
    by_participant=(),
    violations=0,
    lines=(),
)
"""Of a run that left nothing to audit."""


class Trade(ABC):
    """What is soaked."""

    mode: str
    """What `--mode` calls it."""
    participants: Sequence[str]
    unary_of_both: Sequence[str]
    """Who is called by the unary verbs where both ways are used; the others have streams."""
    killed: Sequence[str]
    """What is killed besides the runtime."""
    participant_kills: float = 0.3
    """The share of kills that strike one of these; the others strike the runtime."""
    settings: str = ""
    """TOML of the runtime's configuration, beside its addresses."""

    @abstractmethod
    def definitions(self) -> Sequence[amends.Definition]:
        """Give what has to be registered."""

    @abstractmethod
    def errand(self, seed: int, number: int) -> Errand:
        """Draw one saga, and how its client behaves."""

    @abstractmethod
    def switches(self) -> dict[str, Any]:
        """Say what goes wrong, by participant; see `shop.switches`."""

    @abstractmethod
    def planned_faults(self) -> list[str]:
        """Name everything that a long run must have seen, as `Tally.faults` counts it."""

    @abstractmethod
    async def start(self, processes: Processes) -> Sequence[Process]:
        """Start the participants, in their order."""

    def victims(self, processes: Processes) -> Sequence[Victim]:
        """Give everything that can be killed, the runtime too."""
        return [ProcessVictim(process) for process in processes.all]

    def noted(self, saga: amends.Saga) -> Sequence[str]:
        """Name what is worth counting in how a saga has ended."""
        return ()

    def rests_s(self, saga: amends.Saga) -> float:
        """Say how long a client rests after such an end, before it begins anything else."""
        return 0.0

    def looks(self, sagas: int) -> int:
        """Say how often the books are looked at while so many sagas run."""
        return 0

    @abstractmethod
    def audit(self, folder: Path) -> Findings:
        """Compare the books with the journal, when everything has ended and nothing runs.

        Raises `OSError`, `ValueError` and what its databases raise; see `unreadable`.
        """

    def look(self, processes: Processes) -> list[str]:
        """Look at the books at a moment at which no saga is under way; give what is wrong.

        Raises as `audit` does, for example where a database was killed in this moment.
        """
        return []

    unreadable: tuple[type[Exception], ...] = (OSError, ValueError)
    """What `audit` and `look` raise when there is nothing that could be read."""

    def unary_of(self, transport: str) -> Sequence[str]:
        """Name those that are called by the unary verbs, by `--transport`."""
        by_transport: dict[str, Sequence[str]] = {
            "auto": (),
            "unary": self.participants,
            "both": self.unary_of_both,
        }
        return by_transport[transport]


TRANSPORTS: Final = ("auto", "unary", "both")


def plan_errands(trade: Trade, seed: int, sagas: int) -> list[Errand]:
    """Draw all sagas."""
    return [trade.errand(seed, number) for number in range(sagas)]


def plan_kills(trade: Trade, seed: int, kills: int, errands: Sequence[Errand]) -> list[Kill]:
    """Draw all kills, in their order; none waits for news that may not come."""
    dice = dice_of(seed, "kills")
    certain = sum(errand.certain_news for errand in errands)
    of_participants = int(kills * trade.participant_kills)
    again = int((kills - of_participants) * AGAIN_KILLS)
    victims = [trade.killed[number % len(trade.killed)] for number in range(of_participants)]
    victims += [RUNTIME] * (kills - of_participants - again)
    dice.shuffle(victims)
    moments = sorted(dice.randint(0, int(certain * LAST_NEWS)) for _ in victims)
    planned = [
        Kill(moment, dice.uniform(0, KILL_DELAY_S), victim)
        for moment, victim in zip(moments, victims, strict=True)
    ]
    for first in dice.sample([kill for kill in planned if kill.victim == RUNTIME], k=again):
        at = planned.index(first) + 1
        planned.insert(at, Kill(first.after_news, dice.uniform(0, AGAIN_WITHIN_S), RUNTIME))
    return planned


def dice_of(*what: object) -> random.Random:
    """Make a source of chance that the seed decides, another one for each purpose."""
    return random.Random("/".join(map(str, what)))  # noqa: S311  # repeatable, guards no secret
