"""What an operator writes that is no saga's history: participants, and a restore's confirmation.

Each is one statement into a temporary view, whose trigger compares the epoch, makes the change and
appends the audit entry (`sql/sqlite/participants.sql`, `opening.sql`): all of it, or nothing. A
request that was done before, by its id, is not done again. What an error means is the caller's to
say; a violated constraint is the epoch's, and means that nothing was written.
"""

from __future__ import annotations

import aiosqlite
import msgspec

from amends_runtime.ports import OperatorWords, StoreIdentity
from amends_runtime.storage.queries import read_queries

__all__ = ["change_participant", "confirm_restore"]

_SQL = read_queries("sqlite")


async def change_participant(
    writer: aiosqlite.Connection,
    identity: StoreIdentity,
    name: str,
    address: str,
    words: OperatorWords,
    *,
    tls: bool = False,
) -> bool:
    """Registers it, or with an empty address removes it.

    Whether there was a row before, or this very request. Raises sqlite3.Error.
    """
    parameters = {"epoch": identity.epoch, "name": name, "address": address, "tls": tls}
    parameters |= msgspec.structs.asdict(words)
    verb = "put_participant" if address else "remove_participant"
    if await _was_done(writer, words, verb, name):
        return True
    rows = await writer.execute_fetchall(_SQL["participants"])
    existed = name in {row[0] for row in rows}
    if not address and not existed:
        return False
    await writer.execute_fetchall(_SQL["change_participant"], parameters)
    return existed


async def confirm_restore(
    writer: aiosqlite.Connection,
    identity: StoreIdentity,
    words: OperatorWords,
    *,
    restored: bool,
) -> bool:
    """Takes the store for the truth, if it is `restored`.

    Whether it was, or this very request has confirmed it before. Raises sqlite3.Error.
    """
    if await _was_done(writer, words, "confirm_restore", identity.incarnation):
        return True
    if not restored:
        return False
    parameters = {"epoch": identity.epoch, **msgspec.structs.asdict(words)}
    await writer.execute_fetchall(_SQL["confirm_restore"], parameters)
    return True


async def _was_done(
    writer: aiosqlite.Connection, words: OperatorWords, verb: str, subject: str
) -> bool:
    request = {"request_id": words.request_id, "verb": verb, "subject": subject}
    return bool(list(await writer.execute_fetchall(_SQL["find_request"], request)))
