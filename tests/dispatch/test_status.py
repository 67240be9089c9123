"""What each gRPC status says of an attempt, and of the endpoint's health."""

from __future__ import annotations

import grpc
import pytest

from amends_runtime.core.messages import Unknown
from amends_runtime.dispatch.status import reply_of

UNWELL = {"UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "INTERNAL", "DATA_LOSS"}
MISCONFIGURED = {"UNIMPLEMENTED", "UNAUTHENTICATED", "PERMISSION_DENIED", "INVALID_ARGUMENT"}


@pytest.mark.parametrize("status", [s for s in grpc.StatusCode if s is not grpc.StatusCode.OK])
def test_no_error_status_decides_anything(status: grpc.StatusCode) -> None:
    """Every one is an unknown outcome; they differ in what else they say."""
    reply = reply_of(status, "details")
    assert isinstance(reply.outcome, Unknown)
    assert reply.outcome.reason == status.name
    assert reply.outcome.misconfigured == (status.name in MISCONFIGURED)
    assert reply.healthy is (False if status.name in UNWELL else None)


def test_a_reply_beyond_the_limit_is_one_actions_fault() -> None:
    """It must not close the way for the participant's other actions."""
    details = "CLIENT: Received message larger than max (5000000 vs. 4194304)"
    reply = reply_of(grpc.StatusCode.RESOURCE_EXHAUSTED, details)
    assert isinstance(reply.outcome, Unknown)
    assert (reply.outcome.reason, reply.outcome.misconfigured) == ("REPLY_TOO_LARGE", True)
    assert reply.healthy is None


def test_long_details_are_cut() -> None:
    """They end up in the history, which is for ever."""
    outcome = reply_of(grpc.StatusCode.UNAVAILABLE, "x" * 100_000).outcome
    assert isinstance(outcome, Unknown)
    assert len(outcome.message) < 1_000
