"""Clients: what they ask, over connections that fail, and a journal of what they were told.

The journal is the only word on what the runtime has promised to anybody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

import anyio
import msgspec

from amends_runtime.actors.supervisor import StartRequest
from amends_runtime.actors.view import SagaView
from amends_runtime.core.payload import Payload
from amends_runtime.core.saga import Answer, Saga
from amends_runtime.errors import (
    AlreadyExists,
    NotFound,
    Overloaded,
    Refusal,
    StoreError,
    Unavailable,
)
from tests.simulation.faults import Fault
from tests.simulation.runtime import Process
from tests.simulation.schedule import SagaScript

if TYPE_CHECKING:
    from amends_runtime.actors.supervisor import Supervisor
    from tests.simulation.world import World

__all__ = ["Answered", "Client", "Journal", "Request"]

T = TypeVar("T")

PATIENCE_S = 2.0  # until a request without an answer is given up
AGAIN_S = (0.02, 0.3)
LATENCY_S = (0.0002, 0.003)
LOOK_TIMES = 3
OPERATE_TIMES = 3

NO_ANSWER = (Unavailable, Overloaded, StoreError, TimeoutError)
"""What tells a client to ask again; only after Overloaded does it know that nothing was done."""


class Request(msgspec.Struct, frozen=True):
    """What was asked: the kind of fault that it counts as; an abandonment by force or not."""

    kind: Fault
    by_force: bool = False


class Answered(msgspec.Struct, frozen=True):
    """An answer to one author's request, and the saga as it was shown with it."""

    answer: Answer
    author: str
    saga: Saga


class Journal:
    """What a client was told of one saga."""

    def __init__(self, script: SagaScript) -> None:
        self.script = script
        self.content_hash = f"{script.plan.content_hash[:16]}/{script.saga_id}"
        self.asked_to_start = False
        self.asked_to_cancel = False
        self.asked_to_abandon = False
        self.acknowledged = False
        self.acknowledged_other = False
        self.refused: list[Refusal] = []
        self.requests: dict[str, Request] = {}  # of cancellations and operators, by author
        self.answers: list[Answered] = []  # to these
        self.views: list[SagaView] = []


