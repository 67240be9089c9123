"""Which store a file is, of which epoch, and whether it was restored from a backup.

The database says which store it is, and its epoch, which every opening raises and every write
compares. The lock file beside it notes the same, and how far the history went on the disk
(`ownership.py`). Where the two do not fit, the file is not the one that was last open here: it came
from a backup or from elsewhere. So the note follows the commits, at most `NOTE_EVERY_S` behind.
"""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path
from typing import NamedTuple

import aiosqlite
import structlog

from amends_runtime.errors import OwnershipLost, StoreUnusable
from amends_runtime.ports import StoreIdentity
from amends_runtime.storage.ownership import LockNote, Ownership
from amends_runtime.storage.queries import read_queries

__all__ = ["Known", "PositionNote", "check_epoch", "check_identity", "read_identity", "take_epoch"]

_log = structlog.get_logger(__name__)

NOTE_EVERY_S = 10.0  # of turns: a backup that misses fewer is noticed after an orderly stop alone

_SQL = read_queries("sqlite")


class Known(NamedTuple):
    """What the database says of itself.

    `restored_through_no` is the number of the last saga from before the last restore, `restored`
    whether nobody has confirmed that one yet.
    """

    identity: StoreIdentity
    restored: bool
    restored_through_no: int


async def read_identity(writer: aiosqlite.Connection, path: Path) -> Known:
    """What the database says of itself. Raises StoreUnusable where it does not."""
    rows = list(await writer.execute_fetchall(_SQL["identity"]))
    if not rows:
        raise StoreUnusable(
            f"{path} has sagas and does not say which store it is: restore a backup"
        )
    store_id, incarnation, restored, epoch, through_no = rows[0]
    return Known(StoreIdentity(store_id, incarnation, epoch), bool(restored), through_no)


async def check_identity(writer: aiosqlite.Connection, path: Path, ours: StoreIdentity) -> None:
    """Raises OwnershipLost where the file that was opened anew is not `ours` any more."""
    found = (await read_identity(writer, path)).identity
    if found != ours:
        raise OwnershipLost(
            f"{path} is at epoch {found.epoch} of store {found.store_id}, and this runtime at"
            f" epoch {ours.epoch} of {ours.store_id}: another one owns it now"
        )


async def check_epoch(writer: aiosqlite.Connection, path: Path, ours: StoreIdentity) -> None:
    """Raises OwnershipLost where another runtime has begun an epoch since."""
    rows = list(await writer.execute_fetchall(_SQL["epoch"]))
    if not rows or rows[0][0] != ours.epoch:
        raise OwnershipLost(
            f"{path} is at epoch {rows[0][0] if rows else 'none'} and this runtime at"
            f" {ours.epoch}: another runtime owns it now, and this one writes no more"
        )


async def take_epoch(
    writer: aiosqlite.Connection,
    path: Path,
    ownership: Ownership,
    note: PositionNote,
    *,
    by_hand: bool,
) -> StoreIdentity:
    """Begins the next epoch, in the database and beside it, and finds out about a restore.

    The lock file knows what was last open here. Another store or incarnation, an earlier epoch,
    or a history that ends before what it has seen on the disk: the file is a copy. Where the
    lock file came back with it, only somebody can tell (`by_hand`).
    """
    if not list(await writer.execute_fetchall(_SQL["identity"])):
        await _make_identity(writer, ownership)
    found = (await read_identity(writer, path)).identity
    beside = ownership.before
    [(seq, saga_no)] = await writer.execute_fetchall(_SQL["highest_numbers"])
    if (
        not by_hand
        and beside is not None
        and (beside.store_id, beside.incarnation) == (found.store_id, found.incarnation)
        and beside.epoch <= found.epoch
        and beside.seq <= seq
    ):
        await writer.execute_fetchall(_SQL["take_ownership"])
    else:
        _log.warning(
            "store_restored",
            path=str(path),
            why="somebody says so: it was started with --restored"
            if by_hand
            else "its lock file does not know it: it came from a backup or from elsewhere",
            lock_file=str(ownership.path),
            store_id=found.store_id,
            epoch=found.epoch,
            store_id_beside=beside.store_id if beside else None,
            epoch_beside=beside.epoch if beside else None,
            seq=seq,
            seq_beside=beside.seq if beside else None,
        )
        same_store = beside is not None and beside.store_id == found.store_id
        parameters = {
            "incarnation": str(uuid.uuid4()),
            "incarnation_beside": beside.incarnation if beside and same_store else None,
            "epoch_beside": beside.epoch if beside and same_store else 0,
            "saga_no": saga_no,
        }
        await writer.execute_fetchall("BEGIN IMMEDIATE")
        await writer.execute_fetchall(_SQL["keep_incarnations"], parameters)
        await writer.execute_fetchall(_SQL["mark_restored"], parameters)
        await writer.execute_fetchall("COMMIT")
    identity = (await read_identity(writer, path)).identity
    note.write(identity, seq)
    return identity


async def _make_identity(writer: aiosqlite.Connection, ownership: Ownership) -> None:
    """A new store gets its ids, or one whose first opening was cut short.

    The lock file has them first: killed in between, the next opening makes others; in the other
    order it would take the file for a restored one.
    """
    note = LockNote(os.getpid(), str(uuid.uuid4()), str(uuid.uuid4()), 0)
    ownership.write(note)
    ownership.before = note
    parameters = {
        "store_id": note.store_id,
        "incarnation": note.incarnation,
        "now_ms": time.time_ns() // 1_000_000,
    }
    await writer.execute_fetchall(_SQL["create_meta"], parameters)


class PositionNote:
    """What the lock file is told of how far the history goes on the disk."""

    def __init__(self, path: Path, ownership: Ownership) -> None:
        self._path = path
        self._ownership = ownership
        self.seq = 0
        """What it was told last."""
        self.due_s = 0.0
        """When it is to be told again, if there is news; monotonic."""

    def write(self, identity: StoreIdentity, seq: int) -> None:
        """Tells it. Waits for the disk; raises StoreUnusable."""
        self.due_s = time.monotonic() + NOTE_EVERY_S
        self._ownership.write(
            LockNote(os.getpid(), identity.store_id, identity.incarnation, identity.epoch, seq)
        )
        self.seq = seq

    def renew(self, identity: StoreIdentity, seq: int) -> None:
        """Tells it, if it can.

        A note that cannot be written is missed at the next opening at most, so a commit that is
        durable does not fail for it.
        """
        try:
            self.write(identity, seq)
        except StoreUnusable as error:
            _log.error("position_not_noted", path=str(self._path), error=str(error))
