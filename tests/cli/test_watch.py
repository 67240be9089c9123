"""`amends watch`: live, in order, once each, through restarts, until somebody ends it."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from amends.sagas import WatchEvent
from amends_runtime.cli.app import run
from amends_runtime.cli.options import COMMON
from amends_runtime.cli.watching import _Events
from tests.cli.conftest import ORDER, PATIENCE_S, Serve, amends, environment
from tests.cli.test_commands import on_a_terminal


class Watching:
    """`amends watch` as a process of its own; it watches once it is made."""

    def __init__(self, target: str, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "amends_runtime", "watch", "-o", "jsonl", *arguments],
            env=environment(AMENDS_TARGET=target),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def next(self) -> dict[str, Any]:
        """Wait for the next line."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        found: dict[str, Any] = json.loads(line)
        return found

    def next_turn(self) -> dict[str, Any]:
        """Wait for the next line that is no notice."""
        while (event := self.next())["saga"] is None:
            pass
        return event

    def until_ended(self, *saga_ids: str) -> list[dict[str, Any]]:
        """All turns up to the last end of these sagas."""
        turns: list[dict[str, Any]] = []
        left = set(saga_ids)
        while left:
            turns.append(self.next_turn())
            if turns[-1]["records"][-1]["kind"] == "SagaEnded":
                left.discard(turns[-1]["saga"]["saga_id"])
        return turns

    def end(self, number: signal.Signals = signal.SIGINT) -> tuple[int, str]:
        """Send a signal; return the exit code and standard error."""
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, err

    def close(self) -> None:
        """End it whatever it does."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@pytest.fixture
def watching(target: str) -> Iterator[Any]:
    """Begin to watch; the first notice has come."""
    begun: list[Watching] = []

    def begin(*arguments: str, at: str = target) -> Watching:
        one = Watching(at, *arguments)
        begun.append(one)
        assert one.next()["saga"] is None
        return one

    yield begin
    for one in begun:
        one.close()


def start(target: str, definition: str, saga_id: str, *arguments: str) -> None:
    """Start a saga, and wait for its end if there will be one."""
    started = amends("start", definition, "--id", saga_id, *arguments, "--target", target)
    assert started.returncode in (0, 6), started.stderr


def test_every_turn_is_a_line(watching: Any, target: str) -> None:
    """The saga after the turn without steps and payloads, the turn's records, a token."""
    one = watching("--label", "shelf=watch-1")
    shelf = ("--label", "shelf=watch-1")
    start(target, "order", "watch-other", "--label", "shelf=other", "--wait")
    start(target, "order", "watch-1", *shelf, "--input", '{"amount": 7}', "--wait")
    turns = one.until_ended("watch-1")
    assert {turn["saga"]["saga_id"] for turn in turns} == {"watch-1"}
    kinds = [record["kind"] for turn in turns for record in turn["records"]]
    assert kinds == ["SagaStarted", "AttemptStarted", "StepExecuted", "SagaEnded"]
    assert [turn["saga"]["state"] for turn in turns] == ["RUNNING", "COMPLETED"]
    assert not {"steps", "input", "turn"} & turns[0]["saga"].keys()
    assert turns[0].keys() == {"saga", "records", "resume_token", "lagged", "purged_turns"}
    started = turns[0]["records"][0]
    assert started["input"].keys() == {"content_type", "size"}  # no payloads unless asked for
    assert len({turn["resume_token"] for turn in turns}) == len(turns)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_whoever_ends_it_is_told_how_to_go_on(
    watching: Any, target: str, number: signal.Signals, code: int
) -> None:
    """What happens in between is told by the next one, and nothing is told twice."""
    shelf = ("--label", f"shelf=resume-{code}")
    one = watching(*shelf)
    start(target, "order", f"before-{code}", *shelf, "--wait")
    seen = one.until_ended(f"before-{code}")
    ended, err = one.end(number)
    assert ended == code
    found = re.fullmatch(r"amends: to go on: --resume (\S+)\n", err)
    assert found
    assert found[1] == seen[-1]["resume_token"]
    start(target, "order", f"between-{code}", *shelf, "--wait")
    again = watching(*shelf, "--resume", found[1])
    turns = again.until_ended(f"between-{code}")
    assert {turn["saga"]["saga_id"] for turn in turns} == {f"between-{code}"}
    assert len(turns) == len(seen)


