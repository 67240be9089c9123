"""A batch of transitions as one row of a few large values, which SQL takes apart again.

What it buys. With every value bound by itself and a trigger that runs for each turn, a turn of a
three-step saga cost 8.4 µs of CPU in commits of 100; taken apart by one run of one trigger it costs
6.9, in the same run. One statement for each table would cost as little, but each statement hands
the interpreter lock over some four times, and beside a busy event loop each of them has to wait for
it again. `scripts/bench_store.py` measures the whole store.

How it looks. Three values; `sql/sqlite/commit.sql` reads them and is the other half of this file:

    turns      for each turn: saga_no, version, offset and length of its records, state and
               past_no_return after it
    summaries  for each row of the read model that is written: saga_no, version, offset and length
               of the saga's id, length of the labels that lie behind the id, definition_no, state,
               started_at_ms, updated_at_ms, ended_at_ms, deadline_at_ms, wake_at_ms, past_no_return
    data       the bytes that these point into: records, and ids and labels as UTF-8

The first two are numbers in JSON, which msgspec writes quicker than anything else. SQLite's JSON is
slow, so plain cutting reads them: each number has `LEAD` added, which makes it a 1 and 18 digits,
and the n-th stands where arithmetic says. Offsets count from 1, as SQL does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from amends_runtime.errors import StoreError
from amends_runtime.ports import SagaSummary, Transition
from amends_runtime.storage.codec import RecordCodec, encode_labels

__all__ = ["MAX_TURNS", "PackedBatch", "pack", "stored_definition"]

MAX_TURNS = 1024  # in one statement: so many places are kept to count with, see `fill_places`

LEAD = 10**18
FIRST = LEAD + 1  # an offset of the first byte
WIDTH = 20  # of a number with the comma behind it
NEVER = 2**63 - 1

_JSON = msgspec.json.Encoder()


class PackedBatch(NamedTuple):
    """The parameters of `append` behind the epoch, the format and the position before the batch.

    Bytearrays, because sqlite3 takes these as they are and asks its adapters about bytes.
    """

    turn_count: int
    turns: bytearray
    summary_count: int
    summaries: bytearray
    labelled: int  # how many of these summaries have labels
    data: bytearray


def pack(
    transitions: Sequence[Transition], codec: RecordCodec, definition_nos: Mapping[str, int]
) -> PackedBatch:
    """Packs at most `MAX_TURNS` transitions.

    `definition_nos` are the stored definitions, by hash; raises StoreError for one that is not.
    """
    assert len(transitions) <= MAX_TURNS, "one statement has places for so many"
    data = bytearray()
    turns: list[int] = []
    summaries: list[int] = []
    summary_count = labelled = 0
    for transition in transitions:
        saga_no, version = LEAD + transition.saga_no, LEAD + transition.version
        offset = len(data)
        codec.append(transition.records, data)
        turns += (
            saga_no,
            version,
            FIRST + offset,
            LEAD + len(data) - offset,
            LEAD + transition.state,
            LEAD + transition.past_no_return,
        )
        summary = transition.summary
        if summary is None:
            assert transition.version > 1, "a saga starts with its summary"
            continue
        definition_no = stored_definition(summary, definition_nos)
        saga_id = summary.saga_id.encode()
        labels = encode_labels(summary.labels).encode() if summary.labels else b""
        summary_count += 1
        labelled += bool(labels)
        summaries += (
            saga_no,
            version,
            FIRST + len(data),
            LEAD + len(saga_id),
            LEAD + len(labels),
            LEAD + definition_no,
            LEAD + summary.state,
            LEAD + summary.started_at_ms,
            LEAD + summary.updated_at_ms,
            LEAD + summary.ended_at_ms,
            LEAD + summary.deadline_at_ms,
            # "Never" has too many digits: it goes as 0, and every instant as its successor.
            LEAD + (summary.wake_at_ms + 1 & NEVER),
            LEAD + summary.past_no_return,
        )
        data += saga_id
        data += labels
    return PackedBatch(
        len(transitions), _written(turns), summary_count, _written(summaries), labelled, data
    )


def stored_definition(summary: SagaSummary, definition_nos: Mapping[str, int]) -> int:
    """The number of the saga's definition in the store. Raises StoreError where it has none."""
    found = definition_nos.get(summary.definition_hash)
    if found is None:
        raise StoreError(
            f"saga {summary.saga_id}: its definition {summary.definition_name!r}"
            f" ({summary.definition_hash}) is not registered in this store; nothing was written"
        )
    return found


def _written(numbers: list[int]) -> bytearray:
    text = bytearray()
    if numbers:
        _JSON.encode_into(numbers, text)
        # A number of another length would move all that follow it, and nothing would notice.
        leads = text[1::WIDTH]
        assert len(text) == 1 + WIDTH * len(numbers), "numbers are of 19 digits"
        assert leads == b"1" * len(numbers), "numbers are 0 to 10**18 - 1, with the lead added"
    return text
