"""Commands against a running runtime: what they print, and their exit codes."""

import contextlib
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from amends_runtime.cli.app import run
from tests.cli.conftest import ORDER, PATIENCE_S, Serve, amends, environment


@pytest.fixture(autouse=True)
def asking(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands of this process ask the runtime of the tests."""
    for name in [name for name in os.environ if name.startswith("AMENDS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AMENDS_TARGET", target)


WAIT = ("--wait", "--timeout", str(PATIENCE_S))

Said = Callable[..., str]
Json = Callable[..., Any]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """Run a command that succeeds; return what it printed."""

    def ask(*arguments: str, code: int = 0) -> str:
        assert run(arguments) == code, capsys.readouterr().err
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return ask


@pytest.fixture
def told(said: Said) -> Json:
    """Run a command that succeeds with -o json; return its one document."""

    def ask(*arguments: str, code: int = 0) -> object:
        return json.loads(said(*arguments, "-o", "json", code=code))

    return ask


@pytest.fixture
def complaint(capsys: pytest.CaptureFixture[str]) -> Said:
    """Run a command that fails; return its one line, without the command's name."""

    def ask(code: int, *arguments: str) -> str:
        assert run(arguments) == code
        out, err = capsys.readouterr()
        assert out == ""
        [line] = err.splitlines()
        return line.removeprefix("amends: ")

    return ask


# -- sagas -----------------------------------------------------------------------------------------


def test_a_saga_that_completes_is_exit_code_0(told: Json) -> None:
    """Start waits for the end, and prints the saga with all of its fields."""
    saga = told("start", "order", "--input", '{"amount": 3}', "--id", "done-1", *WAIT)
    assert saga["saga_id"] == "done-1"
    assert saga["state"] == "COMPLETED"
    assert saga["turn"] is None
    assert saga["input"] == {"content_type": "application/json", "size": 12}
    [step] = saga["steps"]
    assert (step["name"], step["state"], step["result"]["size"]) == ("charge", "EXECUTED", 20)
    assert saga["ended_at"].endswith("Z")
    assert saga["ended_at_ms"] >= saga["started_at_ms"]


def test_a_saga_that_ends_otherwise_is_exit_code_6(said: Said, told: Json) -> None:
    """A declined card compensates the saga; start --wait and wait say so by their exit code."""
    saga = told("start", "order", "--input", '{"amount": 101}', "--id", "no-1", *WAIT, code=6)
    assert saga["state"] == "COMPENSATED"
    assert saga["turn"]["cause"] == "rejected"
    assert saga["turn"]["failure"]["reason"] == "card_declined"
    text = said("wait", "no-1", code=6)
    assert "COMPENSATED" in text
    assert "card_declined" in text
    assert told("get", "no-1")["state"] == "COMPENSATED"


def test_what_others_wrote_cannot_drive_the_terminal(said: Said) -> None:
    """A participant's message is shown without its escape sequence taking effect."""
    said("start", "order", "--input", '{"amount": 101}', "--id", "no-2", *WAIT, code=6)
    for command in ("get", "history"):
        text = said(command, "no-2")
        assert "\x1b" not in text
        assert "above the limit" in text


def test_a_wait_that_is_over_is_exit_code_5(complaint: Said) -> None:
    """The line says where the saga stands and how to wait on; the saga goes on."""
    line = complaint(5, "start", "waiting", "--id", "slow-1", "--wait", "--timeout", "0.01")
    assert line.startswith("saga slow-1 has not ended in that time and goes on; it is RUNNING")
    assert line.endswith("amends wait slow-1 waits on")
    assert complaint(5, "wait", "slow-1", "--timeout", "0.01") == line


def test_a_repeated_start_is_the_same_start(told: Json, complaint: Said) -> None:
    """Same id and content: the saga as it is. Same id and other content: exit code 4."""
    first = told("start", "order", "--id", "twice", "--input", '{"amount": 1, "b": 2}', *WAIT)
    again = told("start", "order", "--id", "twice", "--input", '{"b":2,"amount":1}')
    assert (again["started_at_ms"], again["state"]) == (first["started_at_ms"], "COMPLETED")
    line = complaint(4, "start", "order", "--id", "twice", "--input", '{"amount": 2}')
    assert "saga 'twice' exists with another definition, input or options" in line


def test_inputs_come_from_the_command_line_a_file_and_standard_input(
    told: Json, tmp_path: Path, target: str
) -> None:
    """JSON in each case; with --content-type the bytes as they are."""
    file = tmp_path / "order.json"
    file.write_text('{"amount": 4}', encoding="utf-8")
    told("start", "order", "--id", "from-file", "--input", f"@{file}")
    assert told("get", "from-file", "--payloads")["input"]["json"] == {"amount": 4}
    piped = amends(
        *("start", "order", "--id", "from-stdin", "--input", "-", "--target", target),
        stdin='{"amount": 5}',
    )
    assert piped.returncode == 0, piped.stderr
    assert told("get", "from-stdin", "--payloads")["input"]["json"] == {"amount": 5}
    raw = ("--input", "a=1", "--content-type", "text/plain")
    told("start", "waiting", "--id", "raw", *raw)
    assert told("get", "raw", "--payloads")["input"] == {
        "content_type": "text/plain",
        "size": 3,
        "base64": "YT0x",
    }


def test_payloads_are_shown_only_when_asked_for(said: Said) -> None:
    """What is printed ends up in build logs; sizes are enough for most questions."""
    card = '{"amount": 1, "card": "4111"}'
    said("start", "order", "--id", "secret", "--input", card, *WAIT)
    for command in ("get", "history"):
        for form in ("table", "json"):
            assert "4111" not in said(command, "secret", "-o", form)
            assert "4111" in said(command, "secret", "-o", form, "--payloads")


def test_lists_are_filtered(told: Json, said: Said, capsys: pytest.CaptureFixture[str]) -> None:
    """By label, definition and state; newest first; and it says if there are more."""
    for number in range(3):
        told("start", "order", "--id", f"list-{number}", "--label", "shelf=a", *WAIT)
    told("start", "waiting", "--id", "list-w", "--label", "shelf=a", "--label", "row=1")
    shelf = ("list", "--label", "shelf=a")

    def ids(*arguments: str) -> list[str]:
        return [saga["saga_id"] for saga in told(*shelf, *arguments)["sagas"]]

    assert ids() == ["list-w", "list-2", "list-1", "list-0"]
    assert ids("--definition", "order") == ["list-2", "list-1", "list-0"]
    assert ids("--state", "RUNNING") == ["list-w"]
    assert ids("--state", "RUNNING", "--state", "COMPLETED") == ids()
    assert ids("--label", "row=1") == ["list-w"]
    assert ids("--label", "row=2") == []
    page = told(*shelf, "--limit", "2")
    assert (len(page["sagas"]), page["more"]) == (2, True)
    assert not {"steps", "input"} & page["sagas"][0].keys()
    assert told(*shelf, "--limit", "4")["more"] is False
    header, first, *_ = said(*shelf).splitlines()
    assert header.split() == ["ID", "DEFINITION", "STATE", "STARTED", "ENDED", "LABELS"]
    assert first.split()[:3] == ["list-w", "waiting", "RUNNING"]
    assert run([*shelf, "--limit", "1"]) == 0
    assert "there are more" in capsys.readouterr().err


def test_a_history_has_the_fields_of_each_kind(told: Json, said: Said) -> None:
    """Every record, oldest first, without fields that its kind does not have."""
    told("start", "order", "--id", "told", "--input", '{"amount": 1}', *WAIT)
    found = told("history", "told")
    assert found["saga_id"] == "told"
    records = found["records"]
    assert [record["kind"] for record in records] == [
        "SagaStarted",
        "AttemptStarted",
        "StepExecuted",
        "SagaEnded",
    ]
    assert records[1].keys() == {
        *("seq", "version", "at_ms", "at", "kind", "step", "verb", "round", "attempt", "epoch")
    }
    assert records[3]["state"] == "COMPLETED"
    lines = said("history", "told").splitlines()
    assert len(lines) == 1 + len(records)
    assert not any(line.endswith(" ") for line in lines)


def test_a_cancelled_saga_turns_back(told: Json, said: Said, complaint: Said) -> None:
    """Author and reason land in the history; a completed saga is not cancelled: exit code 4."""
    told("start", "waiting", "--id", "cancel-1")
    answer = told("cancel", "cancel-1", "--reason", "customer called", "--author", "me")
    assert answer["disposition"] == "TURNED_BACK"
    assert answer["saga"]["turn"]["cause"] == "cancelled"
    [request] = [
        record
        for record in told("history", "cancel-1")["records"]
        if record["kind"] == "CancelRequested"
    ]
    assert (request["author"], request["reason"]) == ("me", "customer called")
    assert "had turned back before" in said("cancel", "cancel-1", "--reason", "again")
    told("start", "order", "--id", "cancel-2", *WAIT)
    assert "has completed" in complaint(4, "cancel", "cancel-2", "--reason", "too late")


@pytest.mark.parametrize(
    ("arguments", "code", "what", "hint"),
    [
        ("get nope", 3, "there is no saga 'nope'", "amends list"),
        ("wait nope", 3, "there is no saga 'nope'", "amends list"),
        ("history nope", 3, "there is no saga 'nope'", "amends list"),
        ("cancel nope --reason x", 3, "there is no saga 'nope'", "amends list"),
        ("start nope", 3, "there is no definition 'nope'", "amends definitions register"),
        ("definitions get nope", 3, "there is no definition 'nope'", "amends definitions register"),
        ("start ordr", 3, "did you mean 'order'?", "amends definitions list"),
        ("start nope --definition-hash 00000000", 3, "there is no definition 'nope'", "register"),
        ("start order --definition-hash ab", 2, "--definition-hash ab", "8 or more"),
        ("start order --definition-hash 00000000", 3, "no version begins so", "definitions list"),
        ("get a!", 2, "saga_id: 'a!' is not a saga id", "A-Z a-z 0-9"),
        ("start order --id a/b", 2, "saga_id: 'a/b' has a '/'", "reserved for child sagas"),
        ("start order --label X=1", 2, "labels['X']", "lower-case letter"),
        ("start order --deadline 1e300", 2, "", ""),
        ("start order --input 1 --content-type té", 2, "'té' is not a content type", "ASCII"),
    ],
)
def test_a_refusal_names_the_next_thing(
    complaint: Said, arguments: str, code: int, what: str, hint: str
) -> None:
    """Unknown things are exit code 3, malformed ones 2; the line says what to try."""
    line = complaint(code, *arguments.split())
    assert what in line
    assert hint in line


# -- stuck -----------------------------------------------------------------------------------------

BROKEN = "ledger_lost: the ledger cannot be read"


def until_stuck(capsys: pytest.CaptureFixture[str], saga_id: str) -> None:
    """Wait until the saga is stuck; bounded by the test run's own patience."""
    while True:
        assert run(["wait", saga_id, "--timeout", "0.05"]) == 5
        if "STUCK" in capsys.readouterr().err:
            return


def test_a_stuck_saga_that_can_turn_back_says_so(
    told: Json, said: Said, capsys: pytest.CaptureFixture[str]
) -> None:
    """In get and list, and once on standard error of who waits."""
    told("start", "order", "--id", "stuck-1", "--input", '{"broken": "charge"}')
    until_stuck(capsys, "stuck-1")
    shown = said("get", "stuck-1")
    for command, does in {
        "retry": "tries again",
        "cancel": "turns it back",
        "abandon": "ends it as it is",
    }.items():
        assert re.search(rf"amends {command} stuck-1 --reason WHY +{does}\n", shown)
    assert run(["list", "--state", "stuck", "--definition", "order", "--limit", "1"]) == 0
    assert "stuck-1 is STUCK: amends get stuck-1 shows why" in capsys.readouterr().err
    for timeout in ("0.01", "0.02"):
        assert run(["wait", "stuck-1", "--timeout", timeout]) == 5
        out, err = capsys.readouterr()
        assert out == ""
        why, over = err.splitlines()
        assert why.startswith("amends: saga stuck-1 is STUCK since 20")
        assert f" at step charge (execute): {BROKEN}; amends retry stuck-1" in why
        assert "amends cancel stuck-1 --reason WHY turns it back" in why
        assert why.endswith("; waiting on")
        assert over == (
            "amends: saga stuck-1 has not ended in that time; it is STUCK: "
            "amends get stuck-1 shows why"
        )


def test_a_stuck_saga_that_has_turned_back_is_retried_or_abandoned(
    told: Json, said: Said, capsys: pytest.CaptureFixture[str]
) -> None:
    """It cannot turn back again, and nobody is sent into a wait that never ends."""
    told("start", "turning", "--id", "stuck-2", "--input", '{"broken": "refund"}')
    until_stuck(capsys, "stuck-2")
    cancelled = said("cancel", "stuck-2", "--reason", "customer called")
    assert cancelled == (
        "stuck-2 had turned back before; it is STUCK: amends get stuck-2 shows why\n"
    )
    shown = said("get", "stuck-2")
    assert "amends retry stuck-2" in shown
    assert "amends abandon stuck-2" in shown
    assert "amends cancel" not in shown
    assert run(["wait", "stuck-2", "--timeout", "0.01"]) == 5
    assert f"at step charge (compensate): {BROKEN}; amends retry" in capsys.readouterr().err


def test_a_saga_that_was_abandoned_waits_for_nobody(
    told: Json, said: Said, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has ended: no operator is what comes next, although a step stays as it got stuck."""
    told("start", "order", "--id", "stuck-3", "--input", '{"broken": "charge"}')
    until_stuck(capsys, "stuck-3")
    assert "an operator (stuck since" in said("get", "stuck-3")
    said("abandon", "stuck-3", "--reason", "settled by hand", "--yes")
    shown = said("get", "stuck-3")
    assert "ABANDONED" in shown
    assert "an operator" not in shown


def test_no_word_is_said_twice(told: Json, said: Said) -> None:
    """A cause and its failure's reason, a status and the failure that it became."""
    told("start", "waiting", "--id", "twice-1")
    told("cancel", "twice-1", "--reason", "customer called", "--author", "me")
    shown = said("get", "twice-1") + said("history", "twice-1")
    assert "cancelled" in shown
    assert "CANCELLED" not in shown
    assert "UNAVAILABLE, UNAVAILABLE" not in shown


# -- definitions, participants, the runtime --------------------------------------------------------


def test_definitions_are_registered_shown_and_compared(
    told: Json, said: Said, complaint: Said, tmp_path: Path
) -> None:
    """A file, the same file again, another version of it, and a comparison before each."""
    file = tmp_path / "parcel.toml"
    text = 'name = "parcel"\n[[steps]]\nname = "pay"\nparticipant = "payments"\naction = "charge"\n'
    file.write_text(text, encoding="utf-8")
    assert told("definitions", "diff", str(file))["differences"] == ["definition 'parcel' is new"]
    [first] = told("definitions", "register", str(file))["definitions"]
    assert (first["name"], first["version"], first["existed"]) == ("parcel", 1, False)
    [again] = told("definitions", "register", str(file))["definitions"]
    assert (again["content_hash"], again["existed"]) == (first["content_hash"], True)
    assert told("definitions", "diff", str(file))["same"] is True

    file.write_text(text + "timeout_s = 3\n", encoding="utf-8")
    changed = said("definitions", "diff", str(file))
    assert changed == "step 'pay': timeout_s was 10, becomes 3\n"
    assert "registered" in said("definitions", "register", str(file))
    shown = told("definitions", "get", "parcel")
    assert (shown["version"], shown["latest"]) == (2, True)
    assert shown["definition"]["steps"][0]["timeout_s"] == 3
    for hash_ in (first["content_hash"], first["content_hash"][:8]):
        old = told("definitions", "get", "parcel", "--hash", hash_)
        assert (old["version"], old["latest"]) == (1, False)
    pinned = told("start", "parcel", "--definition-hash", first["content_hash"][:12], *WAIT)
    assert pinned["definition_hash"] == first["content_hash"]
    assert "charge" in said("definitions", "get", "parcel")
    names = [each["name"] for each in told("definitions", "list")["definitions"]]
    assert names == sorted(names)
    assert names.count("parcel") == 1
    everything = told("definitions", "list", "--all-versions")["definitions"]
    assert [each["version"] for each in everything if each["name"] == "parcel"] == [1, 2]

    file.write_text(text.replace('"payments"', '"nobody"'), encoding="utf-8")
    line = complaint(2, "definitions", "register", str(file))
    assert "participant 'nobody' is not registered" in line


def test_a_comparison_names_what_registration_would_refuse(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Exit code 2, differences on standard output, faults on standard error."""
    file = tmp_path / "order.json"
    file.write_text(json.dumps(ORDER).replace("payments", "nobody"), encoding="utf-8")
    assert run(["definitions", "diff", str(file)]) == 2
    out, err = capsys.readouterr()
    assert "nobody" in out
    assert err.startswith(
        f"amends: {file}:1:48: step 'charge': participant: participant 'nobody' is"
    )


def test_files_are_registered_together_or_not_at_all(
    capsys: pytest.CaptureFixture[str], told: Json, tmp_path: Path
) -> None:
    """One that is refused keeps the others out; each line names its file and its step."""
    good, bad, worse = (tmp_path / name for name in ("good.json", "bad.json", "worse.json"))
    good.write_text(json.dumps({**ORDER, "name": "alone"}), encoding="utf-8")
    bad.write_text(json.dumps(ORDER).replace("payments", "nobody"), encoding="utf-8")
    worse.write_text(json.dumps(ORDER).replace("payments", "nowhere"), encoding="utf-8")
    assert run(["definitions", "register", str(good), str(bad), str(worse)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    about_bad, about_worse = err.splitlines()
    assert about_bad.startswith(f"amends: {bad}:1:48: step 'charge': participant: ")
    assert "--participant nobody=HOST:PORT" in about_bad
    assert about_worse.startswith(f"amends: {worse}:1:48: step 'charge': participant: ")
    names = [each["name"] for each in told("definitions", "list")["definitions"]]
    assert "alone" not in names


def test_what_definitions_get_prints_can_be_registered(told: Json, tmp_path: Path) -> None:
    """The documented way to copy a definition from one runtime to another."""
    shown = told("definitions", "get", "order")
    file = tmp_path / "copy.json"
    file.write_text(json.dumps(shown["definition"]), encoding="utf-8")
    [copied] = told("definitions", "register", str(file))["definitions"]
    assert (copied["content_hash"], copied["existed"]) == (shown["content_hash"], True)


def test_participants_breakers_and_runtime_are_shown(
    told: Json, said: Said, payments: str, target: str
) -> None:
    """Addresses, breakers, counts."""
    absent, paying = told("participants")["participants"]
    assert (absent["name"], absent["address"]) == ("absent", "127.0.0.1:1")
    assert (paying["name"], paying["address"]) == ("payments", payments)
    assert paying["breaker"]["state"] == "CLOSED"
    assert payments in said("participants")
    names = [each["participant"] for each in told("breakers")["breakers"]]
    assert names == ["absent", "payments"]
    assert "CLOSED" in said("breakers")
    info = told("runtime")
    assert info["without_wake_up"] == 0
    assert info["epoch"] == 1
    assert target in said("runtime")
    assert said("version").strip() == info["version"]


# -- processes -------------------------------------------------------------------------------------


def test_exit_codes_leave_the_process(target: str) -> None:
    """What the tests above see inside is what a shell sees."""
    for code, arguments in {
        0: "runtime",
        2: "get",
        3: "get nope",
        5: "start waiting --wait --timeout 0.01",
        6: 'start order --input {"amount":101} --wait',
    }.items():
        finished = amends(*arguments.split(), "--target", target)
        assert finished.returncode == code, finished.stderr
        assert "Traceback" not in finished.stderr
    gone = amends("list", AMENDS_TARGET="127.0.0.1:1")
    assert gone.returncode == 5
    assert len(gone.stderr.splitlines()) == 1


def on_a_terminal(*arguments: str, **extra: str) -> str:
    """What a command writes to a terminal of 80 columns."""
    leader, follower = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "amends_runtime", *arguments],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=environment(TERM="xterm-256color", COLUMNS="80", **extra),
    ) as process:
        os.close(follower)
        written = b""
        try:
            while read := os.read(leader, 65536):
                written += read
        except OSError:  # how Linux says that the other end is closed
            pass
        os.close(leader)
        assert process.wait(timeout=PATIENCE_S) == 0
    return written.decode()


def test_a_terminal_gets_colours_unless_it_does_not_want_them(target: str) -> None:
    """Colours and whole ids on a terminal; NO_COLOR turns colours off; a pipe has neither."""
    name = "1f0c4d6e-7a2b-7c3d-8e4f-5a6b7c8d9e0f"  # as long as the ids that are made for you
    label = ("--label", "shelf=terminal")
    started = amends("start", "order", "--id", name, "--wait", *label, "--target", target)
    assert started.returncode == 0
    coloured = on_a_terminal("get", name, AMENDS_TARGET=target)
    assert "\x1b[" in coloured
    listed = on_a_terminal("list", *label, AMENDS_TARGET=target, NO_COLOR="1")
    assert "\x1b" not in listed
    assert max(map(len, listed.splitlines())) <= 80
    [row] = [row for row in listed.splitlines() if row.startswith(f"{name} ")]
    assert re.search(r" COMPLETED( +\d\d:\d\d:\d\dZ| +\d\d-\d\d \d\d:\d\dZ){2}", row)
    piped = amends("list", *label, AMENDS_TARGET=target).stdout
    assert "\x1b" not in piped
    assert any(line.startswith(f"{name}  order") for line in piped.splitlines())


@pytest.mark.parametrize("command", [["list", "-o", "json"], ["--help"], ["get", "--help"]])
def test_a_reader_that_leaves_is_no_error(target: str, command: list[str]) -> None:
    """As in `amends list | head`: no traceback, no complaint."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        finished = subprocess.run(
            [sys.executable, "-m", "amends_runtime", *command],
            stdout=writing,
            stderr=subprocess.PIPE,
            env=environment(AMENDS_TARGET=target),
            check=False,
            timeout=PATIENCE_S,
        )
    finally:
        os.close(writing)
    assert (finished.returncode, finished.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_an_answer_that_cannot_be_written_is_exit_code_1() -> None:
    """A script must not take a lost answer for an empty one."""
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        finished = subprocess.run(
            [sys.executable, "-m", "amends_runtime", "version"],
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment(),
            text=True,
            check=False,
            timeout=PATIENCE_S,
        )
    assert finished.returncode == 1
    assert finished.stderr == (
        "amends: the answer cannot be written: No space left on device; it is lost, ask again\n"
    )


@contextlib.contextmanager
def killed_at_the_end(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> Iterator[None]:
    """Kill it, if it still runs: `Popen` itself would wait for it, however the test has failed."""
    try:
        yield
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_whoever_interrupts_a_wait_learns_the_id(
    serve: Serve, tmp_path: Path, number: int, code: int
) -> None:
    """The saga goes on, and without its id nobody would find it again."""
    (tmp_path / "order.json").write_text(json.dumps(ORDER), encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        participant = f"payments=127.0.0.1:{silent.getsockname()[1]}"
        served = serve("--participant", participant, "--definition", "order.json")
        address = served.wait_for("amends is up")["address"]
        waiting = subprocess.Popen(
            [sys.executable, "-m", "amends_runtime", "start", "order", "--wait"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(AMENDS_TARGET=address),
            text=True,
        )
        with waiting, killed_at_the_end(waiting):
            connection, _ = silent.accept()  # the saga has started: its call is under way
            with connection:
                waiting.send_signal(number)
                out, err = waiting.communicate(timeout=PATIENCE_S)
        assert (waiting.returncode, out) == (code, "")
        listed = amends("list", "-o", "json", "--target", address)
        [saga] = json.loads(listed.stdout)["sagas"]
        [line] = err.splitlines()
        assert line.startswith(f"amends: saga {saga['saga_id']} ")  # it may not know of the start
        assert "goes on" in line
        assert f"amends wait {saga['saga_id']}" in line
        assert f"amends get {saga['saga_id']}" in line
        assert saga["state"] == "RUNNING"


def test_a_wait_outlives_a_restart_of_the_runtime(
    serve: Serve, tmp_path: Path, payments: str
) -> None:
    """A runtime that is killed and started again is not noticed by who waits."""
    (tmp_path / "order.json").write_text(json.dumps(ORDER), encoding="utf-8")
    listen = f"unix:{tmp_path}/amends.sock"
    arguments = ("--listen", listen, "--definition", "order.json")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        nobody = f"payments=127.0.0.1:{silent.getsockname()[1]}"
        first = serve(*arguments, "--participant", nobody)
        first.wait_for("amends is up")
        waiting = subprocess.Popen(
            [sys.executable, "-m", "amends_runtime", "start", "order", "--wait", "-o", "json"],
            stdout=subprocess.PIPE,
            env=environment(AMENDS_TARGET=listen),
        )
        with waiting, killed_at_the_end(waiting):
            connection, _ = silent.accept()
            with connection:
                first.process.kill()
                first.wait_ended()
            second = serve(*arguments, "--participant", f"payments={payments}")
            second.wait_for("amends is up")
            out, _ = waiting.communicate(timeout=PATIENCE_S)
    assert waiting.returncode == 0
    assert json.loads(out)["state"] == "COMPLETED"
