"""Two-phase commits on the command line: who waits for whom, with real processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from amends.barrier.prepared_id import GlobalId, VoteLife
from amends_runtime.cli.app import run
from tests.cli.conftest import Served, environment
from tests.cli.test_operating import asked_at_a_terminal

GID = str(GlobalId(VoteLife("s", "t-1", "debit", 1), "i", "AAAAAAAA"))
PROGRAM = Path(__file__).with_name("branch_program.py")
PAGE = Path(__file__).parents[2] / "docs" / "operating.md"
TRANSFER: dict[str, Any] = {
    "name": "transfer",
    "mode": "two_phase_commit",
    "deadline_s": 600,
    "locked_retries": 100,  # more than there can be before a gate is opened
    "steps": [
        {"name": "debit", "participant": "east", "action": "debit"},
        {"name": "credit", "participant": "west", "action": "credit"},
    ],
}
# Nothing of it is tried again within the time of a test, unless somebody says so.
PATIENT = {
    **TRANSFER,
    "name": "patient",
    "steps": [
        {**step, "retry": {"first_s": 86_400, "max_s": 86_400}} for step in TRANSFER["steps"]
    ],
}


class Bank:
    """A runtime and two branches of a bank, all in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.gates = folder / "gates"
        self.gates.mkdir()
        self.branches: dict[str, subprocess.Popen[str]] = {}
        self.runtimes: list[Served] = []
        for name in ("east", "west"):
            self.start_branch(name)
        for definition in (TRANSFER, PATIENT):
            file = folder / f"{definition['name']}.json"
            file.write_text(json.dumps(definition), encoding="utf-8")

    def start_branch(self, name: str) -> None:
        """Start a branch over its own database, at its own address."""
        files = (str(self.folder / f"{name}.db"), self.address(name), str(self.gates))
        process = subprocess.Popen(
            [sys.executable, str(PROGRAM), name, *files],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment(),
            text=True,
        )
        self.branches[name] = process
        assert process.stdout is not None
        assert process.stdout.readline().strip() == self.address(name)

    def start_stand_in(self) -> str:
        """Start the program of the page for operators; return where it listens."""
        (block,) = re.findall(r"```python\n(# stand_in\.py\n.*?)```", PAGE.read_text(), re.DOTALL)
        (self.folder / "stand_in.py").write_text(block, encoding="utf-8")
        address = f"unix:{self.folder}/stand_in.sock"
        program = (
            "import amends, stand_in;"
            f"amends.run(stand_in.east, {address!r}, on_ready=lambda _: print('up', flush=True))"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=self.folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment(),
            text=True,
        )
        self.branches["stand-in"] = process
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        return address

    def kill_branch(self, name: str) -> None:
        """Kill its process."""
        with self.branches.pop(name) as process:
            process.kill()

    def address(self, name: str) -> str:
        """Where a branch listens."""
        return f"unix:{self.folder}/{name}.sock"

    def open_gate(self, saga_id: str) -> None:
        """Let whatever keeps a branch from answering for this saga be over."""
        (self.gates / saga_id).touch()

    def serve(self, database: str = "amends.db") -> str:
        """Start a runtime over this database; return its address."""
        served = Served(
            *("--listen", "127.0.0.1:0", "--database", database),
            *("--definition", "transfer.json", "--definition", "patient.json"),
            *(f"--participant={name}={self.address(name)}" for name in ("east", "west")),
            cwd=self.folder,
        )
        self.runtimes.append(served)
        address: str = served.wait_for("amends is up")["address"]
        return address

    def close(self) -> None:
        """End all processes."""
        for served in self.runtimes:
            served.close()
        for name in list(self.branches):
            self.kill_branch(name)


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bank]:
    """The branches."""
    bank = Bank(tmp_path_factory.mktemp("bank"))
    yield bank
    bank.close()


@pytest.fixture(scope="module")
def bank_target(bank: Bank) -> str:
    """The runtime's address."""
    return bank.serve()


