"""Participants with their lanes and breakers."""

from __future__ import annotations

from typing import Final, Protocol

from amends.v1 import operator_pb2
from amends_runtime.core.breaker import Breaker, BreakerState

__all__ = ["BREAKER_STATES_OUT", "LaneView", "breaker_to_proto", "participant_to_proto"]

BREAKER_STATES_OUT: Final = {
    BreakerState.CLOSED: operator_pb2.BREAKER_STATE_CLOSED,
    BreakerState.OPEN: operator_pb2.BREAKER_STATE_OPEN,
    BreakerState.HALF_OPEN: operator_pb2.BREAKER_STATE_HALF_OPEN,
}


class LaneView(Protocol):
    """A participant's lane: what `participant_to_proto` shows."""

    @property
    def name(self) -> str:
        """The participant's registered name."""
        ...

    @property
    def address(self) -> str:
        """Where it is called."""
        ...

    @property
    def by_operator(self) -> bool:
        """Registered at run time, not by the configuration."""
        ...

    @property
    def breaker(self) -> Breaker:
        """Its breaker."""
        ...

    @property
    def in_flight(self) -> int:
        """Calls on the wire."""
        ...

    @property
    def waiting(self) -> int:
        """Calls in the lane."""
        ...

    @property
    def limit(self) -> int:
        """Upper bound of calls on the wire."""
        ...

    @property
    def transport(self) -> str:
        """How it is called: "unary" or "exchange"."""
        ...

    @property
    def last_error(self) -> str:
        """The last error status seen; empty if none."""
        ...


def participant_to_proto(lane: LaneView, configured_address: str = "") -> operator_pb2.Participant:
    """A participant with its lane and breaker, and where the configuration has it."""
    if not lane.address:
        source = operator_pb2.PARTICIPANT_SOURCE_UNSPECIFIED
    elif lane.by_operator:
        source = operator_pb2.PARTICIPANT_SOURCE_OPERATOR
    else:
        source = operator_pb2.PARTICIPANT_SOURCE_CONFIGURATION
    return operator_pb2.Participant(
        name=lane.name,
        address=lane.address,
        configured_address=configured_address,
        source=source,
        breaker=breaker_to_proto(lane.name, lane.breaker),
        calls_in_flight=lane.in_flight,
        calls_waiting=lane.waiting,
        concurrency_limit=lane.limit,
        transport=lane.transport,
        last_error=lane.last_error,
    )


def breaker_to_proto(participant: str, breaker: Breaker) -> operator_pb2.Breaker:
    """A participant's breaker."""
    return operator_pb2.Breaker(
        participant=participant,
        state=BREAKER_STATES_OUT[breaker.state],
        consecutive_failures=breaker.failures,
        since_ms=breaker.since_ms,
        next_probe_at_ms=breaker.probe_at_ms,
    )
