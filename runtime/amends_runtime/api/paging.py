"""Pages: how many items fit into one, and where the next begins.

A page ends at its count or before `PAGE_BYTES`, whichever comes first, so that a response always
fits gRPC's usual 4 MiB. A token says where the next page begins and of which question it is a page;
with another question it is refused, because its answer would be neither the one nor the other.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import itertools
from collections.abc import Iterable
from typing import Annotated, Final, TypeVar

import msgspec
from google.protobuf.message import Message

__all__ = [
    "PAGE_BYTES",
    "BadPageToken",
    "Question",
    "fitting",
    "question",
    "token_for",
    "token_from",
]

PAGE_BYTES: Final = 3 * 1024 * 1024
"""One item may be a little over 1 MiB, so a page stays below 4 MiB at the client's default."""
MAX_TOKEN_CHARS: Final = 256
"""Ours have some 60."""

Question = bytes
"""What a listing was asked, hashed."""

Item = TypeVar("Item", bound=Message)


class BadPageToken(ValueError):
    """A page token is not ours, or of another question."""


class _Token(msgspec.Struct, frozen=True, array_like=True):
    question: Question
    position: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


_decoder = msgspec.msgpack.Decoder(_Token)


def question(kind: str, *conditions: object) -> Question:
    """What is asked: the kind of listing and all of its conditions, in canonical order."""
    return hashlib.sha256(msgspec.msgpack.encode((kind, conditions))).digest()[:16]


def token_for(asked: Question, position: int) -> str:
    """The token of the page that begins there; what the number means is the listing's business."""
    packed = msgspec.msgpack.encode(_Token(asked, position))
    return base64.urlsafe_b64encode(packed).decode().rstrip("=")


def token_from(asked: Question, token: str) -> int:
    """The position that a token holds. Raises BadPageToken, whose text says why it holds none."""
    foreign = (
        "it is not a page token of this method: pass next_page_token of the page before, or nothing"
    )
    if len(token) > MAX_TOKEN_CHARS:
        raise BadPageToken(foreign)
    try:
        packed = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        found = _decoder.decode(packed)
    except (binascii.Error, ValueError, msgspec.DecodeError):
        raise BadPageToken(foreign) from None
    if found.question != asked:
        raise BadPageToken(
            "it belongs to another listing: a page token goes with the very same filter and id as"
            " the page before; begin anew without one"
        )
    return found.position


def fitting(items: Iterable[Item], count: int) -> list[Item]:
    """The first items, at most so many, that fit a page together; one always does."""
    page: list[Item] = []
    room = PAGE_BYTES
    for item in itertools.islice(items, count):
        room -= item.ByteSize() + 8  # its tag and length
        if page and room < 0:
            break
        page.append(item)
    return page