def test_states_are_those_after_the_turn(watching: Any, target: str) -> None:
    """A saga that turns back is found by its end, whatever it was before."""
    one = watching("--state", "compensated", "--definition", "turning")
    start(target, "turning", "states-1", "--wait")
    turn = one.next_turn()
    assert (turn["saga"]["saga_id"], turn["saga"]["state"]) == ("states-1", "COMPENSATED")
    assert turn["records"][-1]["state"] == "COMPENSATED"


def test_a_restart_of_the_runtime_is_waited_out(
    watching: Any, serve: Serve, tmp_path: Path, payments: str
) -> None:
    """Killed and started again: nothing is lost, and nothing is told twice."""
    (tmp_path / "order.json").write_text(json.dumps(ORDER), encoding="utf-8")
    listen = f"unix:{tmp_path}/amends.sock"
    arguments = ("--listen", listen, "--definition", "order.json")
    paying = ("--participant", f"payments={payments}")
    first = serve(*arguments, *paying)
    first.wait_for("amends is up")
    one = watching(at=listen)
    start(listen, "order", "old-1", "--wait")
    turns = one.until_ended("old-1")
    first.process.kill()
    first.wait_ended()
    second = serve(*arguments, *paying)
    second.wait_for("amends is up")
    start(listen, "order", "new-1", "--wait")
    turns += one.until_ended("new-1")
    told = [(turn["saga"]["saga_id"], turn["saga"]["version"]) for turn in turns]
    assert told == [("old-1", 1), ("old-1", 2), ("new-1", 1), ("new-1", 2)]


