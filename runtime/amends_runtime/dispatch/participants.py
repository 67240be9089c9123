"""Which participants there are: those of the configuration, and over them those of operators.

How to think about it. An operator's word is durable and stands until it is taken back, whatever
the configuration says meanwhile; what it is about is then where the configuration has it, or
nowhere. A lane follows only what is durable:

1. Changes are made one after another, in a task of the runtime's own: a caller who leaves in the
   middle leaves no lane behind that is elsewhere than the store says.
2. A change whose commit failed may have happened. The store has reopened by then, and the lane
   follows what it says.
3. A participant that was called with TLS is never called in plain text, whoever moves it and
   whatever is left of its section in the configuration. Where its TLS files are missing its calls
   wait, until the files are named again or an operator takes the participant back.
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
from amends_runtime.errors import (
    CommitUnknown,
    FieldViolation,
    InvalidRequest,
    NotFound,
    Overloaded,
    StoreError,
    WrongState,
)
from amends_runtime.ports import Clock, OperatorWords, ParticipantAddress, Store

__all__ = ["Participants"]

_log = structlog.get_logger(__name__)

READ_AGAIN_S: Final = 0.05
"""A reopened store is back after a checkpoint."""
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
            if self._lacks_tls(name):
                _log.warning(
                    "participant_lacks_tls",
                    participant=name,
                    address=held.address,
                    why="it was called with TLS, and its section of the configuration names no"
                    " tls_ca: its calls wait, because they never leave in plain text",
                    hint=_give_tls(name),
                )
            elif not said:
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

    def why_unconnected(self, name: str) -> str:
        """Why the calls of a participant wait that is registered; empty if nothing keeps them."""
        if not self._lacks_tls(name):
            return ""
        return f"NO_TLS: it was called with TLS, and no tls_ca is left for it: {_give_tls(name)}"

    def _has_tls(self, name: str) -> bool:
        configured = self._configured.get(name)
        return configured is not None and configured.tls

    def _lacks_tls(self, name: str) -> bool:
        held = self._by_operator.get(name)
        return held is not None and held.tls and not self._has_tls(name)

    async def put(
        self, name: str, address: str, author: str, reason: str, *, request_id: str = ""
    ) -> None:
        """Registers a participant, or points it elsewhere, durably; its lane has followed then.

        Safe to cancel: what was asked for happens all the same, once for each `request_id`. Raises
        StoreError, after which it may have happened, and asking again is safe; Overloaded;
        InvalidRequest and WrongState where it would have to be called in plain text, see rule 3.
        """
        await self._ask(name, address, author, reason, request_id)

    async def remove(self, name: str, author: str, reason: str, *, request_id: str = "") -> None:
        """Takes back what an operator registered; as `put`.

        Raises WrongState if it is only configured, NotFound if nobody has registered it.
        """
        await self._ask(name, "", author, reason, request_id)

    async def run(self) -> None:
        """Makes the changes, for as long as the runtime lives."""
        await self._keep_tls()
        while True:
            while not self._changes:
                self._something_to_change = anyio.Event()
                await self._something_to_change.wait()
            change = self._changes.popleft()
            try:
                await self._make(change.name, change.address, change.words)
            except Exception as error:  # noqa: BLE001  # one change's failure is its caller's to hear
                if not change.done.done():
                    change.done.set_exception(error)
            else:
                if not change.done.done():
                    change.done.set_result(None)

    async def _ask(
        self, name: str, address: str, author: str, reason: str, request_id: str
    ) -> None:
        if len(self._changes) >= MAX_CHANGES:
            raise Overloaded(
                "PARTICIPANT_CHANGES",
                f"{MAX_CHANGES} changes of participants wait to be written, which is the limit:"
                " nothing was changed; try again shortly",
                retry_after_ms=200,
                metadata={"limit": str(MAX_CHANGES)},
            )
        words = OperatorWords(author, reason, self._clock.now_ms(), request_id)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._changes.append(_Change(name, address, words, done))
        self._something_to_change.set()
        await done

    async def _keep_tls(self) -> None:
        """Writes down who is called with TLS only since its configuration says so."""
        for name, held in sorted(self._by_operator.items()):
            if self._has_tls(name) and not held.tls and not _is_unix(held.address):
                why = "its configuration has TLS since it was registered"
                words = OperatorWords("amends serve", why, self._clock.now_ms())
                try:
                    await self._make(name, held.address, words)
                except StoreError as error:  # it is called with TLS all the same
                    _log.error("tls_not_kept", participant=name, error=str(error))

    async def _make(self, name: str, address: str, words: OperatorWords) -> None:
        try:
            if address:
                self._check_tls(name, address)
                await self._store.put_participant(name, address, words, tls=self._has_tls(name))
            elif not await self._store.remove_participant(name, words):
                raise self._not_registered(name)
        except CommitUnknown:
            await self._follow_store(name)
            raise
        # What the store says and not what was asked for: a repeat may come after a later change.
        await self._follow_store(name)
        _log.info(
            "participant_changed",
            participant=name,
            address=self._where(name),
            by_operator=name in self._by_operator,
            author=words.author,
        )

    async def _follow_store(self, name: str) -> None:
        """The lane goes where the store says, as soon as that can be read."""
        held: dict[str, ParticipantAddress] | None = None
        while held is None:
            try:
                held = {one.name: one for one in await self._store.participants()}
            except StoreError as error:  # it is being reopened, or this runtime ends
                _log.warning("participants_cannot_be_read", participant=name, error=str(error))
                await anyio.sleep(READ_AGAIN_S)
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

    def _where(self, name: str) -> str:
        held = self._by_operator.get(name)
        return self.configured_address(name) if held is None else held.address

    def _check_tls(self, name: str, address: str) -> None:
        """Raises where a participant would have to be called in plain text; see rule 3."""
        if self._has_tls(name) and _is_unix(address):
            raise InvalidRequest(
                "INVALID_REQUEST",
                [
                    FieldViolation(
                        "address",
                        f"participant {name!r} is called with TLS, and Unix sockets have none:"
                        " give it a host:port that its certificate is for, or take tls_ca out of"
                        f" [participants.{name}] and restart",
                    )
                ],
            )
        if self._lacks_tls(name):
            raise WrongState(
                "TLS_FILES_MISSING",
                f"participant {name!r} was called with TLS, and no tls_ca is left for it, so it was"
                f" not moved: it would be called in plain text; {_give_tls(name)}",
                {"participant": name},
            )

    def _not_registered(self, name: str) -> NotFound | WrongState:
        said = self.configured_address(name)
        if said:
            return WrongState(
                "NOT_BY_OPERATOR",
                f"participant {name!r} is where the configuration has it, at {said}; no operator"
                " has moved it, so there is nothing to take back: to remove it, take it out of the"
                " configuration and restart",
                {"participant": name},
            )
        return NotFound(
            "UNKNOWN_PARTICIPANT",
            f"there is no participant {name!r} that an operator registered; those that there are:"
            " amends participants",
            {"participant": name},
        )


def _is_unix(address: str) -> bool:
    return address.startswith("unix:")


def _give_tls(name: str) -> str:
    return (
        f"name tls_ca under [participants.{name}] again and restart; or, if it is to be called in"
        f" plain text from now on, amends participants remove {name}, then add it anew"
    )
