"""`SagaUnderTest`: one saga of a test, with what callers and operators ask of it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Final

import amends
from amends_runtime.actors.supervisor import Supervisor
from amends_runtime.actors.view import SagaView
from amends_runtime.core.records import SagaState
from amends_runtime.core.saga import Answer, StepStatus, remaining_steps
from amends_runtime.testing.refusals import as_a_client_gets_them, refused
from amends_runtime.testing.world import World

__all__ = ["AT_REST", "SagaUnderTest", "named"]

_SOMEBODY: Final = "a test"
AT_REST: Final = frozenset(
    (
        SagaState.COMPLETED,
        SagaState.COMPENSATED,
        SagaState.ABANDONED,
        SagaState.MIXED,
        SagaState.STUCK,
    )
)
"""Where a saga moves no more by itself, or waits for an operator."""


class SagaUnderTest:
    """A saga of a `SagaTest`, by its id, as `amends.SagaHandle` is of a client.

    What changes is asked for by methods: an attribute that a test has compared once, type checkers
    take for unchanged.
    """

    def __init__(
        self, saga_id: str, world: World, drive: Callable[[Callable[[], bool], str], None]
    ) -> None:
        self.saga_id = saga_id
        """Its id."""
        self._world = world
        self._drive = drive

    def __repr__(self) -> str:
        return f"<SagaUnderTest {self.saga_id!r}: {self.get().state}>"

    def get(self) -> amends.Saga:
        """The saga as it is durable now."""
        return self._world.readings.shown(self.saga_id)

    def step(self, name: str) -> amends.Step:
        """One of its steps. Raises KeyError, which names the steps that there are."""
        return self.get().step(name)

    def history(self) -> tuple[amends.Record, ...]:
        """Its records, oldest first."""
        return self._world.readings.history(self.saga_id)

    # -- going on ------------------------------------------------------------------------------

    def result(self) -> amends.Saga:
        """Run it to its end, or until it is stuck.

        Raises `NotEnded`, which says where it stands, when that does not come about.
        """
        self._until(lambda: self._core_state() in AT_REST, "was to end")
        return self.get()

    def run_until(self, state: amends.SagaState) -> None:
        """Go on until the saga is in this state, and stop exactly there. Raises `NotEnded`.

        For a condition of yours there is `SagaTest.run_until`.
        """
        if not isinstance(state, amends.SagaState):
            raise TypeError(
                f"run_until of a saga takes an amends.SagaState, not {type(state).__name__}; "
                "for a condition of yours there is run_until of the SagaTest"
            )
        wanted = SagaState[state.name]
        self._until(lambda: self._core_state() is wanted, f"was to be {state}")

    def run_until_step(self, step: str, state: amends.StepState) -> None:
        """Go on until a step is in this state, and stop exactly there. Raises `NotEnded`.

        A step is EXECUTING before its call leaves, and EXECUTED when that is durable.
        """
        self.step(step)  # or a name that there is not would be waited for
        readings, wanted = self._world.readings, StepStatus[state.name]
        number = readings.plan(self.saga_id).number_of[step]
        self._until(
            lambda: readings.saga(self.saga_id).steps[number].status is wanted,
            f"was to have step {step!r} {state}",
        )

    # -- what operators and callers ask of it --------------------------------------------------

    def cancel(
        self, *, reason: str = "the test cancels it", author: str = _SOMEBODY
    ) -> amends.CancelResult:
        """Turn it back if it still can be; as `amends.Client.cancel`, but waits for no pivot.

        Raises `amends.WrongState`.
        """
        view, answer = self._ask(
            lambda supervisor: supervisor.cancel_saga(self.saga_id, author, reason)
        )
        if answer.name not in amends.CancelDisposition.__members__:
            raise refused(view, answer)
        return amends.CancelResult(self.get(), amends.CancelDisposition[answer.name])

    def retry(
        self,
        *,
        step: str | None = None,
        author: str = _SOMEBODY,
        reason: str = "the test retries it",
    ) -> amends.Saga:
        """Let an operator try a stuck step again, or all that are; as `amends.Client.retry`.

        Raises `amends.WrongState` if nothing is stuck.
        """
        view, answer = self._ask(
            lambda supervisor: supervisor.retry_saga(self.saga_id, step, author, reason)
        )
        if answer is not Answer.RETRIED:
            raise refused(view, answer)
        return self.get()

    def abandon(
        self,
        *,
        author: str = _SOMEBODY,
        reason: str = "the test abandons it",
        force: bool = False,
    ) -> amends.Abandoned:
        """Let an operator end it as it is; as `amends.Client.abandon`.

        A two-phase commit that is not decided is aborted. Raises `amends.WrongState` if it is not
        stuck, and `force` is not given, and if a two-phase commit has decided to commit.
        """
        view, answer = self._ask(
            lambda supervisor: supervisor.abandon_saga(self.saga_id, author, reason, force=force)
        )
        if answer is Answer.ABORTED:
            return amends.Abandoned(self.get(), ())
        if answer not in (Answer.ABANDONED, Answer.ALREADY_ABANDONED):
            raise refused(view, answer)
        remaining = remaining_steps(view.plan, view.saga)
        names = tuple(view.plan.step_names[number] for number in remaining)
        return amends.Abandoned(self.get(), names)

    # -- what happened -------------------------------------------------------------------------

    @property
    def course(self) -> list[str]:
        """What participants were asked for it, in order, as ``execute charge``."""
        return [named(call) for call in self.calls]

    @property
    def calls(self) -> list[amends.Call]:
        """What participants were asked for it, in order."""
        return [call for call in self._world.outside.calls if call.saga_id == self.saga_id]

    @property
    def effects(self) -> list[str]:
        """Its steps that took effect and were not undone, in the order in which they did."""
        ledger = self._world.outside.ledger
        return [effect.step for effect in ledger if effect.saga_id == self.saga_id]

    @property
    def held(self) -> list[str]:
        """Its steps that have voted yes and were not told the decision; see `SagaTest.held`."""
        held = self._world.outside.held
        return [effect.step for effect in held if effect.saga_id == self.saga_id]

    # -- inside --------------------------------------------------------------------------------

    def _core_state(self) -> SagaState:
        return self._world.readings.saga(self.saga_id).state

    def _until(self, condition: Callable[[], bool], wanted: str) -> None:
        self._drive(condition, f"saga {self.saga_id!r} {wanted}")

    def _ask(
        self, question: Callable[[Supervisor], Coroutine[Any, Any, tuple[SagaView, Answer]]]
    ) -> tuple[SagaView, Answer]:
        with as_a_client_gets_them():
            return self._world.ask(question)


def named(call: amends.Call) -> str:
    """A call in a course, for example ``execute charge``."""
    return f"{call.verb} {call.step}"
