"""Trace and span ids that are derived instead of stored.

The trace of a saga is its caller's, if the caller sent a W3C `traceparent`, else a hash of the
saga's identity. A span's id is a hash of what the span is about. Both are therefore known before a
call leaves, after a crash, and to every node, and a trace can be exported again from history at any
time.
"""

from __future__ import annotations

import hashlib
import re

from amends_runtime.core.records import Verb

__all__ = ["TRACEPARENT", "attempt_span_id", "trace_id", "traceparent"]

TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


def trace_id(store_id: str, saga_id: str, callers_traceparent: str) -> str:
    """32 lower-case hex digits: the caller's trace, or one that only this saga has."""
    if TRACEPARENT.fullmatch(callers_traceparent):
        return callers_traceparent[3:35]
    return _hex(f"trace/{store_id}/{saga_id}", 16)


def attempt_span_id(  # noqa: PLR0917 - what identifies an attempt, in the order of its key
    store_id: str, saga_id: str, step: int, verb: Verb, round_: int, attempt: int
) -> str:
    """16 lower-case hex digits for one attempt's CLIENT span."""
    return _hex(f"attempt/{store_id}/{saga_id}/{step}/{verb:d}/{round_}/{attempt}", 8)


def traceparent(trace: str, span: str, callers_traceparent: str) -> str:
    """The W3C header of a call, with the caller's flags; without a caller the trace is sampled."""
    given = TRACEPARENT.fullmatch(callers_traceparent)
    return f"00-{trace}-{span}-{callers_traceparent[53:55] if given else '01'}"


def _hex(what: str, size: int) -> str:
    return hashlib.blake2b(what.encode(), digest_size=size).hexdigest()
