"""Which participants there are: those of the configuration, and over them those of operators.

How to think about it. An operator's word is durable and stands until it is taken back, whatever
the configuration says meanwhile; what it is about is then where the configuration has it, or
nowhere. A lane follows only what is durable:

1. Changes are made one after another, in a task of the runtime's own: a caller who leaves in the
   middle leaves no lane behind that is elsewhere than the store says.
2. A change whose commit failed may have happened. The store has reopened by then, and the lane
   follows what it says.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Final

import anyio
import msgspec
import structlog

from amends_runtime.dispatch.lanes import Lanes
from amends_runtime.errors import CommitUnknown, NotFound, Overloaded, StoreError
from amends_runtime.ports import Clock, OperatorWords, ParticipantAddress, Store

__all__ = ["Participants"]

_log = structlog.get_logger(__name__)

MAX_CHANGES: Final = 100
"""That wait for their commit: more operators at once than any house has."""


class _Change(msgspec.Struct, frozen=True, eq=False):
    """What an operator wants; with an empty address, to take back what was registered."""

    name: str
    address: str
    words: OperatorWords
    done: asyncio.Future[None]


class Participants:
    """The registered participants, and their changes at run time. `load`, `open`, `run`."""

    def __init__(self, store: Store, lanes: Lanes, clock: Clock) -> None:
        self._store = store
        self._lanes = lanes
        self._clock = clock
        self._configured: dict[str, ParticipantAddress] = {}
        self._by_operator: dict[str, ParticipantAddress] = {}
        self._changes: deque[_Change] = deque()
        self._something_to_change = anyio.Event()

    async def load(self) -> None:
        """Reads what operators registered."""
        self._by_operator = {one.name: one for one in await self._store.participants()}

    def open(self, configured: Sequence[ParticipantAddress]) -> list[ParticipantAddress]:
        """Where every participant is; warns of each that is elsewhere than the configuration says.

        Comes after `load`.
        """
        self._configured = {one.name: one for one in configured}
        for name, held in sorted(self._by_operator.items()):
            said = self.configured_address(name)
            if not said:
                _log.info("participant_of_an_operator", participant=name, address=held.address)
            elif said != held.address:
                _log.warning(
                    "participant_held_elsewhere",
                    participant=name,
                    address=held.address,
                    configured=said,
                    why="an operator moved it, which counts until it is taken back",
                    hint=f"amends participants remove {name}",
                )
        return list((self._configured | self._by_operator).values())

    def configured_address(self, name: str) -> str:
        """Where the configuration has a participant; empty if it does not name it."""
        configured = self._configured.get(name)
        return "" if configured is None else configured.address

    async def put(self, name: str, address: str, author: str, reason: str) -> None:
        """Registers a participant, or points it elsewhere, durably; its lane has followed then.

        Safe to cancel: what was asked for happens all the same. Raises StoreError, after which it
        may have happened, and asking again is safe; Overloaded.
        """
        await self._ask(name, address, author, reason)

    async def remove(self, name: str, author: str, reason: str) -> None:
        """Takes back what an operator registered; as `put`. Raises NotFound if nobody did."""
        await self._ask(name, "", author, reason)

    async def run(self) -> None:
        """Makes the changes, for as long as the runtime lives."""
        while True:
            while not self._changes:
                self._something_to_change = anyio.Event()
                await self._something_to_change.wait()
            change = self._changes.popleft()
            try:
                await self._make(change)
            except Exception as error:  # noqa: BLE001  # one change's failure is its caller's to hear
                if not change.done.done():
                    change.done.set_exception(error)
            else:
                if not change.done.done():
                    change.done.set_result(None)

    async def _ask(self, name: str, address: str, author: str, reason: str) -> None:
        if len(self._changes) >= MAX_CHANGES:
            raise Overloaded(
                "PARTICIPANT_CHANGES",
                f"{MAX_CHANGES} changes of participants wait to be written, which is the limit:"
                " nothing was changed; try again shortly",
                retry_after_ms=200,
                metadata={"limit": str(MAX_CHANGES)},
            )
        words = OperatorWords(author, reason, self._clock.now_ms())
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._changes.append(_Change(name, address, words, done))
        self._something_to_change.set()
        await done

    async def _make(self, change: _Change) -> None:
        try:
            if change.address:
                await self._store.put_participant(change.name, change.address, change.words)
            elif not await self._store.remove_participant(change.name, change.words):
                raise self._not_registered(change.name)
        except CommitUnknown:
            await self._follow_store(change.name)
            raise
        held = ParticipantAddress(change.name, change.address, by_operator=True)
        self._follow(change.name, held if change.address else None)
        _log.info(
            "participant_changed",
            participant=change.name,
            address=change.address or self.configured_address(change.name),
            by_operator=bool(change.address),
            author=change.words.author,
        )

    async def _follow_store(self, name: str) -> None:
        try:
            held = {one.name: one for one in await self._store.participants()}
        except StoreError as error:  # it has not come back: this runtime ends, or reads it anew
            _log.error("participants_cannot_be_read", participant=name, error=str(error))
            return
        if held.get(name) != self._by_operator.get(name):
            self._follow(name, held.get(name))

    def _follow(self, name: str, held: ParticipantAddress | None) -> None:
        """The lane goes where an operator has the participant, or else where it is configured."""
        if held is not None:
            self._by_operator[name] = held
        else:
            self._by_operator.pop(name, None)
        address = held or self._configured.get(name)
        if address is not None:
            self._lanes.put(address)
        else:
            self._lanes.remove(name)

    def _not_registered(self, name: str) -> NotFound:
        said = self.configured_address(name)
        if said:
            return NotFound(
                "NOT_BY_OPERATOR",
                f"participant {name!r} is where the configuration has it, at {said}, and no"
                " operator registered it: to remove it, take it out of the configuration and"
                " restart",
                {"participant": name},
            )
        return NotFound(
            "UNKNOWN_PARTICIPANT",
            f"there is no participant {name!r} that an operator registered; those that there are:"
            " amends participants",
            {"participant": name},
        )
