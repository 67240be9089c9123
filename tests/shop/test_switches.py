"""The switches: what the file may say, and when and how often a fault strikes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from shop import switches as switches_module
from shop.bank import read_transfer
from shop.catalogue import read_order
from shop.switches import Fault, SwitchBoard, SwitchesError, parse, write_switches

DOCS = Path(__file__).parents[2] / "docs" / "demo.md"


def board_on(path: Path, service: str = "payments") -> tuple[SwitchBoard, list[str]]:
    """Give a loaded board, and the list that it complains into."""
    complaints: list[str] = []
    board = SwitchBoard(path, service, complain=complaints.append)
    board.load()
    return board, complaints


def test_without_a_file_nothing_goes_wrong(tmp_path: Path) -> None:
    """A missing file is a shop in which all is well; one that comes later is read."""
    board, complaints = board_on(tmp_path / "switches.json")
    assert not board.current().down
    assert not board.strikes(Fault.DECLINE, "charge", "saga-1")
    write_switches(tmp_path / "switches.json", {"payments": {"charge": {"decline": 1}}})
    assert board.strikes(Fault.DECLINE, "charge", "saga-1")
    assert not board.strikes(Fault.DECLINE, "refund", "saga-1")
    assert complaints == []


def test_a_service_reads_its_own_part_only(tmp_path: Path) -> None:
    """One file serves all four; down at the one is not down at the other."""
    path = tmp_path / "switches.json"
    write_switches(path, {"shipping": {"down": True}})
    assert board_on(path, "shipping")[0].current().down
    assert not board_on(path, "payments")[0].current().down


def test_next_is_counted_down_and_anew_with_each_change(tmp_path: Path) -> None:
    """``{"next": 2}`` strikes twice, and twice again when the file was replaced."""
    path = tmp_path / "switches.json"
    lose_two = {"payments": {"charge": {"lose_reply": {"next": 2}}}}
    write_switches(path, lose_two)
    board, _ = board_on(path)
    assert [board.strikes(Fault.LOSE_REPLY, "charge", "x") for _ in range(4)] == [
        True,
        True,
        False,
        False,
    ]
    write_switches(path, lose_two)
    assert board.strikes(Fault.LOSE_REPLY, "charge", "x")


def test_chances_are_repeated_by_their_seed(tmp_path: Path) -> None:
    """The same seed decides the same way for the same attempt, another one otherwise."""
    attempts = [f"saga-{number}/charge/1/1" for number in range(1000)]

    def struck(seed: int) -> list[str]:
        path = tmp_path / f"{seed}.json"
        write_switches(path, {"seed": seed, "payments": {"charge": {"fail_before": 0.3}}})
        board, _ = board_on(path)
        return [each for each in attempts if board.strikes(Fault.FAIL_BEFORE, "charge", each)]

    assert struck(7) == struck(7)
    assert struck(7) != struck(8)
    assert 200 < len(struck(7)) < 400


def test_probability_one_always_and_zero_never_strikes(tmp_path: Path) -> None:
    """The ends of the scale are certain."""
    path = tmp_path / "switches.json"
    write_switches(path, {"payments": {"charge": {"slow": 1, "slow_s": 0.5, "decline": 0}}})
    board, _ = board_on(path)
    counted = Counter(
        fault
        for fault in (Fault.SLOW, Fault.DECLINE)
        for number in range(100)
        if board.strikes(fault, "charge", str(number))
    )
    assert counted == {Fault.SLOW: 100}
    assert board.slow_s("charge") == 0.5


def test_a_broken_file_changes_nothing_and_is_complained_of_once(tmp_path: Path) -> None:
    """A slip of the keyboard does not stop the shop; it is said, and the next file counts."""
    path = tmp_path / "switches.json"
    write_switches(path, {"payments": {"down": True}})
    board, complaints = board_on(path)
    path.write_text('{"payments": {"dwon": true}}', encoding="utf-8")
    assert board.current().down
    assert board.current().down
    assert len(complaints) == 1
    assert "payments.dwon: unknown" in complaints[0]
    path.write_text("{", encoding="utf-8")
    assert board.current().down
    assert "is not JSON" in complaints[1]
    write_switches(path, {})
    assert not board.current().down


def test_a_broken_file_is_refused_at_the_start(tmp_path: Path) -> None:
    """A service does not start with switches that it does not understand."""
    path = tmp_path / "switches.json"
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(SwitchesError, match="not a JSON object"):
        board_on(path)


BROKEN: dict[str, tuple[object, str]] = {
    "an unknown service": ({"payment": {}}, "payment: unknown; known are seed, orders"),
    "an unknown operation": (
        {"payments": {"ship": {}}},
        "payments.ship: unknown; known are down, charge, refund",
    ),
    "an unknown fault": ({"payments": {"charge": {"explode": 1}}}, "charge.explode: unknown"),
    "a refund that is declined": (
        {"payments": {"refund": {"decline": 1}}},
        "payments.refund.decline: unknown",
    ),
    "a chance above 1": ({"payments": {"charge": {"slow": 2}}}, "charge.slow: must be a prob"),
    "a chance below 0": ({"payments": {"charge": {"slow": -0.1}}}, "charge.slow: must be a prob"),
    "a chance that is no number": (
        {"payments": {"charge": {"slow": "often"}}},
        "charge.slow: must be a prob",
    ),
    "a chance that is a truth": (
        {"payments": {"charge": {"slow": True}}},
        "charge.slow: must be a prob",
    ),
    "a chance that is not a number": (
        {"payments": {"charge": {"slow": float("nan")}}},
        "charge.slow: must be a prob",
    ),
    "no next time": ({"payments": {"charge": {"slow": {"next": 0}}}}, "charge.slow: must be"),
    "more than next": (
        {"payments": {"charge": {"slow": {"next": 1, "p": 1}}}},
        "charge.slow: must be",
    ),
    "an endless wait": ({"payments": {"charge": {"slow_s": 1e9}}}, "charge.slow_s: must be"),
    "a down that is no truth": ({"payments": {"down": 1}}, "payments.down: must be true or false"),
    "a service that is no object": ({"payments": 1}, "payments: must be an object"),
    "an operation that is no object": (
        {"payments": {"charge": 1}},
        "payments.charge: must be an object",
    ),
    "a vote that an effect breaks": (
        {"payments": {"charge": {"break_vote": 1}}},
        "charge.break_vote: unknown",
    ),
    "a seed that is no number": ({"seed": "x"}, "seed: must be a whole number"),
}


OF_A_BRANCH: dict[str, str] = {
    "commit_debit": "decline",
    "roll_back_credit": "decline",
    "prepare_debit": "break_vote",
    "debit": "slow",
    "commit_collect": "slow",
}


@pytest.mark.parametrize("operation", OF_A_BRANCH)
def test_what_cannot_go_wrong_at_a_branch_is_refused(operation: str) -> None:
    """Votes are declined, decisions broken; and a branch has its own actions alone."""
    with pytest.raises(SwitchesError, match=rf"bank-east\.{operation}.*unknown"):
        parse({"bank-east": {operation: {OF_A_BRANCH[operation]: 1}}}, "bank-east")


def test_a_change_is_counted_for_those_who_are_held(tmp_path: Path) -> None:
    """Any change lets go, also a file that is gone; looking again does not."""
    path = tmp_path / "switches.json"
    write_switches(path, {"bank-west": {"prepare_credit": {"hold_reply": {"next": 1}}}})
    board, _ = board_on(path, "bank-west")
    assert board.strikes(Fault.HOLD_REPLY, "prepare_credit", "x")
    version = board.version()
    assert board.version() == version
    write_switches(path, {})
    assert board.version() == version + 1
    path.unlink()
    assert board.version() == version + 2


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_meant_is_refused(name: str) -> None:
    """Each fault of a file is named with its place."""
    document, expected = BROKEN[name]
    with pytest.raises(SwitchesError) as refused:
        parse(document, "payments")
    assert expected in str(refused.value)


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    """Nobody has to mend a file line by line; and a broken document is never written."""
    document = {"seed": 1.5, "payments": {"down": 1, "charge": {"slow": 2, "explode": 1}}}
    with pytest.raises(SwitchesError) as refused:
        write_switches(tmp_path / "switches.json", document)
    for expected in ("seed:", "payments.down:", "charge.slow:", "charge.explode:"):
        assert expected in str(refused.value)
    assert not (tmp_path / "switches.json").exists()


def test_the_examples_in_the_documentation_are_valid() -> None:
    """The examples on top of the module and in docs/demo.md can be copied."""
    text = str(switches_module.__doc__)
    example = text[text.index("    {\n") : text.index("\n    }\n") + len("\n    }\n")]
    switches = parse(json.loads(example), "payments")
    assert switches.seed == 7
    assert switches.operations["charge"].chances[Fault.LOSE_REPLY].next == 1
    branch = parse(json.loads(example), "bank-west")
    assert branch.operations["prepare_credit"].chances[Fault.HOLD_REPLY].next == 1
    blocks = DOCS.read_text(encoding="utf-8").split("```json\n")[1:]
    an_order, a_transfer, broken = (json.loads(block.partition("```")[0]) for block in blocks)
    assert read_order(an_order).amount_cents == 3 * 6_50
    assert read_transfer(a_transfer).debit_cents == 525
    assert parse(broken, "inventory").down
    assert parse(broken, "payments").operations["charge"].chances[Fault.DECLINE].p == 0.33
