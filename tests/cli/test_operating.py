"""`amends retry`, `abandon` and `participants`: what operators do, with real processes."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from amends_runtime.cli.app import run
from tests.cli.conftest import ORDER, PATIENCE_S, Serve, amends, environment

BROKEN = ("--input", '{"broken": "charge"}')


@pytest.fixture(autouse=True)
def asking(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands of this process ask the runtime of the tests."""
    for name in [name for name in os.environ if name.startswith("AMENDS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AMENDS_TARGET", target)


def stuck(capsys: pytest.CaptureFixture[str], definition: str, saga_id: str, *given: str) -> None:
    """Start a saga and wait until it is stuck; bounded by the test run's own patience."""
    assert run(["start", definition, "--id", saga_id, *given]) == 0
    while "STUCK" not in capsys.readouterr().err:
        assert run(["wait", saga_id, "--timeout", "0.05"]) == 5


def records(capsys: pytest.CaptureFixture[str], saga_id: str, kind: str) -> list[dict[str, object]]:
    """The saga's records of this kind."""
    assert run(["history", saga_id, "-o", "jsonl"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return [record for record in found if record["kind"] == kind]


# -- retry -----------------------------------------------------------------------------------------


def test_a_stuck_saga_is_tried_again(capsys: pytest.CaptureFixture[str]) -> None:
    """Author and reason land in the history; the participant is asked anew."""
    stuck(capsys, "order", "retry-1", *BROKEN)
    assert run(["retry", "retry-1", "--reason", "the ledger is back", "--author", "me"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("retry-1 is tried again; it is ")
    assert out.endswith("; amends watch retry-1 follows it\n")
    [acted] = records(capsys, "retry-1", "OperatorActed")
    assert (acted["author"], acted["reason"]) == ("me", "the ledger is back")
    stuck_again = ["wait", "retry-1", "--timeout", "0.05"]
    while "STUCK" not in capsys.readouterr().err:
        assert run(stuck_again) == 5
    assert len(records(capsys, "retry-1", "StepStuck")) == 2
    assert run(["retry", "retry-1", "--step", "charge", "--reason", "once more", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["saga_id"] == "retry-1"


@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        ("retry nope --reason x", 3, "there is no saga 'nope'"),
        ("retry idle --reason x", 4, ""),
        ("retry idle", 2, "--reason requires an argument"),
        ("retry idle --reason x --step nope", 3, "its steps: charge"),
        ("abandon nope --reason x --yes", 3, "there is no saga 'nope'"),
        ("abandon idle --reason x --yes", 4, ""),
        ("abandon idle --reason x", 2, "--yes: is missing"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: str, code: int, what: str
) -> None:
    """Unknown sagas are exit code 3; a saga that has ended or is not stuck is 4."""
    assert run(["start", "order", "--id", "idle", "--wait"]) == 0
    capsys.readouterr()
    assert run(arguments.split()) == code
    out, err = capsys.readouterr()
    assert out == ""
    [line] = err.splitlines()
    assert what in line
    assert "internal" not in line
    assert "amends list" not in line or "no saga" in line


def test_an_empty_reason_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """It would land in the history and help nobody there."""
    for command in (
        "retry x",
        "abandon x --yes",
        "participants add x=y:1",
        "participants remove x",
    ):
        assert run([*command.split(), "--reason", " "]) == 2
        assert "--reason: is empty; say why" in capsys.readouterr().err


# -- abandon ---------------------------------------------------------------------------------------


def test_an_abandoned_saga_names_what_remains(capsys: pytest.CaptureFixture[str]) -> None:
    """The step whose compensation is broken has had its effect, and nobody undoes it now."""
    stuck(capsys, "turning", "abandon-1", "--input", '{"broken": "refund"}')
    assert run(["abandon", "abandon-1", "--reason", "ticket 4711", "--author", "me", "--yes"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines() == [
        "abandon-1 has ended ABANDONED",
        "steps that may have an effect, which nobody undoes now:",
        "  charge",
    ]
    assert run(["wait", "abandon-1", "-o", "json"]) == 6
    assert json.loads(capsys.readouterr().out)["state"] == "ABANDONED"
    [acted] = records(capsys, "abandon-1", "OperatorActed")
    assert (acted["author"], acted["reason"]) == ("me", "ticket 4711")


def test_abandoning_has_a_document(capsys: pytest.CaptureFixture[str]) -> None:
    """The saga, and the names of the steps."""
    stuck(capsys, "turning", "abandon-2", "--input", '{"broken": "refund"}')
    assert run(["abandon", "abandon-2", "--reason", "x", "-y", "-o", "jsonl"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["saga"]["state"], found["remaining_steps"]) == ("ABANDONED", ["charge"])


def test_only_force_abandons_a_saga_that_is_not_stuck(capsys: pytest.CaptureFixture[str]) -> None:
    """It may still end by itself, so that it takes a word more."""
    assert run(["start", "waiting", "--id", "abandon-3"]) == 0
    capsys.readouterr()
    assert run(["abandon", "abandon-3", "--reason", "x", "--yes"]) == 4
    assert "--force" in capsys.readouterr().err
    assert run(["abandon", "abandon-3", "--reason", "x", "--yes", "--force"]) == 0
    assert "abandon-3 has ended ABANDONED" in capsys.readouterr().out


def asked_at_a_terminal(answer: str, *arguments: str, target: str) -> tuple[int, str]:
    """Run a command at a terminal, answer its question, return its exit code and what it wrote."""
    leader, follower = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "amends_runtime", *arguments],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=environment(TERM="dumb", AMENDS_TARGET=target),
    ) as process:
        os.close(follower)
        written = b""
        try:
            while b"[y/N]" not in written and (read := os.read(leader, 65536)):
                written += read
            os.write(leader, answer.encode())
            while read := os.read(leader, 65536):
                written += read
        except OSError:  # how Linux says that the other end is closed
            pass
        code = process.wait(timeout=PATIENCE_S)
        os.close(leader)
    return code, written.decode()


def test_a_terminal_is_asked_first(capsys: pytest.CaptureFixture[str], target: str) -> None:
    """Whatever is not yes leaves the saga as it is."""
    stuck(capsys, "order", "abandon-4", *BROKEN)
    command = ("abandon", "abandon-4", "--reason", "x")
    for answer in ("n\n", "\n", "\x04"):
        code, written = asked_at_a_terminal(answer, *command, target=target)
        assert code == 2
        assert "saga abandon-4 is STUCK (charge STUCK)" in written
        assert "saga abandon-4 is left as it is" in written
    code, written = asked_at_a_terminal("y\n", *command, target=target)
    assert code == 0
    assert "abandon-4 has ended ABANDONED" in written


# -- participants ----------------------------------------------------------------------------------


def test_a_participant_is_added_and_removed(
    serve: Serve, tmp_path: Path, payments: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Calls that wait leave for it; it survives a restart; removed, it is as configured."""
    (tmp_path / "order.json").write_text(json.dumps(ORDER), encoding="utf-8")
    listen = f"unix:{tmp_path}/amends.sock"
    wrong = "127.0.0.1:1"
    configured = ("--participant", f"payments={wrong}", "--definition", "order.json")
    first = serve("--listen", listen, *configured)
    first.wait_for("amends is up")
    to = ("--target", listen)
    started = amends("start", "order", "--id", "moved-1", *to)
    assert started.returncode == 0
    why = ("--reason", "it has moved")

    assert run(["participants", "add", f"payments={payments}", *why, *to]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    header, row = out.splitlines()
    assert header.split()[:3] == ["NAME", "ADDRESS", "FROM"]
    assert row.split()[:4] == ["payments", payments, "an", "operator"]
    assert amends("wait", "moved-1", "--timeout", "30", *to).returncode == 0
    assert run(["participants", "add", "extra=unix:/tmp/x", *why, "-o", "json", *to]) == 0
    out, err = capsys.readouterr()
    added = json.loads(out)
    assert (added["name"], added["by_operator"]) == ("extra", True)
    [note] = err.splitlines()
    assert note.startswith("amends: extra is added, and nothing answers at unix:/tmp/x yet: ")
    assert note.endswith("its calls wait until it answers: amends participants shows how it is")

    first.process.kill()
    first.wait_ended()
    second = serve("--listen", listen, *configured)
    second.wait_for("amends is up")
    for command in (["participants"], ["participants", "list"]):
        assert run([*command, "-o", "jsonl", *to]) == 0
        found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [(each["name"], each["by_operator"]) for each in found] == [
            ("extra", True),
            ("payments", True),
        ]

    assert run(["participants", "remove", "payments", *why, *to]) == 0
    assert capsys.readouterr().out == (f"payments is at {wrong} again, as the configuration says\n")
    assert run(["participants", "remove", "payments", *why, *to]) == 4
    assert "there is nothing to take back" in capsys.readouterr().err
    assert run(["participants", "remove", "extra", *why, "-o", "json", *to]) == 0
    assert json.loads(capsys.readouterr().out) == {"name": "extra", "participant": None}
    assert run(["participants", "remove", "extra", *why, *to]) == 3
    assert "extra" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("participant", "what"),
    [
        ("payments", "payments: write NAME=ADDRESS"),
        ("=127.0.0.1:1", "write NAME=ADDRESS"),
        ("payments=", "write NAME=ADDRESS"),
        ("Payments=127.0.0.1:1", "lower-case letter"),
        ("payments=127.0.0.1", "host:port"),
        ("payments=http://x:1", "http"),
    ],
)
def test_a_participant_that_cannot_be_is_refused(
    capsys: pytest.CaptureFixture[str], participant: str, what: str
) -> None:
    """By this side or by the runtime: one line, exit code 2, and nothing has changed."""
    assert run(["participants", "add", participant, "--reason", "x"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    [line] = err.splitlines()
    assert what in line
