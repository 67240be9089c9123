"""The circuit breaker: when a participant does not answer, calls wait instead of piling up.

How to think about it. Three states:

    CLOSED     calls pass. `failures_to_open` failures running open it.
    OPEN       calls wait in the lane until `probe_at_ms`, or until an operator wants it probed.
    HALF_OPEN  at most `probes` calls are on the wire. One success closes it, one failure opens it
               again for twice as long, up to `max_open_ms`.

1. Only what says that the endpoint is unwell is a failure: no connection, a time-out, an internal
   error. A typed outcome, Rejected included, is a success; a misconfiguration is neither.
2. A call that was sent before the breaker opened and ends after does not count: `generation` tells.
3. An open breaker decides nothing about a saga. Its calls wait; nobody compensates because of it.

Pure: each function answers with the next breaker. (The pattern: M. Nygard, "Release It!", 2007.)
"""

from __future__ import annotations

import enum

import msgspec

__all__ = [
    "Breaker",
    "BreakerPolicy",
    "BreakerState",
    "admits",
    "due",
    "failed",
    "sent",
    "succeeded",
    "unsettled",
]


class BreakerState(enum.IntEnum):
    """Whether calls pass."""

    CLOSED = 1
    OPEN = 2
    HALF_OPEN = 3


class BreakerPolicy(msgspec.Struct, frozen=True):
    """Limits of a breaker; durations in milliseconds."""

    failures_to_open: int = 5  # one slow call or one lost connection is not an outage
    open_ms: int = 1_000  # first wait: short, for most outages are restarts
    max_open_ms: int = 30_000  # a participant that is back is noticed within this
    probes: int = 1  # enough to tell; more would be a herd


class Breaker(msgspec.Struct, frozen=True):
    """The state of one participant's breaker."""

    state: BreakerState = BreakerState.CLOSED
    failures: int = 0
    since_ms: int = 0
    probe_at_ms: int = 0
    open_ms: int = 0
    probing: int = 0
    generation: int = 0


def admits(breaker: Breaker, policy: BreakerPolicy, now_ms: int) -> bool:
    """Whether a call may be sent now."""
    if breaker.state is BreakerState.CLOSED:
        return True
    if breaker.state is BreakerState.OPEN:
        return now_ms >= breaker.probe_at_ms
    return breaker.probing < policy.probes


def due(breaker: Breaker, now_ms: int) -> Breaker:
    """Somebody says that the endpoint is back: an OPEN breaker is probed now.

    If that comes a moment too early, the waits begin anew with the shortest.
    """
    if breaker.state is not BreakerState.OPEN:
        return breaker
    return msgspec.structs.replace(breaker, probe_at_ms=min(breaker.probe_at_ms, now_ms), open_ms=0)


def sent(breaker: Breaker, now_ms: int) -> Breaker:
    """A call that `admits` let through is on the wire. An OPEN breaker becomes HALF_OPEN by it."""
    if breaker.state is BreakerState.CLOSED:
        return breaker
    if breaker.state is BreakerState.OPEN:
        return msgspec.structs.replace(
            breaker,
            state=BreakerState.HALF_OPEN,
            since_ms=now_ms,
            probing=1,
            generation=breaker.generation + 1,
        )
    return msgspec.structs.replace(breaker, probing=breaker.probing + 1)


def succeeded(breaker: Breaker, generation: int, now_ms: int) -> Breaker:
    """A call sent in `generation` was answered."""
    if generation != breaker.generation:
        return breaker
    if breaker.state is BreakerState.HALF_OPEN:
        return Breaker(since_ms=now_ms, generation=breaker.generation + 1)
    if breaker.failures:
        return msgspec.structs.replace(breaker, failures=0)
    return breaker


def failed(breaker: Breaker, policy: BreakerPolicy, generation: int, now_ms: int) -> Breaker:
    """A call sent in `generation` showed that the endpoint is unwell."""
    if generation != breaker.generation:
        return breaker
    failures = breaker.failures + 1
    if breaker.state is BreakerState.CLOSED and failures < policy.failures_to_open:
        return msgspec.structs.replace(breaker, failures=failures)
    reopened = breaker.state is BreakerState.HALF_OPEN
    longer_ms = min(policy.max_open_ms, breaker.open_ms * 2) if reopened else 0
    open_ms = max(policy.open_ms, longer_ms)
    return Breaker(
        state=BreakerState.OPEN,
        failures=failures,
        since_ms=now_ms,
        probe_at_ms=now_ms + open_ms,
        open_ms=open_ms,
        generation=breaker.generation + 1,
    )


def unsettled(breaker: Breaker, generation: int) -> Breaker:
    """A call sent in `generation` ended without saying anything about the endpoint's health."""
    if generation != breaker.generation or breaker.state is not BreakerState.HALF_OPEN:
        return breaker
    return msgspec.structs.replace(breaker, probing=max(0, breaker.probing - 1))
