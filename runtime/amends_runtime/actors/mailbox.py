"""A saga's mailbox: what has reached it and has not been decided yet.

Bounded. Requests from outside are refused when it is full; replies, withdrawals and wake-ups never
are, for a saga can have only as many of those as it has steps.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import msgspec

from amends_runtime.actors.view import Told
from amends_runtime.core.definition import Plan
from amends_runtime.core.messages import Message
from amends_runtime.errors import Overloaded

__all__ = ["Envelope", "Mailbox", "MailboxStatistics"]


class Envelope(msgspec.Struct, frozen=True, eq=False):
    """A message, and who is to be told what came of it once that is durable.

    A start also brings the plan that the saga will be pinned to, should it not exist yet.
    """

    message: Message
    sender: asyncio.Future[Told] | None = None
    plan: Plan | None = None

    def tell(self, told: Told) -> None:
        """Answers the sender, unless it has left."""
        if self.sender is not None and not self.sender.done():
            self.sender.set_result(told)

    def fail(self, error: Exception) -> None:
        """Tells the sender that the message came to nothing, or to nothing certain."""
        if self.sender is not None and not self.sender.done():
            self.sender.set_exception(error)


class MailboxStatistics(NamedTuple):
    """How full a mailbox is."""

    depth: int
    capacity: int


class Mailbox:
    """First in, first out. `messages` are those that wait, oldest first; others only read them.

    A list, though its first element is what is taken: there is hardly ever a second one, and an
    empty deque is 624 bytes.
    """

    __slots__ = ("_capacity", "messages")

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self.messages: list[Envelope] = []

    def put_nowait(self, envelope: Envelope) -> None:
        """Takes a message in.

        Raises Overloaded for one from outside that finds it full.
        """
        if envelope.sender is not None and len(self.messages) >= self._capacity:
            raise Overloaded(
                "MAILBOX_FULL",
                f"{len(self.messages)} messages wait for this saga, which is the limit"
                f" ([limits] mailbox): nothing was done; try again in a second",
                retry_after_ms=1_000,
                metadata={"limit": str(self._capacity)},
            )
        self.messages.append(envelope)

    def put_back(self, envelope: Envelope) -> None:
        """Undoes a `take_nowait`: the message is the next one again."""
        self.messages.insert(0, envelope)

    def take_nowait(self) -> Envelope:
        """The oldest message. Raises IndexError when there is none."""
        return self.messages.pop(0)

    def __len__(self) -> int:
        return len(self.messages)

    def drain(self) -> list[Envelope]:
        """All messages, oldest first; the mailbox is empty then."""
        drained, self.messages = self.messages, []
        return drained

    def statistics(self) -> MailboxStatistics:
        """How full it is."""
        return MailboxStatistics(len(self.messages), self._capacity)
