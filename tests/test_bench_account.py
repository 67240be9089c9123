"""The account of a benchmark, and a rig of real processes whose participant has a fault."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest

import amends
from amends_runtime.core.records import SagaState
from scripts.bench_account import Account, Report, pattern_of
from scripts.bench_participant import PLANTED_AT, Ledger, totals
from scripts.bench_processes import STEPS, definition
from scripts.bench_rig import Rig, Setting

DONE = SagaState.COMPLETED


def report(done: Mapping[str, int], undone: Mapping[str, int] | None = None) -> Report:
    """Give what a participant reports of the sagas of `bench`."""
    return {"done": {"bench": done}, "undone": {"bench": undone} if undone else {}}


# -- agreement -------------------------------------------------------------------------------------


def test_an_account_that_agrees() -> None:
    """The loads, the store and the participant say the same; naive work has effects and no saga."""
    account = Account(Counter(bench=4), naive=3)
    assert account.faults({"bench": {DONE: 4}}, report({"1 1 1": 7})) == []
    assert Account().faults({}, {"done": {}, "undone": {}}) == []


def test_sagas_that_are_undone_or_left_open_agree_in_their_own_way() -> None:
    """A refused saga has each effect of it undone once; a later one has none, and does not end."""
    account = Account(Counter({"refused": 2, "later": 5, "steps-9": 1}))
    stored: dict[str, dict[int, int]] = {
        "refused": {SagaState.COMPENSATED: 2},
        "later": {SagaState.RUNNING: 5},
        "steps-9": {DONE: 1},
    }
    told = {
        "done": {"refused": {"1 1": 2}, "steps-9": {"1 1 1 1 1 1 1 1 1": 1}},
        "undone": {"refused": {"1 1": 2}},
    }
    assert account.faults(stored, told) == []


@pytest.mark.parametrize(
    "found", [{"1 1 1": 3, "1 0 1": 1}, {"1 1 1": 3, "1 2 1": 1}, {"1 1 1": 3}]
)
def test_effects_that_are_lost_or_doubled(found: dict[str, int]) -> None:
    """One effect of one step of one saga too few or too many is told."""
    (fault,) = Account(Counter(bench=4)).faults({"bench": {DONE: 4}}, report(found))
    assert "effects done" in fault


def test_effects_that_nobody_asked_for() -> None:
    """An effect of a saga that neither the store nor a load knows, and one that was undone."""
    (fault,) = Account().faults({}, report({"1": 1}))
    assert "instead of {}" in fault
    account = Account(Counter(bench=1))
    (fault,) = account.faults({"bench": {DONE: 1}}, report({"1 1 1": 1}, {"0 1": 1}))
    assert "effects undone" in fault


def test_ends_that_are_wrong() -> None:
    """Each end that was not meant is told, as is a saga that the store or a load does not have."""
    stuck = Account(Counter(bench=2)).faults(
        {"bench": {DONE: 1, SagaState.STUCK: 1}}, report({"1 1 1": 1})
    )
    assert ["'STUCK': 1" in fault for fault in stuck] == [True]
    for told in (1, 3):
        faults = Account(Counter(bench=told)).faults({"bench": {DONE: 2}}, report({"1 1 1": 2}))
        assert [f"told of {told} sagas, the store has 2" in fault for fault in faults] == [True]


def test_a_start_whose_answer_was_lost_may_be_there() -> None:
    """When loads were refused the store may have more than they know, and never less."""
    account = Account(Counter(bench=3), is_certain=False)
    assert account.faults({"bench": {DONE: 5}}, report({"1 1 1": 5})) == []
    assert account.faults({"bench": {DONE: 2}}, report({"1 1 1": 2})) != []


# -- the participant's ledger ----------------------------------------------------------------------


def call(saga_id: str, step: str) -> amends.Call:
    """Give an Execute of a step."""
    return amends.Call(
        verb=amends.Verb.EXECUTE,
        action=step,
        saga_id=saga_id,
        step=step,
        round=1,
        idempotency_key=f"store/{saga_id}/{step}/execute/1",
        store_id="store",
        definition="bench",
    )


def test_a_ledger_knows_each_step_of_each_saga() -> None:
    """What is missing and what is there twice do not make up for each other."""
    ledger = Ledger()
    for step in ("one", "two", "two"):
        ledger.do(call("a", step))
    for step in STEPS:
        ledger.do(call("b", step))
    ledger.undo(call("b", "two"))
    told = ledger.report()
    assert told == {"done": {"bench": {"1 2": 1, "1 1 1": 1}}, "undone": {"bench": {"0 1": 1}}}
    assert totals(told) == {"effects": 6, "keys": 5, "doubled": 1, "undone": 1}


@pytest.mark.parametrize(("plant", "effects"), [("lost", 0), ("doubled", 2)])
def test_a_planted_fault_strikes_once(plant: str, effects: int) -> None:
    """The effect that it is for, and no other."""
    ledger = Ledger(plant)
    for number in range(PLANTED_AT + 5):
        ledger.do(call(str(number), "one"))
    found = ledger.report()["done"]["bench"]
    assert found == {"1": PLANTED_AT + 4, str(effects or ""): 1}


def test_definitions_have_as_many_effects_as_the_account_expects() -> None:
    """The refused one loses its last step; of the others each step has one."""
    for name in ("bench", "held", "steps-1", "steps-27"):
        assert pattern_of(name).split() == ["1"] * len(definition(name).steps)
    assert pattern_of("refused").split() == ["1"] * (len(definition("refused").steps) - 1)


# -- a rig -----------------------------------------------------------------------------------------


def test_a_lost_effect_is_found_by_a_rig(tmp_path: Path) -> None:
    """Real processes: one effect of thirty is missing, and the account says that one saga's is."""
    with Rig(tmp_path, Setting("planted", plant="lost")) as rig:
        done = rig.load(concurrency=5, count=10)
    assert done["sagas"] == rig.ended["bench"] == 10
    (fault,) = rig.faults
    assert "effects done" in fault
    assert "'1 1 1': 9" in fault
