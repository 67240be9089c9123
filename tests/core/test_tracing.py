"""Ids and sampling: derived, so that everybody who knows the history knows them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amends_runtime.core.records import Verb
from amends_runtime.core.tracing import TRACEPARENT, Tracing, known_traceparent

CALLER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
UNSAMPLED = CALLER[:-2] + "00"
TRACING = Tracing("store-1")

HEX_128 = st.integers(1, 2**128 - 1).map(lambda number: f"{number:032x}")


def test_every_part_of_an_attempt_makes_another_span() -> None:
    """Also where the texts of two sagas' ids and numbers, put together, would be the same."""
    sagas, numbers = ["s", "s/1", "s/1/2"], [1, 2, 11]
    keys = list(itertools.product(sagas, numbers, Verb, numbers, numbers))
    for tracing in (TRACING, Tracing("store-2")):
        spans = {
            make(*key)
            for key in keys
            for make in (tracing.attempt_span, tracing.step_span, tracing.wait_span)
        } | {tracing.root_span(saga) for saga in sagas}
        assert len(spans) == 3 * len(keys) + len(sagas)
    assert TRACING.root_span("s") != Tracing("store-2").root_span("s")


@pytest.mark.parametrize(
    ("header", "known"),
    [
        (CALLER, CALLER),
        (CALLER[:-2] + "ff", CALLER[:-2] + "ff"),
        (CALLER + "-more", ""),
        ("01" + CALLER[2:], CALLER),
        ("01" + UNSAMPLED[2:], UNSAMPLED),
        ("01" + CALLER[2:-2] + "fe", UNSAMPLED),
        ("fe" + CALLER[2:-2] + "ff", CALLER),
        ("01" + CALLER[2:] + "-", CALLER),
        ("0a" + CALLER[2:] + "-what-comes.later\n", CALLER),
        ("01" + CALLER[2:] + "00", ""),
        ("01" + CALLER[2:-1], ""),
        ("01" + CALLER[2:].upper(), ""),
        (f"01-{'0' * 32}-00f067aa0ba902b7-01", ""),
        (f"01-4bf92f3577b34da6a3ce929d0e0e4736-{'0' * 16}-01", ""),
        ("ff" + CALLER[2:], ""),
        ("ff" + CALLER[2:] + "-more", ""),
        ("0A" + CALLER[2:], ""),
        (" " + CALLER, ""),
        ("", ""),
    ],
)
def test_a_header_of_any_version_is_taken_for_what_is_known_of_it(header: str, known: str) -> None:
    """As W3C asks: trace, span and the sampled flag, and only later versions may be longer."""
    assert known_traceparent(header) == known
    assert not known or TRACEPARENT.fullmatch(known)


def test_the_header_names_the_attempts_span_in_the_sagas_trace() -> None:
    """With a caller the caller's trace, without one the saga's own."""
    span = TRACING.attempt_span("s", 0, Verb.EXECUTE, 1, 2)
    assert TRACING.traceparent("s", CALLER, 0, Verb.EXECUTE, 1, 2) == (
        f"00-4bf92f3577b34da6a3ce929d0e0e4736-{span}-01"
    )
    alone = TRACING.traceparent("s", "", 0, Verb.EXECUTE, 1, 2)
    assert alone == f"00-{TRACING.trace_id('s', '')}-{span}-01"
    assert TRACEPARENT.fullmatch(alone)


def test_a_caller_decides_about_a_trace_that_is_joined() -> None:
    """Whatever the ratio is; of flags that nobody knows yet, only the one for sampling counts."""
    for tracing in (Tracing("s", ratio=0.0), Tracing("s", ratio=1.0)):
        for caller, sampled in ((CALLER, True), (UNSAMPLED, False), (CALLER[:-2] + "fe", False)):
            assert tracing.is_sampled(caller[3:35], caller) is sampled
            header = tracing.traceparent("saga", caller, 0, Verb.EXECUTE, 1, 1)
            assert header.endswith("-01" if sampled else "-00")


def test_a_caller_does_not_decide_about_a_trace_that_is_linked() -> None:
    """The saga has a trace of its own, and the ratio counts."""
    apart = Tracing("s", ratio=0.0, join=False)
    assert apart.trace_id("saga", CALLER) == Tracing("s").trace_id("saga", "")
    assert not apart.is_sampled(apart.trace_id("saga", CALLER), CALLER)
    assert Tracing("s", join=False).is_sampled("f" * 32, UNSAMPLED)


@given(HEX_128)
def test_all_or_none(trace: str) -> None:
    """A ratio of 1 keeps every trace there is, one of 0 none."""
    assert Tracing("s", ratio=1.0).is_sampled(trace, "")
    assert not Tracing("s", ratio=0.0).is_sampled(trace, "")


@given(HEX_128, st.floats(0, 1), st.floats(0, 1))
def test_a_larger_ratio_keeps_what_a_smaller_one_keeps(trace: str, one: float, two: float) -> None:
    """So programs with other ratios still share whole traces."""
    less, more = sorted((one, two))
    if Tracing("s", ratio=less).is_sampled(trace, ""):
        assert Tracing("s", ratio=more).is_sampled(trace, "")


@pytest.mark.parametrize("caller", ["", CALLER, CALLER[:-2] + "00"])
@pytest.mark.parametrize("join", [True, False])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_what_is_kept_of_a_saga_is_what_its_headers_say(
    *, ratio: float, join: bool, caller: str
) -> None:
    """Asked once or again, by the trace's id or by the saga: it is one decision."""
    tracing = Tracing("s", ratio=ratio, join=join)
    for saga_id in [f"saga-{number}" for number in range(20)] * 2:
        trace_id = tracing.trace_id(saga_id, caller)
        header = tracing.traceparent(saga_id, caller, 0, Verb.EXECUTE, 1, 1)
        assert header[3:35] == trace_id
        assert tracing.keeps(saga_id, caller) is tracing.is_sampled(trace_id, caller)
        assert header.endswith("-01") is tracing.keeps(saga_id, caller)