@pytest.fixture(autouse=True)
def asking(bank_target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands of this process ask the runtime of these tests."""
    for name in [name for name in os.environ if name.startswith("AMENDS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AMENDS_TARGET", bank_target)


Ask = Callable[..., Any]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Ask:
    """Run a command and give its JSON document."""

    def ask(*arguments: str, code: int = 0) -> Any:
        capsys.readouterr()  # what commands before it have printed
        assert run([*arguments, "-o", "json"]) == code
        return json.loads(capsys.readouterr().out)

    return ask


def start(saga_id: str, definition: str = "transfer", **told: str) -> None:
    """Start a transfer."""
    assert run(["start", definition, "--id", saga_id, "--input", json.dumps(told)]) == 0


def until(ask: Ask, saga_id: str, holds: Callable[[list[dict[str, Any]]], bool]) -> Any:
    """Look at who is in doubt until it is as it should be, at most until the saga has ended."""
    while not holds((found := ask("in-doubt", saga_id))["branches"]):
        assert found["branches"], "the saga has ended"
    return found


def test_who_has_voted_waits_for_who_has_not(
    bank: Bank, ask: Ask, capsys: pytest.CaptureFixture[str]
) -> None:
    """One holds what it voted yes for, the other perhaps something, and that holds up the first."""
    start("votes-1", wait="west")
    found = until(ask, "votes-1", lambda each: any(one["voted_yes"] for one in each))
    started = ask("get", "votes-1")["started_at_ms"]
    [first, second] = found["branches"]
    assert (first["participant"], first["voted_yes"], first["since_ms"]) == ("west", False, started)
    assert first["waits_for"] == ["west"]
    assert (second["participant"], second["action"], second["step"]) == ("east", "debit", "debit")
    assert (second["state"], second["decision"], second["round"]) == ("PREPARED", "PENDING", 1)
    assert second["since_ms"] >= started
    assert second["waits_for"] == ["west"]
    [waited_for] = found["waited_for"]
    assert (waited_for["participant"], waited_for["holds_up"]) == ("west", {"east": 1})
    assert (found["sagas"], found["not_looked_at"]) == (1, 0)

    assert run(["decision", "votes-1"]) == 0
    told, whose = capsys.readouterr().out.splitlines()
    assert told == "PENDING in round 1: votes are being collected, and the decision will come"
    runtime = ask("runtime")
    assert f"store {runtime['store_id']} " in whose
    assert "--gid" in whose
    assert run(["get", "votes-1"]) == 0
    assert "none yet: 1 of 2 have voted yes" in capsys.readouterr().out

    bank.open_gate("votes-1")
    assert ask("wait", "votes-1")["decision"] == "COMMIT"
    assert run(["in-doubt", "votes-1"]) == 0
    assert capsys.readouterr().out == "nothing is in doubt\n"


def test_who_fails_to_commit_is_waited_for(
    bank: Bank, ask: Ask, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other has been told and holds nothing; the error and the next attempt are there."""
    start("commits-1", "patient", fail="east")
    found = until(
        ask,
        "commits-1",
        lambda each: bool(len(each) == 1 and each[0]["next_attempt_at_ms"]),
    )
    [branch] = found["branches"]
    assert (branch["participant"], branch["decision"], branch["verb"]) == (
        *("east", "COMMIT", "execute"),
    )
    assert branch["voted_yes"]
    assert (branch["waits_for"], branch["told"]) == (["east"], ["west"])
    assert "OSError" in branch["last_error"]["message"]

    # Decided is decided.
    for command in ("cancel", "abandon"):
        yes = ["--yes"] if command == "abandon" else []
        assert run([command, "commits-1", "--reason", "x", *yes]) == 4
        [line] = capsys.readouterr().err.splitlines()
        assert "has decided COMMIT" in line
    runtime = ask("runtime")
    assert ask("decision", "commits-1") == {
        "saga_id": "commits-1",
        "round": 1,
        "store_id": runtime["store_id"],
        "incarnation": runtime["incarnation"],
        "decision": "COMMIT",
        "known": True,
        "restored": False,
    }

    bank.open_gate("commits-1")
    assert run(["retry", "commits-1", "--reason", "the disk has room"]) == 0
    assert ask("wait", "commits-1")["state"] == "COMPLETED"


def test_a_participant_that_dies_while_prepared(
    bank: Bank, ask: Ask, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said who is away and who has been told; when it is back, it commits what it held."""
    start("dies-1", wait="west")
    until(ask, "dies-1", lambda each: any(one["voted_yes"] for one in each))
    bank.kill_branch("east")
    bank.open_gate("dies-1")
    found = until(ask, "dies-1", lambda each: bool(len(each) == 1 and each[0]["last_error"]))
    [branch] = found["branches"]
    assert (branch["participant"], branch["told"]) == ("east", ["west"])
    assert branch["last_error"]["reason"] == "UNAVAILABLE"
    assert run(["in-doubt", "--participant", "east", "--definition", "transfer"]) == 0
    shown = capsys.readouterr().out
    header, row, _, of_whom, whom, _, summary = shown.splitlines()
    assert header.split()[:3] == ["SINCE", "ID", "DEFINITION"]
    assert row.split()[1:6] == ["dies-1", "transfer", "COMMIT", "debit", "east/debit"]
    assert of_whom.startswith("WAITED FOR")
    assert whom.startswith("east")
    assert summary.startswith("1 branch in 1 saga; the oldest since ")
    bank.start_branch("east")
    assert run(["retry", "dies-1", "--reason", "east is back"]) in (0, 4)  # it may be at it already
    assert ask("wait", "dies-1")["state"] == "COMPLETED"


def test_a_participant_that_is_lost_for_ever(
    bank: Bank, ask: Ask, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stand-in under its name answers for it, as the page says; the others have finished."""
    start("lost-1", wait="west")
    until(ask, "lost-1", lambda each: any(one["voted_yes"] for one in each))
    bank.kill_branch("east")
    bank.open_gate("lost-1")
    until(ask, "lost-1", lambda each: len(each) == 1)
    address = bank.start_stand_in()
    why = ("--reason", "lost for ever, ticket 4711")
    assert run(["participants", "add", f"east={address}", *why]) == 0
    saga = ask("wait", "lost-1", code=6)
    assert (saga["state"], saga["decision"]) == ("MIXED", "COMMIT")
    assert [step["state"] for step in saga["steps"]] == ["BROKEN", "EXECUTED"]
    assert saga["steps"][0]["last_error"]["reason"] == "east_lost"
    assert ask("in-doubt", "--participant", "east")["branches"] == []
    # New transfers are refused, and what is rolled back is as decided.
    start("lost-2", wait="west")
    bank.open_gate("lost-2")
    assert ask("wait", "lost-2", code=6)["state"] == "COMPENSATED"
    bank.kill_branch("stand-in")
    bank.start_branch("east")
    assert run(["participants", "remove", "east", *why]) == 0
    start("found-1")
    assert ask("wait", "found-1")["state"] == "COMPLETED"


def test_filters_and_limits(bank: Bank, ask: Ask, capsys: pytest.CaptureFixture[str]) -> None:
    """The oldest first; what is younger or elsewhere is left out; what was cut off is said."""
    for number in range(3):
        start(f"many-{number}", wait="west")
        until(ask, f"many-{number}", lambda each: any(one["voted_yes"] for one in each))
    found = ask("in-doubt")
    assert [each["saga_id"] for each in found["branches"]] == [
        *("many-0", "many-0", "many-1", "many-1", "many-2", "many-2"),
    ]
    assert found["oldest_since_ms"] == found["branches"][0]["since_ms"]
    # West's own branches, and those that wait for its vote.
    assert len(ask("in-doubt", "--participant", "west")["branches"]) == 6
    assert len(ask("in-doubt", "--participant", "east")["branches"]) == 3
    # Nothing that was asked for is not nothing; a name that there is not is no answer at all.
    assert ask("in-doubt", "--definition", "patient")["branches"] == []
    assert ask("in-doubt", "--older-than", "1h")["branches"] == []
    for few in (["--definition", "patient"], ["--older-than", "1h", "--participant", "east"]):
        assert run(["in-doubt", *few]) == 0
        said = "nothing of what you asked for is in doubt; 6 other branches are\n"
        assert capsys.readouterr().out == said
    assert run(["in-doubt", "--participant", "east", "--older-than", "1h", "--limit", "1"]) == 0
    assert "is in doubt; at least 2 other branches are" in capsys.readouterr().out
    for few, known in (
        (["--participant", "north"], "no participant 'north'; those that there are: east, west"),
        (["--definition", "order"], "no definition 'order'; those that there are: patient, transf"),
    ):
        assert run(["in-doubt", *few]) == 3
        out, err = capsys.readouterr()
        assert out == ""
        assert known in err

    assert run(["in-doubt", "--limit", "1", "-o", "jsonl"]) == 0
    out, err = capsys.readouterr()
    assert [json.loads(line)["saga_id"] for line in out.splitlines()] == ["many-0", "many-0"]
    assert err == (
        "amends: 2 younger unfinished sagas were not looked at; --limit 10 looks at more\n"
    )
    for number in range(3):
        assert run(["abandon", f"many-{number}", "--reason", "enough", "--yes"]) == 0
        bank.open_gate(f"many-{number}")
        assert f"many-{number} is aborted" in capsys.readouterr().out
        assert ask("wait", f"many-{number}", code=6)["state"] == "COMPENSATED"
    assert run(["in-doubt"]) == 0
    assert capsys.readouterr().out == "nothing is in doubt\n"


@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        ("in-doubt nope", 3, "there is no saga 'nope'"),
        ("in-doubt nope --participant east", 2, "leave the filters out"),
        ("in-doubt --older-than 30", 2, "write a number and its unit, as in 30s"),
        ("in-doubt --limit 0", 2, "--limit"),
        ("decision x --round 0", 2, "--round"),
        ("decision", 2, "give a saga's id, or a vote's name with --gid"),
        ("decision x --store-id s --round 1", 2, "give all three"),
        ("decision x --store-id s --incarnation i", 2, "give all three"),
        ("decision --store-id s --incarnation i --round 1", 2, "give a saga's id"),
        ("decision --gid mine", 2, "is no name of a vote"),
        (f"decision --gid {GID} --round 1", 2, "leave --store-id, --incarnation and --round out"),
        (f"decision x --gid {GID}", 2, "is a vote of saga t-1, not of x"),
        ("confirm-restore --reason x", 2, "--yes: is missing"),
        ("confirm-restore --yes", 2, "--reason requires an argument"),
    ],
)
def test_what_cannot_be_asked_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: str, code: int, what: str
) -> None:
    """Exit codes as everywhere."""
    assert run(arguments.split()) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert what in err
    assert "internal" not in err


