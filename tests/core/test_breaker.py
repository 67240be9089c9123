"""The circuit breaker: its transitions as a table, its counting, and who may not be counted."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amends_runtime.core.breaker import (
    Breaker,
    BreakerPolicy,
    BreakerState,
    admits,
    due,
    failed,
    sent,
    succeeded,
    unsettled,
)

POLICY = BreakerPolicy(failures_to_open=3, open_ms=1_000, max_open_ms=3_000, probes=2)
CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN

NEW = Breaker()
TIRED = Breaker(failures=2)  # one more opens it
OPENED = Breaker(OPEN, 3, since_ms=10, probe_at_ms=1_010, open_ms=1_000, generation=1)
PROBING = Breaker(HALF_OPEN, 3, 1_010, 1_010, open_ms=1_000, probing=1, generation=2)

# What happens to a breaker, by a call of its own generation: what becomes of it.
TABLE = {
    ("new", "sent"): NEW,
    ("new", "succeeded"): NEW,
    ("new", "failed"): Breaker(failures=1),
    ("new", "unsettled"): NEW,
    ("tired", "sent"): TIRED,
    ("tired", "succeeded"): NEW,  # failures running: a success ends the run
    ("tired", "failed"): Breaker(
        OPEN, 3, since_ms=2_000, probe_at_ms=3_000, open_ms=1_000, generation=1
    ),
    ("tired", "unsettled"): TIRED,
    ("opened", "sent"): Breaker(HALF_OPEN, 3, 2_000, 1_010, 1_000, probing=1, generation=2),
    ("probing", "sent"): Breaker(HALF_OPEN, 3, 1_010, 1_010, 1_000, probing=2, generation=2),
    ("probing", "succeeded"): Breaker(CLOSED, 0, since_ms=2_000, generation=3),
    ("probing", "failed"): Breaker(
        OPEN, 4, since_ms=2_000, probe_at_ms=4_000, open_ms=2_000, generation=3
    ),
    ("probing", "unsettled"): Breaker(HALF_OPEN, 3, 1_010, 1_010, 1_000, probing=0, generation=2),
}
BREAKERS = {"new": NEW, "tired": TIRED, "opened": OPENED, "probing": PROBING}


def happen(event: str, breaker: Breaker, generation: int, now_ms: int) -> Breaker:
    """The breaker after an event."""
    if event == "sent":
        return sent(breaker, now_ms)
    if event == "succeeded":
        return succeeded(breaker, generation, now_ms)
    if event == "failed":
        return failed(breaker, POLICY, generation, now_ms)
    return unsettled(breaker, generation)


@pytest.mark.parametrize(("before", "event"), TABLE, ids=lambda part: part)
def test_a_transition(before: str, event: str) -> None:
    """Each state and event come to exactly the next breaker."""
    breaker = BREAKERS[before]
    assert happen(event, breaker, breaker.generation, 2_000) == TABLE[before, event]


@pytest.mark.parametrize("before", BREAKERS)
@pytest.mark.parametrize("event", ["succeeded", "failed", "unsettled"])
def test_a_call_of_another_generation_does_not_count(before: str, event: str) -> None:
    """It was sent before the breaker opened or closed, and says nothing about what is now."""
    breaker = BREAKERS[before]
    for generation in (breaker.generation - 1, breaker.generation + 1):
        assert happen(event, breaker, generation, 2_000) is breaker


@pytest.mark.parametrize(
    ("breaker", "now_ms", "may_pass"),
    [
        (NEW, 0, True),
        (TIRED, 0, True),
        (OPENED, 1_009, False),
        (OPENED, 1_010, True),
        (PROBING, 0, True),
        (msgspec.structs.replace(PROBING, probing=2), 10**9, False),
        (msgspec.structs.replace(PROBING, probing=0), 0, True),
    ],
)
def test_who_may_pass(breaker: Breaker, now_ms: int, *, may_pass: bool) -> None:
    """Closed: all. Open: nobody until its time, then a probe. Half-open: as many as may probe."""
    assert admits(breaker, POLICY, now_ms) is may_pass


def test_a_probe_that_somebody_asks_for_is_due_at_once() -> None:
    """However long it waits by itself, and its waits begin anew; others are left as they are."""
    waits = msgspec.structs.replace(OPENED, probe_at_ms=9_000, open_ms=3_000)
    asked = due(waits, 500)
    assert admits(asked, POLICY, 500)
    now_ms, lengths = 500, []
    for _ in range(3):
        asked = sent(asked, now_ms)
        asked = failed(asked, POLICY, asked.generation, now_ms)
        lengths.append(asked.probe_at_ms - now_ms)
        now_ms = asked.probe_at_ms
    assert lengths == [1_000, 2_000, 3_000]
    for breaker in (NEW, TIRED, PROBING):
        assert due(breaker, 500) is breaker
    assert due(OPENED, 2_000).probe_at_ms == OPENED.probe_at_ms, "it is due already"


def test_an_outage_from_its_first_failure_to_its_end() -> None:
    """It opens, probes after 1 s, 2 s, then every 3 s at most; the first success closes it."""
    breaker, now_ms = Breaker(), 0
    for _ in range(3):
        assert admits(breaker, POLICY, now_ms)
        breaker = failed(breaker, POLICY, breaker.generation, now_ms)
    waits = []
    for _ in range(4):
        assert breaker.state is OPEN
        waits.append(breaker.probe_at_ms - now_ms)
        assert not admits(breaker, POLICY, breaker.probe_at_ms - 1)
        now_ms = breaker.probe_at_ms
        assert admits(breaker, POLICY, now_ms)
        breaker = sent(breaker, now_ms)
        breaker = failed(breaker, POLICY, breaker.generation, now_ms)
    assert waits == [1_000, 2_000, 3_000, 3_000]
    breaker = sent(breaker, breaker.probe_at_ms)
    breaker = succeeded(breaker, breaker.generation, 50_000)
    assert (breaker.state, breaker.failures, breaker.since_ms) == (CLOSED, 0, 50_000)


def test_the_next_outage_begins_with_the_short_wait() -> None:
    """What the last one had grown to is forgotten when the breaker closes."""
    breaker = msgspec.structs.replace(PROBING, open_ms=3_000)
    breaker = succeeded(breaker, breaker.generation, 0)
    for _ in range(3):
        breaker = failed(breaker, POLICY, breaker.generation, 100)
    assert (breaker.state, breaker.open_ms) == (OPEN, 1_000)


def test_calls_from_before_an_outage_neither_close_nor_reopen() -> None:
    """Slow calls that were sent while it was closed end one by one while it probes."""
    old = Breaker()
    breaker = old
    for _ in range(3):
        breaker = failed(breaker, POLICY, old.generation, 0)
    breaker = sent(breaker, breaker.probe_at_ms)
    probe = breaker.generation
    assert failed(breaker, POLICY, old.generation, 2_000) is breaker
    assert succeeded(breaker, old.generation, 2_000) is breaker
    assert succeeded(breaker, probe, 2_000).state is CLOSED


def test_the_second_probe_of_a_breaker_that_closed_does_not_count() -> None:
    """Two probes are out, the first closes the breaker, the second times out: it stays closed."""
    breaker = sent(PROBING, 2_000)
    probe = breaker.generation
    breaker = succeeded(breaker, probe, 2_000)
    assert failed(breaker, POLICY, probe, 2_001) is breaker


@given(st.data())
def test_no_sequence_of_events_breaks_a_rule(data: st.DataObject) -> None:
    """At most `probes` on the wire while half-open; never admitted early; never stuck for ever."""
    policy = data.draw(
        st.builds(
            BreakerPolicy,
            failures_to_open=st.integers(1, 4),
            open_ms=st.integers(1, 100),
            max_open_ms=st.integers(100, 1_000),
            probes=st.integers(1, 3),
        )
    )
    breaker, now_ms, running = Breaker(), 0, list[int]()
    for _ in range(data.draw(st.integers(0, 60))):
        event = data.draw(st.sampled_from(["send", "wait", "succeeded", "failed", "unsettled"]))
        before = breaker
        if event == "wait":
            now_ms += data.draw(st.sampled_from([1, 50, 2_000]))
        elif event == "send" and admits(breaker, policy, now_ms):
            breaker = sent(breaker, now_ms)
            running.append(breaker.generation)
        elif event != "send" and running:
            generation = running.pop(data.draw(st.integers(0, len(running) - 1)))
            if event == "succeeded":
                breaker = succeeded(breaker, generation, now_ms)
            elif event == "failed":
                breaker = failed(breaker, policy, generation, now_ms)
            else:
                breaker = unsettled(breaker, generation)
        assert breaker.generation >= before.generation
        assert (breaker.generation == before.generation) == (breaker.state is before.state)
        if breaker.state is HALF_OPEN:
            assert breaker.probing == running.count(breaker.generation) <= policy.probes
        elif breaker.state is OPEN:
            assert breaker.generation not in running
            assert 0 < breaker.probe_at_ms - breaker.since_ms <= policy.max_open_ms
        else:
            assert breaker.failures < policy.failures_to_open
    # Whatever happened: when nothing is on the wire any more, some later call may pass.
    for generation in running:
        breaker = unsettled(breaker, generation)
    assert admits(breaker, policy, now_ms + policy.max_open_ms)