def test_a_reader_that_leaves_ends_it_at_once(target: str) -> None:
    """As in `amends watch -o jsonl | head -1`: it does not wait for the next turn to notice."""
    piped = subprocess.run(
        [
            *("/bin/bash", "-o", "pipefail", "-c"),
            '"$0" -m amends_runtime watch --definition nobody-starts -o jsonl | head -1',
            sys.executable,
        ],
        env=environment(AMENDS_TARGET=target),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (piped.returncode, piped.stderr) == (0, "")
    [line] = piped.stdout.splitlines()
    assert json.loads(line)["saga"] is None


# -- one saga --------------------------------------------------------------------------------------


def test_one_saga_is_followed_from_its_beginning_to_its_end(
    target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its whole history in words, also when it has ended; the exit code says how."""
    start(target, "order", "follow-1", "--input", '{"amount": 101}', "--wait")
    assert run(["watch", "follow-1", "--target", target]) == 6
    out, err = capsys.readouterr()
    assert err == ""
    header, *lines = out.splitlines()
    assert header.split() == ["AT", "WHAT", "HAPPENED"]
    words = [line.split("  ", 1)[1] for line in lines]
    assert words[0] == "started; execute charge"
    assert words[1].startswith("charge is rejected: card_declined: above the limit")
    assert words[1].count("card_declined") == 1
    assert words[-1].endswith("ended COMPENSATED")
    assert "\x1b" not in out
    assert run(["watch", "follow-1", "--payloads", "--target", target]) == 6
    assert 'started: {"amount": 101}; execute charge' in capsys.readouterr().out
    assert run(["watch", "follow-1", "-o", "jsonl", "--target", target]) == 6
    watched = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert run(["history", "follow-1", "-o", "jsonl", "--target", target]) == 0
    assert watched == [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_one_saga_is_followed_while_it_runs(target: str) -> None:
    """What happens after it was asked for is told, each turn once."""
    start(target, "waiting", "follow-2")
    following = subprocess.Popen(
        [sys.executable, "-m", "amends_runtime", "watch", "follow-2", "-o", "jsonl"],
        env=environment(AMENDS_TARGET=target),
        stdout=subprocess.PIPE,
        text=True,
    )
    with following:
        assert following.stdout is not None
        first = json.loads(following.stdout.readline())
        assert first["kind"] == "SagaStarted"
        cancelled = amends("cancel", "follow-2", "--reason", "enough", "--target", target)
        assert cancelled.returncode == 0
        versions = [first["version"]]
        while (record := json.loads(following.stdout.readline()))["kind"] != "SagaTurnedBack":
            versions.append(record["version"])
        assert versions == sorted(versions)
        # Whether it ends depends on whether its call had left for the participant who is not there.
        following.kill()


def test_a_stuck_saga_that_is_followed_says_what_can_be_done(target: str) -> None:
    """Once, on standard error; whoever reads may retry it in another terminal."""
    start(target, "order", "follow-3", "--input", '{"broken": "charge"}')
    with subprocess.Popen(
        [sys.executable, "-m", "amends_runtime", "watch", "follow-3"],
        env=environment(AMENDS_TARGET=target),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as following:
        assert following.stderr is not None
        line = following.stderr.readline()
        following.send_signal(signal.SIGTERM)
        _, then = following.communicate(timeout=PATIENCE_S)
    assert then == "amends: saga follow-3 goes on; amends watch follow-3 shows all of it again\n"
    assert line.startswith("amends: saga follow-3 is STUCK since 20")
    assert "amends retry follow-3 --reason WHY tries again" in line
    assert following.returncode == 143


def test_a_terminal_gets_colours_and_whole_ids(target: str) -> None:
    """Lines wrap below their column; NO_COLOR turns colours off."""
    start(target, "order", "follow-4", "--input", '{"amount": 1}', "--wait")
    coloured = on_a_terminal("watch", "follow-4", AMENDS_TARGET=target)
    assert "\x1b[" in coloured
    plain = on_a_terminal("watch", "follow-4", AMENDS_TARGET=target, NO_COLOR="1")
    assert "\x1b" not in plain
    assert max(map(len, plain.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        ("watch -o json", 2, "-o json: a stream is not one document; write -o jsonl"),
        ("watch x --state STUCK", 2, "x: a saga's history is shown from its beginning"),
        ("watch x --resume y", 2, "leave --resume and the filters out"),
        ("watch nope", 3, "there is no saga 'nope'"),
        ("watch --resume nonsense", 2, "--resume: it is not a resume token: pass one that a watch"),
        ("watch --started-from later", 2, "--started-from later: is no instant"),
        ("watch --label x", 2, "--label x: write --label KEY=VALUE"),
    ],
)
def test_a_wrong_request_is_one_line(
    target: str, capsys: pytest.CaptureFixture[str], arguments: str, code: int, what: str
) -> None:
    """It says what to write instead."""
    assert run([*arguments.split(), "--target", target]) == code
    out, err = capsys.readouterr()
    assert out == ""
    [line] = err.splitlines()
    assert what in line


def test_nobody_at_the_target_is_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Only a runtime that was there is waited for."""
    for arguments in (["watch"], ["watch", "x"]):
        assert run([*arguments, "--target", "127.0.0.1:1"]) == 5
        assert "127.0.0.1:1" in capsys.readouterr().err


def _notice(**fields: Any) -> WatchEvent:
    return WatchEvent(saga=None, records=(), resume_token="token", **fields)  # noqa: S106


def test_a_watch_says_that_it_is_behind_and_what_was_purged(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On standard error: the first of several that lag, and each gap that cannot be told."""
    shown = _Events(COMMON, payloads=False)
    for lagged, purged in ((False, 0), (True, 0), (True, 3), (False, 0), (True, 0)):
        shown.print(_notice(lagged=lagged, purged_turns=purged))
    out, err = capsys.readouterr()
    assert out == ""
    behind = "amends: far behind what is committed; nothing is skipped, it only comes late"
    assert err.splitlines() == [
        behind,
        "amends: 3 turns from before here were purged and cannot be told",
        behind,
    ]
