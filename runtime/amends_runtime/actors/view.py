"""What others are shown of a saga: its durable state, and what came of a message to it."""

from __future__ import annotations

import msgspec

from amends_runtime.core.definition import Plan
from amends_runtime.core.saga import Answer, Saga

__all__ = ["SagaView", "Told"]


class SagaView(msgspec.Struct, frozen=True):
    """A saga as it is durable, with the definition that it is pinned to.

    A `quarantined` one is shown as stuck: deciding failed `MAX_CRASHES` times running, and nothing
    moves before a restart, which tries again with what may be a mended program.
    """

    plan: Plan
    saga: Saga
    version: int
    quarantined: bool = False


class Told(msgspec.Struct, frozen=True):
    """What a sender is told: what its message came to, and the saga after it."""

    answer: Answer | None
    view: SagaView
