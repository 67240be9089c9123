"""The port between the wire and a barrier."""

from __future__ import annotations

from typing import Any, Protocol

from amends.handler import Handler
from amends.outcomes import Call, Outcome


class Barrier(Protocol):
    """What stands between the wire and the handlers.

    One with a true attribute ``completes_votes`` (see `completes_votes`) answers Execute and
    Compensate by itself, and is given no handler for them.
    """

    transaction_types: tuple[type[Any], type[Any]]
    """What `def` and `async def` handlers are given as their second argument; both are
    ``NoneType`` where there is no transaction."""

    async def open(self) -> None:
        """Make ready; raises `BarrierError`. Each `open` wants its `aclose`."""
        ...

    async def run(self, call: Call, handler: Handler | None) -> Outcome:
        """Answer one call, running `handler` if the rules say so.

        `handler` is ``None`` for the compensation of an action that has none, and for the roll back
        of a vote on an action that the participant does not have; then `NotCompensatable` is raised
        if there is something to undo. An outcome that is returned is
        durable. Raises `HandlerFailed` or `BarrierError` if the outcome is unknown. May be
        cancelled at any time: what is not committed by then is rolled back or, if it no longer can
        be, committed whole.
        """
        ...

    async def aclose(self) -> None:
        """Let the calls under way end and let go of the database."""
        ...


def completes_votes(barrier: object) -> bool:
    """Tell whether a barrier commits and rolls back by itself what a vote has prepared.

    Such a barrier's participant has `prepare` handlers alone; Execute and Compensate of an action
    that can be prepared are the barrier's.
    """
    return getattr(barrier, "completes_votes", False) is True
