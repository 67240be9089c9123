"""How values look: nothing that others wrote drives a terminal or leaves the document."""

import io
import json
import sys

import pytest

from amends.outcomes import Cause, Verb
from amends.payload import Payload
from amends.sagas import (
    Failure,
    Record,
    RecordKind,
    Saga,
    SagaState,
    Step,
    StepState,
    Turn,
)
from amends_runtime.cli.documents import document, instant, to_json
from amends_runtime.cli.exits import ExitCode, explain, one_line
from amends_runtime.cli.options import Common
from amends_runtime.cli.record_views import in_words
from amends_runtime.cli.saga_views import print_saga
from amends_runtime.cli.tables import Columns, print_facts, print_line, print_table

NASTY = "a\x1b[2J\r\nb\x9b\u2028c\x00 [red]d[/red] :smile:"
WRITTEN_OUT = r"a\x1b[2J\r\nb\x9b\u2028c\x00 [red]d[/red] :smile:"


def test_control_characters_are_written_out(capsys: pytest.CaptureFixture[str]) -> None:
    """In cells, facts, lines and errors alike; markup of any kind is only text."""
    print_table(("NAME",), [(NASTY,)])
    print_facts([("name", NASTY), ("nothing", "")])
    print_line(NASTY)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["NAME", WRITTEN_OUT, f"name  {WRITTEN_OUT}", WRITTEN_OUT]
    assert one_line(NASTY) == WRITTEN_OUT


def test_json_escapes_what_a_terminal_might_take_for_a_command() -> None:
    """The document stays the same document; letters of all scripts stay readable."""
    text = to_json({"é": NASTY})
    assert json.loads(text) == {"é": NASTY}
    assert "é" in text
    assert not any(ord(letter) < 0x20 for letter in text.replace("\n", ""))
    assert "\x9b" not in text


def test_an_open_call_is_said_to_wait_for_its_answer(capsys: pytest.CaptureFixture[str]) -> None:
    """Sent, held, or to be asked again after InProgress: what is said is true of all three."""
    step = Step(name="charge", state=StepState.EXECUTING, verb=Verb.EXECUTE, call_open=True)
    saga = Saga(
        saga_id="s-1",
        definition="order",
        definition_hash="0" * 64,
        state=SagaState.RUNNING,
        version=2,
        started_at_ms=1,
        updated_at_ms=1,
        steps=(step,),
    )
    print_saga(saga, Common(), payloads=False)
    *_, row = capsys.readouterr().out.splitlines()
    assert row.split(maxsplit=2)[2] == "its participant's answer"


