"""Trace and span ids that are derived instead of stored, and whether a trace is sampled.

How to think about it. Whoever knows a saga's history knows every id of its trace: what a call sends
as its trace context, before and after a crash, on every node, and what an export of the same saga
finds a year later. Nothing about a trace is ever written down.

1. The trace is the caller's, if the caller sent a W3C `traceparent` and its trace is to be joined;
   else it is a hash of the saga's identity. One that is not joined is linked (see `projection`).
   Whatever version a caller sends, what is kept and sent on is version 00 (`known_traceparent`).
2. A span's id is a hash of what the span is about. Two runtimes with stores of their own never make
   the same one.
3. Sampling is decided from the trace id alone, by OpenTelemetry's rule: its lower 64 bits are below
   the ratio. A caller whose trace is joined has decided already, by its flag. So every program that
   follows the same rule keeps the same traces.
"""

from __future__ import annotations

import functools
import re
from hashlib import blake2b
from typing import Final

import msgspec

from amends_runtime.core.records import Verb

__all__ = ["TRACEPARENT", "Tracing", "known_traceparent"]

TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

# What can be known of versions to come: they begin like version 00, and may go on after it.
LATER = re.compile(
    r"(?!00|ff)[0-9a-f]{2}(-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-)([0-9a-f]{2})(?:-.*)?",
    re.DOTALL,
)

SAMPLED = 0x01  # the one flag of every version that says anything of sampling

CONTEXTS_KEPT: Final = 4_096  # a saga's calls follow each other closely; about 2 MB

_NUMBER: Final = {verb: f"{verb:d}" for verb in Verb}  # formatting one costs half of a hash


def known_traceparent(header: str) -> str:
    """What version 00 has of a W3C `traceparent` of any version; empty if it is none.

    https://www.w3.org/TR/trace-context/#versioning-of-traceparent
    """
    if TRACEPARENT.fullmatch(header):
        return header
    later = LATER.fullmatch(header)
    if later is None:
        return ""
    return f"00{later[1]}{int(later[2], 16) & SAMPLED:02x}"


class Tracing(msgspec.Struct, frozen=True):
    """How the traces of one store's sagas are named, and which are sampled.

    `ratio` is the share of traces to keep, from 0 to 1. `join` puts a saga into its caller's trace;
    without, each saga has a trace of its own. Changing either splits the traces of sagas under way.
    Traces and spans are named by 32 and 16 lower-case hex digits.
    """

    store_id: str
    ratio: float = 1.0
    join: bool = True

    def trace_id(self, saga_id: str, caller: str) -> str:
        """The saga's trace. `caller` is the `traceparent` that its start brought, or empty."""
        if caller and self.join and TRACEPARENT.fullmatch(caller):
            return caller[3:35]
        return blake2b(f"trace/{self.store_id}/{saga_id}".encode(), digest_size=16).hexdigest()

    def is_sampled(self, trace_id: str, caller: str) -> bool:
        """Whether this trace is kept."""
        if caller and self.join and TRACEPARENT.fullmatch(caller):
            return bool(int(caller[53:55], 16) & SAMPLED)
        return int(trace_id[16:], 16) < self.ratio * 2**64

    def traceparent(  # noqa: PLR0917  # what identifies an attempt, in the order of its key
        self, saga_id: str, caller: str, step: int, verb: Verb, round_: int, attempt: int
    ) -> str:
        """The W3C header of an attempt's call: its span is the parent of the participant's."""
        _, before, after = _context(self, saga_id, caller)
        return f"{before}{self.attempt_span(saga_id, step, verb, round_, attempt)}{after}"

    def keeps(self, saga_id: str, caller: str) -> bool:
        """Whether this saga's trace is kept: `is_sampled` of its `trace_id`."""
        return _context(self, saga_id, caller)[0]

    def root_span(self, saga_id: str) -> str:
        """The saga as a whole."""
        return self._span(f"saga/{saga_id}")

    def step_span(  # as `traceparent`
        self, saga_id: str, step: int, verb: Verb, round_: int, first_attempt: int
    ) -> str:
        """A step in one verb and round, from `first_attempt` until it ends or is stuck."""
        return self._span(f"step/{saga_id}/{step}/{_NUMBER[verb]}/{round_}/{first_attempt}")

    def attempt_span(  # as `traceparent`
        self, saga_id: str, step: int, verb: Verb, round_: int, attempt: int
    ) -> str:
        """One attempt, the CLIENT side of a call."""
        return self._span(f"attempt/{saga_id}/{step}/{_NUMBER[verb]}/{round_}/{attempt}")

    def wait_span(  # as `traceparent`
        self, saga_id: str, step: int, verb: Verb, round_: int, attempt: int
    ) -> str:
        """The time that one attempt waited in its lane."""
        return self._span(f"wait/{saga_id}/{step}/{_NUMBER[verb]}/{round_}/{attempt}")

    def _span(self, what: str) -> str:
        return blake2b(f"{self.store_id}/{what}".encode(), digest_size=8).hexdigest()


@functools.lru_cache(CONTEXTS_KEPT)
def _context(tracing: Tracing, saga_id: str, caller: str) -> tuple[bool, str, str]:
    """Whether a saga's trace is kept; what is before and after the span's id in all its headers."""
    trace = tracing.trace_id(saga_id, caller)
    is_kept = tracing.is_sampled(trace, caller)
    return is_kept, f"00-{trace}-", f"-{SAMPLED if is_kept else 0:02x}"
