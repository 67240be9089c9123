"""Global ids: the names under which PostgreSQL lists a vote that has been prepared.

The name is all that is told of a prepared transaction, so it says whose vote it is::

    amends1 | store | saga | step | round | incarnation | request

- *store* and *incarnation* are UUIDs, written as 22 characters of base64url. What is no UUID is
  written as it is, behind a ``~``, which no base64url begins with.
- *saga* and *step* are written as they are, so that a person finds them; any character that the
  id of a saga cannot have is percent-encoded.
- *request* is the beginning of the request's hash, 8 characters of base64url. It tells a repeated
  request from another one with the same key while the vote's row, in which the whole hash lies,
  cannot be read. That is a fault of a caller and no attack: 48 bits are enough.

So two votes never have one name, a name never needs quoting in SQL, and what begins with the first
five parts belongs to one life. PostgreSQL takes names of at most 199 bytes: with UUIDs, saga, step
and the round's digits may have 134 characters together.
"""

from __future__ import annotations

import base64
import hashlib
import re
import uuid
from dataclasses import dataclass
from typing import Final, Self
from urllib.parse import quote, unquote

from amends.barrier.verdict import request_hash
from amends.outcomes import Call

PREFIX: Final = "amends1|"
"""What all of our names begin with; the number is that of their format."""

MAX_BYTES: Final = 199
"""PostgreSQL keeps them in 200 bytes, the last of which is 0."""

REQUEST_BYTES: Final = 6
"""Of the request's hash; 8 characters of base64url."""

_SAFE: Final = re.compile(r"[A-Za-z0-9._~:/%|-]+")
"""All characters of our names: none of them means anything inside an SQL literal."""

_REQUEST: Final = re.compile(r"[A-Za-z0-9_-]{8}")

_PARTS: Final = 7


@dataclass(frozen=True, slots=True)
class VoteLife:
    """Which vote: one (store, saga, step, round)."""

    store_id: str
    saga_id: str
    step: str
    round: int

    @classmethod
    def of(cls, call: Call) -> Self:
        """Give the life that a call is about."""
        return cls(call.store_id, call.saga_id, call.step, call.round)

    @property
    def prefix(self) -> str:
        """What the names of this life's prepared transactions begin with; no other's do."""
        parts = (_short(self.store_id), _plain(self.saga_id), _plain(self.step), str(self.round))
        return f"{PREFIX}{'|'.join(parts)}|"

    @property
    def lock(self) -> int:
        """Number of the advisory lock by which one life is held: signed, 64 bits.

        Two lives that share one by chance only keep each other waiting.
        """
        digest = hashlib.sha256(b"amends vote " + self.prefix.encode()).digest()
        return int.from_bytes(digest[:8], signed=True)


@dataclass(frozen=True, slots=True)
class GlobalId:
    """What a prepared transaction's name says."""

    life: VoteLife
    incarnation: str
    request: str
    """The beginning of the request's hash, in base64url."""

    @classmethod
    def of(cls, call: Call) -> Self:
        """Give the name for what a Prepare prepares."""
        return cls(VoteLife.of(call), call.incarnation, short_hash(request_hash(call)))

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Read a name; ``None`` if it is not one of ours."""
        parts = text.split("|")
        if not text.startswith(PREFIX) or len(parts) != _PARTS:
            return None
        _, store, saga, step, number, incarnation, request = parts
        if not _REQUEST.fullmatch(request):
            return None
        try:
            life = VoteLife(_long(store), unquote(saga), unquote(step), int(number))
            read = cls(life, _long(incarnation), request)
        except ValueError:
            return None
        # One that is written otherwise than we write it was not written by us.
        return read if str(read) == text else None

    def __str__(self) -> str:
        return f"{self.life.prefix}{_short(self.incarnation)}|{self.request}"

    @property
    def fits(self) -> bool:
        """Whether PostgreSQL takes it."""
        return len(str(self)) <= MAX_BYTES

    @property
    def literal(self) -> str:
        """The name as an SQL literal; PREPARE TRANSACTION and its kind take no parameters."""
        text = str(self)
        assert _SAFE.fullmatch(text), "nothing in a name may end the literal"
        return f"'{text}'"


def short_hash(digest: bytes) -> str:
    """Give the beginning of a request's hash, as names carry it."""
    return base64.urlsafe_b64encode(digest[:REQUEST_BYTES]).decode()


def _plain(text: str) -> str:
    return quote(text, safe=":/")


def _short(text: str) -> str:
    try:
        number = uuid.UUID(text)
    except ValueError:
        number = None
    if number is None or str(number) != text:
        return f"~{_plain(text)}"
    return base64.urlsafe_b64encode(number.bytes).rstrip(b"=").decode()


def _long(text: str) -> str:
    """Undo `_short`. Raises `ValueError`."""
    if text.startswith("~"):
        return unquote(text[1:])
    return str(uuid.UUID(bytes=base64.b64decode(f"{text}==", altchars=b"-_", validate=True)))