def test_rows_in_a_pipe_are_one_line_however_long(capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever reads with cut or awk gets a row a line."""
    print_table(("A", "B"), [("x" * 5000, "y"), ("é", "日本")])
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split() == ["A", "B"]
    assert first.split() == ["x" * 5000, "y"]
    assert second.split() == ["é", "日本"]


@pytest.mark.parametrize(
    ("payload", "shown"),
    [
        (Payload(b"", ""), None),
        (Payload(b'{"a":1}', "application/json"), {"json": {"a": 1}}),
        (Payload(b"{", "application/json"), {"base64": "ew=="}),
        (Payload(b"\xff", "image/png"), {"base64": "/w=="}),
        (Payload(b"null", "application/json"), {"json": None}),
    ],
    ids=["empty", "json", "broken-json", "bytes", "null"],
)
def test_payloads_have_two_forms(payload: Payload, shown: dict[str, object] | None) -> None:
    """Type and size always; the content as JSON or base64 when it is asked for."""
    if shown is None:
        assert document(payload, payloads=True) is None
        return
    facts = {"content_type": payload.content_type, "size": len(payload.data)}
    assert document(payload) == facts
    assert document(payload, payloads=True) == facts | shown


def test_records_have_the_fields_of_their_kind_only() -> None:
    """What a kind does not fill is left out; instants are there twice."""
    record = Record(
        seq=1,
        version=2,
        at_ms=0,
        kind=RecordKind.STEP_STUCK,
        step="charge",
        failure=Failure("BROKEN", "barrier lost"),
    )
    assert document(record) == {
        "seq": 1,
        "version": 2,
        "at_ms": 0,
        "at": "1970-01-01T00:00:00.000Z",
        "kind": "StepStuck",
        "step": "charge",
        "failure": {"reason": "BROKEN", "message": "barrier lost", "metadata": {}},
    }


def test_instants_are_iso_8601_as_far_as_it_goes() -> None:
    """An instant beyond the year 9999 is no reason to fail."""
    assert instant(1_700_000_000_005) == "2023-11-14T22:13:20.005Z"
    assert instant(2**62) == f"{2**62} ms"


def test_a_group_of_errors_is_explained_by_its_gravest() -> None:
    """A bug speaks before all; errors that say the same say it once."""
    from amends_runtime.errors import StoreInUse, Unavailable  # noqa: PLC0415  # only here

    in_use = StoreInUse("in use")
    assert explain(ExceptionGroup("two", [in_use, StoreInUse("in use")])) == (
        ExitCode.CONFLICT,
        ["in use"],
    )
    nested = ExceptionGroup("outer", [Unavailable("gone"), ExceptionGroup("in", [KeyError("x")])])
    code, [line] = explain(nested)
    assert code == ExitCode.INTERNAL
    assert line == "internal error: KeyError"


# -- rows that come one by one ---------------------------------------------------------------------


class Terminal(io.StringIO):
    """Standard output that says that it is a terminal."""

    def isatty(self) -> bool:
        """It does."""
        return True


def test_rows_that_come_one_by_one_are_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Its columns only grow; in a pipe each row is one line, whatever somebody wrote into it."""
    columns = Columns("A", "STATE", "WHAT", expected={"STATE": ["COMPENSATING"]})
    columns.print("1", "STUCK", "x" * 500)
    columns.print("12345", "RUNNING", NASTY)
    columns.print("1", "日本", "")
    assert capsys.readouterr().out.splitlines() == [
        "A  STATE         WHAT",
        f"1  STUCK         {'x' * 500}",
        f"12345  RUNNING       {WRITTEN_OUT}",
        "1      日本",
    ]


@pytest.mark.parametrize("width", [40, 80, 200])
def test_rows_that_come_one_by_one_fit_a_terminal(
    monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    """What has no room goes on below, and nothing of it is lost."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    words = " ".join(f"word{number}" for number in range(40))
    Columns("AT", "SAGA", "WHAT").print("12:00:00Z", "order-1", words)
    header, *lines = terminal.getvalue().splitlines()
    assert header.split() == ["AT", "SAGA", "WHAT"]
    assert max(map(len, lines)) <= width
    assert " ".join(lines).split() == ["12:00:00Z", "order-1", *words.split()]


def test_a_turn_in_words_says_a_failure_once() -> None:
    """A refusal is why its step is rejected and why the saga turns back."""
    why = Failure("card_declined", "no money")
    turn = Turn(cause=Cause.REJECTED, step="charge", failure=why, at_ms=0)

    def record(kind: RecordKind, **fields: object) -> Record:
        return Record(seq=1, version=2, at_ms=0, kind=kind, **fields)  # type: ignore[arg-type]

    charge = {"step": "charge", "verb": Verb.EXECUTE, "round": 1}
    records = [
        record(RecordKind.STEP_REJECTED, **charge, attempt=1, failure=why),
        record(RecordKind.SAGA_TURNED_BACK, turn=turn),
        record(
            RecordKind.ATTEMPT_STARTED, step="reserve", verb=Verb.COMPENSATE, round=1, attempt=2
        ),
        record(RecordKind.OPERATOR_ACTED, step="charge", author="me", detail="retry", reason="why"),
        record(RecordKind.CANCEL_REQUESTED, author="you", reason="enough"),
        record(RecordKind.SAGA_ENDED, state=SagaState.COMPENSATED),
        record(RecordKind.SIGNAL_RECEIVED, detail="paid"),
    ]
    assert in_words(records, payloads=False) == (
        "charge is rejected: card_declined: no money; turns back; compensate reserve, attempt 2; "
        "me: retry charge: why; you asks to cancel it: enough; ended COMPENSATED; "
        "SignalReceived: paid"
    )
