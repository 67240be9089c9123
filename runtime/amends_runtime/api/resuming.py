"""Resume tokens: where in the history of all sagas a watcher is.

A token is of one store, and of one incarnation of it. After a restore positions are given out
again, to other turns: a watcher that went on from its old one would miss some and not know it.
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Final

import msgspec

from amends_runtime.errors import WrongState
from amends_runtime.ports import StoreIdentity

__all__ = ["BadResumeToken", "Position", "check_position", "position_from", "token_of"]

MAX_TOKEN_CHARS: Final = 256
"""Ours have some 110."""


class BadResumeToken(ValueError):
    """A resume token is not ours, or of another store."""


class Position(msgspec.Struct, frozen=True, array_like=True):
    """Up to where a watcher has been told everything."""

    store_id: str
    incarnation: str
    seq: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


_decoder = msgspec.msgpack.Decoder(Position)


def token_of(identity: StoreIdentity, seq: int) -> str:
    """The token of a position in this store."""
    packed = msgspec.msgpack.encode(Position(identity.store_id, identity.incarnation, seq))
    return base64.urlsafe_b64encode(packed).decode().rstrip("=")


def position_from(identity: StoreIdentity, token: str) -> Position:
    """The position that a token holds. Raises BadResumeToken, whose text says why it holds none."""
    foreign = "it is not a resume token: pass resume_token of a response before, or nothing"
    if len(token) > MAX_TOKEN_CHARS:
        raise BadResumeToken(foreign)
    try:
        packed = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        position = _decoder.decode(packed)
    except (binascii.Error, ValueError, msgspec.DecodeError):
        raise BadResumeToken(foreign) from None
    if position.store_id != identity.store_id:
        raise BadResumeToken(
            f"it is of another store, {position.store_id[:64]}, and this runtime has"
            f" {identity.store_id}: is it the runtime that you mean? Without a token it begins now"
        )
    return position


def check_position(identity: StoreIdentity, position: Position, head_seq: int) -> int:
    """Where to go on. Raises WrongState where this store cannot go on from there."""
    mend = "look at the lists for what is the case now, and watch anew without a token"
    metadata = {"seq": str(position.seq), "head_seq": str(head_seq)}
    if position.incarnation != identity.incarnation:
        raise WrongState(
            "STORE_RESTORED",
            "the store was restored from a backup, or came from elsewhere, since this resume token"
            f" was given: what was told after the backup may not have happened; {mend}",
            metadata,
        )
    if position.seq > head_seq:
        raise WrongState(
            "RESUME_TOKEN_AHEAD",
            f"this resume token is at position {position.seq}, and the store at {head_seq}: it has"
            f" lost turns that were told, as after a restore; {mend}",
            metadata,
        )
    return position.seq