class Client:
    """Carries out the script of one saga."""

    def __init__(self, world: World, script: SagaScript) -> None:
        self.journal = Journal(script)
        self._world = world
        self._script = script
        self._process: Process | None = None

    def begin(self) -> None:
        """Everything that it will do begins at its instant."""
        script, at, off = self._script, self._world.at, self._world.faults.off
        at(script.start_at_s, self._start)
        if script.cancel_at_s is not None and Fault.CANCEL not in off:
            at(script.cancel_at_s, self.cancel)
        if script.repeat_at_s is not None and Fault.START_REPEATED not in off:
            at(script.repeat_at_s, self._repeat)
        if script.other_at_s is not None and Fault.START_OTHER_CONTENT not in off:
            at(script.other_at_s, self._start_other)
        if script.retry_at_s is not None:
            at(script.retry_at_s, self.retry)
        if script.abandon_at_s is not None:
            at(script.abandon_at_s, self.abandon)
        for at_s in script.looks_at_s:
            at(at_s, self._look)

    # -- what it does ----------------------------------------------------------------------------

    async def _start(self) -> None:
        while not self.journal.acknowledged:
            try:
                view, _ = await self._ask("start", self._start_request())
            except NO_ANSWER as error:
                # What is stuck holds its place, and an operator comes only when all is quiet.
                is_full = isinstance(error, Overloaded) and self._world.faults.is_calm
                if is_full or not self._script.patient:
                    return
                await anyio.sleep(self._world.faults.between(*AGAIN_S))
            except Refusal as refusal:
                if not (self._refused(refusal) and self._script.patient):
                    return
                await anyio.sleep(self._world.faults.between(*AGAIN_S))
            else:
                self._acknowledged(view)
        if self._script.waits:
            await self._wait()

    async def _repeat(self) -> None:
        self._world.faults.count(Fault.START_REPEATED, self._script.saga_id)
        try:
            view, _ = await self._ask("start again", self._start_request())
        except NO_ANSWER:
            return
        except Refusal as refusal:
            self._refused(refusal)
            return
        self._acknowledged(view)

    async def _start_other(self) -> None:
        self._world.faults.count(Fault.START_OTHER_CONTENT, self._script.saga_id)
        was_acknowledged = self.journal.acknowledged
        try:
            view, _ = await self._ask("start otherwise", self._start_request(other="other"))
        except (*NO_ANSWER, AlreadyExists):
            return
        except Refusal as refusal:
            self._refused(refusal)
            return
        self.journal.acknowledged_other = True
        self.journal.views.append(view)
        if was_acknowledged:
            self._world.violation(
                "an id that is taken is refused to other content",
                f"{self._script.saga_id} was acknowledged, and so was another content",
            )

    async def cancel(self) -> None:
        """Somebody turns the saga back."""
        self._world.faults.count(Fault.CANCEL, self._script.saga_id)
        self.journal.asked_to_cancel = True
        author = self._author(Fault.CANCEL)
        try:
            view, answer = await self._ask(
                "cancel", lambda runtime: runtime.cancel_saga(self._script.saga_id, author, "test")
            )
        except (*NO_ANSWER, NotFound):
            return
        if answer is Answer.TURNED_BACK and self._script.plan.two_phase is not None:
            self._world.faults.count(Fault.CANCEL_COMMIT, self._script.saga_id)
        self._answered(view, answer, author)

    def reconnect(self) -> None:
        """Leave the runtime it is connected to: a replaced one that has nothing to write goes on.

        It believes what it last knew, and answers so.
        """
        self._process = None

    async def retry(self) -> None:
        """An operator tries again what is stuck, or waits."""
        author = self._author(Fault.RETRY)
        await self._operate(
            author,
            lambda runtime: runtime.retry_saga(
                self._script.saga_id, None, author, "test", request_id=author
            ),
        )

    async def abandon_by_force(self) -> None:
        """An operator gives the saga up, stuck or not."""
        await self._abandon(by_force=True)

    async def abandon(self) -> None:
        """An operator gives the saga up."""
        await self._abandon(by_force=self._script.by_force)

    async def _abandon(self, *, by_force: bool) -> None:
        self.journal.asked_to_abandon = True
        author = self._author(Fault.ABANDON, by_force=by_force)
        if self._world.polls_wait(self._script.saga_id):
            self._world.faults.count(Fault.POLL_WAITS, self._script.saga_id)
        await self._operate(
            author,
            lambda runtime: runtime.abandon_saga(
                self._script.saga_id, author, "test", force=by_force, request_id=author
            ),
        )

    async def _operate(
        self, author: str, request: Callable[[Supervisor], Awaitable[tuple[SagaView, Answer]]]
    ) -> None:
        """Ask until there is an answer, as the client's library does: it is one request."""
        for _ in range(OPERATE_TIMES):
            try:
                view, answer = await self._ask(author, request)
            except NotFound:
                return
            except NO_ANSWER:
                await anyio.sleep(self._world.faults.between(*AGAIN_S))
            else:
                if answer in (Answer.RETRIED, Answer.ABANDONED, Answer.ABORTED):
                    kind = self.journal.requests[author].kind
                    if self._script.plan.two_phase is not None:
                        kind = Fault.ABORT if answer is Answer.ABORTED else Fault.RETRY_COMMIT
                    self._world.faults.count(kind, self._script.saga_id)
                self._answered(view, answer, author)
                if not self._world.faults.strikes(Fault.OPERATION_REPEATED, author):
                    return
                await anyio.sleep(self._world.faults.between(*AGAIN_S))

    def _author(self, kind: Fault, *, by_force: bool = False) -> str:
        """A name of its own for everybody who asks for something."""
        requests = self.journal.requests
        author = f"{kind.name.lower()}-{len(requests)}"
        requests[author] = Request(kind, by_force)
        return author

    def _answered(self, view: SagaView, answer: Answer, author: str) -> None:
        self.journal.answers.append(Answered(answer, author, view.saga))
        self._saw(view)

    async def _wait(self) -> None:
        for _ in range(LOOK_TIMES):
            try:
                view = await self._ask(
                    "wait", lambda runtime: runtime.wait(self._script.saga_id, PATIENCE_S / 2)
                )
            except NO_ANSWER:
                continue
            except NotFound:
                self._not_found()
                return
            self._saw(view)
            if view.saga.ended:
                return

    async def _look(self) -> None:
        was_acknowledged = self.journal.acknowledged
        try:
            view = await self._ask("get", lambda runtime: runtime.view(self._script.saga_id))
        except NotFound:
            if was_acknowledged:
                self._not_found()
        except NO_ANSWER:
            return
        else:
            self._saw(view)

    def _start_request(
        self, other: str = ""
    ) -> Callable[[Supervisor], Awaitable[tuple[SagaView, bool]]]:
        script = self._script
        self.journal.asked_to_start = True
        request = StartRequest(
            saga_id=script.saga_id,
            definition_name=script.plan.definition.name,
            content_hash=self.journal.content_hash + other,
            input=Payload(b"input" + other.encode(), "text/plain"),
            deadline_ms=script.deadline_ms,
        )
        return lambda runtime: runtime.start_saga(request)

    # -- what it learns --------------------------------------------------------------------------

    def _refused(self, refusal: Refusal) -> bool:
        """Whether it may be otherwise later.

        Only other content, if there was any, may have taken the id; and a participant may be gone.
        """
        called = {step.participant for step in self._script.plan.steps}
        if refusal.reason == "PARTICIPANT_NOT_REGISTERED" and called.intersection(
            self._world.schedule.by_hand
        ):
            self._world.faults.count(Fault.NOT_REGISTERED, self._script.saga_id)
            self.reconnect()
            return True
        if not isinstance(refusal, AlreadyExists) or self._script.other_at_s is None:
            self.journal.refused.append(refusal)
        return False

    def _acknowledged(self, view: SagaView) -> None:
        self.journal.acknowledged = True
        self._saw(view)

    def _saw(self, view: SagaView) -> None:
        if view.saga.saga_id != self._script.saga_id:
            self._world.violation(
                "a client is told of the saga that it asked for", self._script.saga_id
            )
        self.journal.views.append(view)
        self._world.trace.add(
            "client of {} saw version {} {}",
            self._script.saga_id,
            view.version,
            view.saga.state.name,
        )

    def _not_found(self) -> None:
        self._world.violation(
            "persist before acknowledge: an acknowledged saga is never unknown",
            f"{self._script.saga_id} was acknowledged, and was said not to exist",
        )

    # -- how it asks -----------------------------------------------------------------------------

    async def _ask(self, what: str, request: Callable[[Supervisor], Awaitable[T]]) -> T:
        """Send one request. Raises what it was refused with; Unavailable and TimeoutError: unknown.

        It keeps to the process that it was last connected to, even if another one has taken over.
        """
        world = self._world
        process = self._process
        if process is None or process.is_dead:
            process = self._process = world.deployment.current
        world.trace.add("client of {}: {}", self._script.saga_id, what)
        await anyio.sleep(world.faults.between(*LATENCY_S))
        if process is None:
            raise Unavailable("nobody listens")
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        if not world.faults.strikes(Fault.CLIENT_REQUEST_LOST, what):
            _pass_on(process.handle(request), answer)
        try:
            async with asyncio.timeout(PATIENCE_S):
                reply = await answer
        except Overloaded:
            world.faults.count(Fault.OVERLOADED, self._script.saga_id)
            raise
        except TimeoutError:
            self._process = None  # a connection over which nothing comes is given up
            raise
        if world.faults.strikes(Fault.CLIENT_REPLY_LOST, what):
            raise TimeoutError
        await anyio.sleep(world.faults.between(*LATENCY_S))
        return reply


def _pass_on(reply: asyncio.Future[T], to: asyncio.Future[T]) -> None:
    def passed(reply: asyncio.Future[T]) -> None:
        error = reply.exception()
        if to.done():
            return
        if error is not None:
            to.set_exception(error)
        else:
            to.set_result(reply.result())

    reply.add_done_callback(passed)