def test_a_saga_that_is_no_two_phase_commit(
    target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says so, with exit code 4; and among all sagas it is not in doubt."""
    assert run(["start", "order", "--id", "plain-1", "--wait", "--target", target]) == 0
    capsys.readouterr()
    for command in ("in-doubt", "decision"):
        assert run([command, "plain-1", "--target", target]) == 4
        assert "is no two-phase commit" in capsys.readouterr().err
    assert run(["in-doubt", "--target", target]) == 0
    assert capsys.readouterr().out == "nothing is in doubt\n"


def test_an_end_that_is_mixed(ask: Ask, capsys: pytest.CaptureFixture[str]) -> None:
    """The branch that did not keep its vote is named; the exit code is 6; history says who did."""
    start("mixed-1", alone="west")
    assert ask("wait", "mixed-1", code=6)["state"] == "MIXED"
    assert run(["get", "mixed-1"]) == 0
    shown = capsys.readouterr().out
    assert "credit: not as was decided; look there, and put it right by hand" in shown
    assert "expired: the hold had expired" in shown
    records = ask("history", "mixed-1")["records"]
    [alone] = [each for each in records if each["kind"] == "HeuristicReported"]
    assert (alone["step"], alone["committed"], alone["failure"]["reason"]) == (
        *("credit", False, "expired"),
    )
    assert run(["watch", "mixed-1"]) == 6
    told = capsys.readouterr().out
    assert "credit votes yes" in told
    assert "decides COMMIT" in told
    assert "credit has rolled back alone: expired: the hold had expired" in told
    assert told.rstrip().endswith("ended MIXED")


def test_a_vote_of_no_and_a_further_round(
    bank: Bank, ask: Ask, capsys: pytest.CaptureFixture[str]
) -> None:
    """A refusal aborts; a refusal for a lock is tried again, and each round has its decision."""
    start("refused-1", refuse="west")
    assert ask("wait", "refused-1", code=6)["decision"] == "ABORT"
    assert run(["watch", "refused-1"]) == 6
    told = capsys.readouterr().out
    assert "credit votes no: insufficient: the account has too little; decides ABORT" in told
    assert run(["get", "refused-1"]) == 0
    assert "rejected by credit: insufficient" in capsys.readouterr().out

    start("locked-1", locked="west")
    while ask("get", "locked-1")["round"] < 2:
        pass
    bank.open_gate("locked-1")
    saga = ask("wait", "locked-1")
    assert (saga["state"], saga["decision"]) == ("COMPLETED", "COMMIT")
    assert ask("decision", "locked-1", "--round", "1")["decision"] == "ABORT"
    assert ask("decision", "locked-1")["round"] == saga["round"]
    assert ask("decision", "locked-1", "--round", "99")["decision"] == "ABORT"  # it has ended
    assert run(["watch", "locked-1"]) == 0
    told = capsys.readouterr().out
    assert "is to be tried again in round 2: from " in told
    assert "prepare debit, attempt 1 of round 2" in told
    assert run(["history", "locked-1"]) == 0
    assert "RoundPlanned" in capsys.readouterr().out


def test_of_a_saga_that_is_not_here_nothing_is_said_without_the_votes_own_identity(
    bank: Bank, ask: Ask, capsys: pytest.CaptureFixture[str]
) -> None:
    """With it, exactly what the participant is told; an ABORT is one for that vote alone."""
    runtime = ask("runtime")
    for output in ("table", "json"):
        assert run(["decision", "never-seen", "-o", output]) == 3
        out, err = capsys.readouterr()
        assert out == ""
        assert "saga never-seen is unknown here" in err
        assert f"in store {runtime['store_id']}" in err
        assert "--gid" in err
        assert "Nobody may act on this" in err
        assert "ABORT" not in err

    vote = VoteLife(runtime["store_id"], "never-seen", "debit", 3)
    name = str(GlobalId(vote, runtime["incarnation"], "AAAAAAAA"))
    expected = {
        "saga_id": "never-seen",
        "round": 3,
        "store_id": runtime["store_id"],
        "incarnation": runtime["incarnation"],
        "decision": "ABORT",
        "known": False,
        "restored": False,
    }
    assert ask("decision", "--gid", name) == expected
    assert ask("decision", "never-seen", "--gid", name) == expected
    store, incarnation = ("--store-id", vote.store_id), ("--incarnation", runtime["incarnation"])
    assert ask("decision", "never-seen", *store, *incarnation, "--round", "3") == expected
    assert run(["decision", "--gid", name]) == 0
    assert capsys.readouterr().out == (
        "ABORT in round 3: all are to roll back; the store that asked for this vote has no such "
        "saga, so nothing was decided\n"
    )

    # Another store's vote, and another copy's of this one: this runtime must not guess.
    start("mine-1")
    assert ask("wait", "mine-1")["decision"] == "COMMIT"
    for store_id, incarnation_id, why in (
        (str(uuid.UUID(int=7)), runtime["incarnation"], "this runtime has store"),
        (runtime["store_id"], str(uuid.UUID(int=8)), "another copy of this store"),
    ):
        vote = VoteLife(store_id, "mine-1", "debit", 1)
        name = str(GlobalId(vote, incarnation_id, "AAAAAAAA"))
        assert run(["decision", "--gid", name]) == 0
        told = capsys.readouterr().out
        assert told.startswith("UNKNOWN in round 1: nothing may be said")
        assert why in told
        assert ask("decision", "--gid", name)["decision"] == "UNKNOWN"


def test_a_definition_that_was_fetched_is_the_same_content(
    bank: Bank, ask: Ask, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it is shown it is a file; what differs is said in a file's words."""
    fetched = ask("definitions", "get", "transfer")
    file = bank.folder / "fetched.json"
    file.write_text(json.dumps(fetched["definition"]), encoding="utf-8")
    assert run(["definitions", "register", str(file), "-o", "json"]) == 0
    [again] = json.loads(capsys.readouterr().out)["definitions"]
    assert (again["existed"], again["version"]) == (True, 1)
    assert again["content_hash"] == fetched["content_hash"]
    file.write_text(json.dumps({**TRANSFER, "ordered": True, "locked_retries": 1}))
    assert run(["definitions", "diff", str(file)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "ordered was false, becomes true",
        "locked_retries was 100, becomes 1",
    ]
    assert run(["definitions", "get", "transfer"]) == 0
    shown = capsys.readouterr().out
    assert "TWO_PHASE_COMMIT" in shown
    assert "all at once" in shown


def test_a_restored_store_is_confirmed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Until somebody has, nobody in doubt is told anything; a terminal is shown and asked first."""
    bank = Bank(tmp_path)
    try:
        first = bank.serve()
        assert run(["runtime", "--target", first]) == 0
        assert "restored" not in capsys.readouterr().out
        assert run(["confirm-restore", "--reason", "x", "--yes", "--target", first]) == 0
        assert "there is nothing to confirm" in capsys.readouterr().out
        bank.runtimes[0].process.terminate()
        assert bank.runtimes[0].wait_ended() == 0
        shutil.copy(tmp_path / "amends.db", tmp_path / "backup.db")

        second = bank.serve("backup.db")
        assert run(["runtime", "--target", second]) == 0
        assert "nobody has confirmed it" in capsys.readouterr().out
        command = ("confirm-restore", "--reason", "compared", "--author", "me")
        code, asked = asked_at_a_terminal("n\n", *command, target=second)
        assert code == 2
        assert run(["runtime", "-o", "json", "--target", second]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["restored"]
        assert found["incarnation"] in asked
        assert run([*command, "--yes", "-o", "json", "--target", second]) == 0
        assert json.loads(capsys.readouterr().out) == {
            "incarnation": found["incarnation"],
            "confirmed": True,
        }
        assert run(["runtime", "--target", second]) == 0
        assert "restored" not in capsys.readouterr().out
    finally:
        bank.close()
