"""A participant that is down: its calls wait, and nothing is undone or stuck for it."""

from __future__ import annotations

import pytest
from hypothesis import settings

import amends
from amends_runtime.testing import SagaTest

DEFINITION = amends.Definition("two").step("a", "here", "do").step("b", "away", "do")
HOUR_S = 3600
DAY_S = 24 * HOUR_S


@pytest.mark.parametrize(
    ("sagas", "outage_s"),
    [(1, 600), (20, 600), (1, DAY_S), *([(20, DAY_S)] if settings().max_examples > 100 else [])],
)
def test_however_long_it_is_away_its_sagas_complete(sagas: int, outage_s: int) -> None:
    """Longer than every step's give-up time: the probes of an open breaker use up no retry."""
    with SagaTest(DEFINITION) as test:
        test.participant("away").down(for_s=outage_s)
        started = [test.start() for _ in range(sagas)]
        test.finish()
        assert [saga.get().state for saga in started] == [amends.SagaState.COMPLETED] * sagas
        assert test.effects == ["a", "b"] if sagas == 1 else len(test.effects) == 2 * sagas


def test_a_compensation_waits_for_its_participant_too() -> None:
    """Longer than the give-up time of any compensation."""
    with SagaTest(DEFINITION) as test:

        @test.participant("away").execute("do")
        def do(call: amends.Call) -> None:
            test.participant("here").down(for_s=30 * HOUR_S)
            raise amends.Rejected("no")

        saga = test.start()
        test.finish()
        assert saga.get().state is amends.SagaState.COMPENSATED
        assert test.effects == []
