"""A secret in a payload, an exception or a message: it must not come out where it has no business.

Three secrets, and where each may be:

    payload     nowhere but in the database, and where somebody asks for contents
    exception   the text of a handler's exception: nowhere at all
    message     a participant's words for people: in what an operator asks for, and nowhere else

Real processes: a runtime that logs all it can, in either form, and sends traces; participants that
raise, return and refuse the secrets; a collector; and everything that a caller gets to see.
"""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from amends.v1 import operator_pb2, operator_pb2_grpc, saga_pb2, saga_pb2_grpc, types_pb2
from tests.cli.conftest import PATIENCE_S, Served, amends, environment
from tests.cli.test_full_disk import a_full_disk
from tests.telemetry.otlp_receiver import Received, read_kept

HERE = Path(__file__).parent
PAYLOAD = "4111-canary-of-a-payload-1111"
EXCEPTION = "4222-canary-of-an-exception-2222"
MESSAGE = "4333-canary-of-a-message-3333"
LABEL = "shown-on-purpose"
SECRETS = {"payload": PAYLOAD, "exception": EXCEPTION, "message": MESSAGE}
INPUT = json.dumps(SECRETS).encode()

SHORT = {"first_s": 0.001, "max_s": 0.001, "give_up_after_s": 0.02}


def step(name: str, participant: str = "vault", **more: object) -> dict[str, object]:
    """A step whose action has its name, and whose retries are used up at once."""
    times = {"retry": SHORT, "compensation_retry": SHORT}
    return {"name": name, "participant": participant, "action": name, **times, **more}


KEEP = step("keep")
DEFINITIONS: dict[str, list[dict[str, object]]] = {
    "completes": [KEEP, step("hide")],
    "is-refused": [KEEP, step("refuse")],
    "bursts": [KEEP, step("burst")],
    "breaks": [KEEP, step("break")],
    "cannot-undo": [step("hide"), step("refuse")],
    "is-abroad": [step("abroad", "foreign", retry={"first_s": 0.001, "max_s": 0.001})],
}
TRACE_ID = re.compile(r"""\btrace_id["']?[:=] ?["']?([0-9a-f]{32})\b""")
ENDED = {
    "completes": types_pb2.SAGA_STATE_COMPLETED,
    "is-refused": types_pb2.SAGA_STATE_COMPENSATED,
    "bursts": types_pb2.SAGA_STATE_COMPENSATED,
}


# -- the search ------------------------------------------------------------------------------------


def spellings(secret: str) -> Iterator[bytes]:
    """How bytes may look elsewhere: as they are, in hex, in base64 at each alignment, escaped."""
    plain = secret.encode()
    yield plain
    yield plain.hex().encode()
    yield plain.hex().upper().encode()
    yield " ".join(f"{byte:02x}" for byte in plain).encode()
    yield str(list(plain))[1:-1].encode()
    yield urllib.parse.quote(secret).encode()
    yield plain[::-1]
    yield secret.encode("utf-16-le")
    for shift in range(3):
        encoded = base64.b64encode(bytes(shift) + plain)
        # What stands at the ends depends on the neighbours.
        inner = encoded[(0, 2, 3)[shift] : -4]
        yield inner
        yield inner.replace(b"+", b"-").replace(b"/", b"_")


def leaks(place: bytes | str, *secrets: str) -> list[str]:
    """The secrets that a place has, in whatever spelling."""
    searched = place.encode() if isinstance(place, str) else place
    return [
        secret for secret in secrets if any(spelling in searched for spelling in spellings(secret))
    ]


@pytest.mark.parametrize("secret", [PAYLOAD, EXCEPTION, MESSAGE])
@pytest.mark.parametrize("before", [b"", b"x", b"xy", b"xyz"])
def test_the_search_finds_what_is_planted(secret: str, before: bytes) -> None:
    """A search that finds nothing must be known to find something."""
    around = before + b'{"card": "' + secret.encode() + b'"}' + before
    for planted in (
        around,
        base64.b64encode(around),
        base64.urlsafe_b64encode(around),
        around.hex().encode(),
        around.hex(" ").upper().lower().encode(),
        json.dumps({"log": around.decode()}).encode(),
        repr(list(around)).encode(),
        types_pb2.Payload(data=around).SerializeToString(),
    ):
        assert leaks(b"before " + planted + b" after", PAYLOAD, EXCEPTION, MESSAGE) == [secret]
    assert leaks(b"nothing of the kind", PAYLOAD, EXCEPTION, MESSAGE) == []


# -- the world -------------------------------------------------------------------------------------


class Program:
    """A process that ends with its standard input; what it writes to standard error is kept."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            env={**environment(), "PYTHONPATH": str(HERE.parent.parent)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.said = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said += line

    def line(self) -> str:
        """The next line of its standard output."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def end(self) -> None:
        """Let it end, and wait for that."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.process.stdin.close()
        try:
            self.process.wait(PATIENCE_S)
        finally:
            self.process.kill()
            self.process.wait()
            self._reader.join()
            self.process.stdout.close()
            self.process.stderr.close()


def address_in(ready: Path, program: Program, key: str) -> str:
    """An address out of a program's ready file, once that is there."""
    while not ready.exists():
        assert program.process.poll() is None, program.said
        threading.Event().wait(0.02)
    return str(json.loads(ready.read_text(encoding="utf-8"))[key])


@contextmanager
def a_collector(folder: Path) -> Iterator[tuple[str, Path]]:
    """A receiver of OTLP, and the file of what it got."""
    ready, kept = folder / "otlp.json", folder / "otlp.kept"
    program = Program(
        *(str(HERE / "otlp_receiver.py"), "--ready-file", str(ready), "--keep", str(kept))
    )
    try:
        yield address_in(ready, program, "grpc"), kept
    finally:
        program.end()


FORMS = ("json", "console")
"""Of the runtime's log."""

COMMANDS: list[tuple[int, list[str]]] = [
    (code, arguments)
    for code, *arguments in (
        (4, "start", "bursts", "--id", "completes", "--input", INPUT.decode()),
        (3, "start", "nobody", "--input", INPUT.decode()),
        (2, "start", "completes", "--id", "a b", "--input", INPUT.decode()),
        (2, "start", "completes", "--input", f"{INPUT.decode()} and more"),
        (3, "trace", "show", "nobody"),
        (5, "trace", "export", "completes", "--to", "127.0.0.1:1"),
        (4, "cancel", "completes", "--reason", "why"),
        (5, "wait", "cannot-undo", "--timeout", "0.01"),
        (6, "wait", "bursts"),
        (0, "get", "cannot-undo"),
        (0, "history", "bursts", "-o", "jsonl"),
        (0, "trace", "show", "bursts"),
        (0, "trace", "export", "cannot-undo", "--include-open"),
    )
]
"""Those that fail, or show a saga without --payloads: each by its exit code.

In what form the runtime writes its log is nothing to them, so each is run beside one of the two.
"""


class Seen:
    """Everything that came out, by where it did."""

    def __init__(self) -> None:
        self.runtime_log = ""
        self.participants_log = ""
        self.otlp = Received()
        self.metrics = ""
        self.traces: list[bytes] = []
        self.errors: list[str] = []
        self.commands: list[str] = []


def until_logged(served: Served, message: str, count: int = 1) -> None:
    """Wait until so many lines of the log have this."""
    while sum(message in line for line in served.lines) < count:
        served.wait_for(message)


def error_of(call: Any, request: Any) -> str:
    """All that a caller gets of an error: status, words, details, trailers."""
    with pytest.raises(grpc.RpcError) as refused:
        call(request, timeout=PATIENCE_S)
    error: Any = refused.value
    trailers = b" ".join(
        value if isinstance(value, bytes) else value.encode()
        for _, value in error.trailing_metadata() or ()
    )
    return f"{error} {error.details()} {trailers.decode('latin-1')}"


@pytest.fixture(scope="module", params=FORMS)
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """A runtime's life with secrets, from its start to a full disk, and all that came out of it."""
    folder, found = tmp_path_factory.mktemp("canary"), Seen()
    for name, steps in DEFINITIONS.items():
        text = json.dumps({"name": name, "steps": steps})
        (folder / f"saga-{name}.json").write_text(text, encoding="utf-8")
    with a_collector(folder) as (otlp, kept):
        program = Program(str(HERE / "canary_program.py"), str(folder), otlp)
        try:
            addresses = json.loads(program.line())
            arguments = (
                *("--listen", "127.0.0.1:0", "--otlp", otlp, "--metrics-listen", "127.0.0.1:0"),
                *("--log-level", "debug", "--log-format", request.param),
                *(f"--participant={name}={address}" for name, address in addresses.items()),
                *("--definition", "saga-*.json", "--ready-file", "ready.json"),
            )
            live(folder, arguments, found, COMMANDS[FORMS.index(request.param) :: len(FORMS)])
            die(folder, arguments, found)
        finally:
            program.end()
        found.participants_log = program.said
        found.otlp = read_kept(kept)
    return found


@contextmanager
def a_runtime(
    folder: Path, arguments: tuple[str, ...], found: Seen
) -> Iterator[tuple[Served, dict[str, str]]]:
    """A runtime, and its addresses; its log is kept."""
    served = Served(*arguments, cwd=folder)
    try:
        served.wait_for("amends is up")
        yield served, json.loads((folder / "ready.json").read_text(encoding="utf-8"))
    finally:
        served.close()
    found.runtime_log += "\n".join(served.lines)


def live(
    folder: Path, arguments: tuple[str, ...], found: Seen, commands: Sequence[tuple[int, list[str]]]
) -> None:
    """Sagas of every end, operators, callers who do it wrong; and an end in order."""
    with a_runtime(folder, arguments, found) as (served, at):
        with grpc.insecure_channel(at["address"]) as channel:
            sagas = saga_pb2_grpc.SagaServiceStub(channel)
            for name in DEFINITIONS:
                start(sagas, name)
            for name, state in ENDED.items():
                wait = saga_pb2.WaitSagaRequest(saga_id=name, timeout_ms=60_000)
                assert sagas.WaitSaga(wait).saga.state == state, name
            until_logged(served, "step_stuck", 2)
            until_logged(served, "breaker_changed")
            operator = operator_pb2_grpc.OperatorServiceStub(channel)
            audit = operator_pb2.Audit(author="ada", reason=MESSAGE)
            operator.RetrySaga(operator_pb2.RetrySagaRequest(saga_id="breaks", audit=audit))
            until_logged(served, "step_stuck", 3)
            operator.AbandonSaga(operator_pb2.AbandonSagaRequest(saga_id="breaks", audit=audit))
            sagas.CancelSaga(
                saga_pb2.CancelSagaRequest(saga_id="is-abroad", author="ada", reason=MESSAGE)
            )
            found.errors += errors_of(sagas)
            for name in DEFINITIONS:
                trace = saga_pb2.GetTraceRequest(saga_id=name, include_open=True)
                found.traces.append(sagas.GetTrace(trace).SerializeToString())
        found.commands += [said_by(at["address"], *command) for command in commands]
        with urllib.request.urlopen(f"http://{at['metrics']}/metrics") as page:
            found.metrics = page.read().decode()
        served.process.terminate()
        assert served.wait_ended() == 0


def die(folder: Path, arguments: tuple[str, ...], found: Seen) -> None:
    """A restart, and a commit that fails with a secret in its batch."""
    with (
        a_runtime(folder, arguments, found) as (served, at),
        grpc.insecure_channel(at["address"]) as channel,
        a_full_disk(served.process.pid),
    ):
        sagas = saga_pb2_grpc.SagaServiceStub(channel)
        request = saga_pb2.StartSagaRequest(
            saga_id="too-late", definition="completes", input=types_pb2.Payload(data=INPUT)
        )
        found.errors.append(error_of(sagas.StartSaga, request))
        assert served.wait_ended() == 5


def start(sagas: Any, name: str) -> None:
    """Start the saga of a definition, with every secret in its input."""
    sagas.StartSaga(
        saga_pb2.StartSagaRequest(
            saga_id=name,
            definition=name,
            input=types_pb2.Payload(data=INPUT, content_type="application/json"),
            labels={"tier": LABEL},
        )
    )


def errors_of(sagas: Any) -> Iterator[str]:
    """What callers are told who do something wrong while they hand over a secret."""
    payload = types_pb2.Payload(data=INPUT)
    long = types_pb2.Payload(data=INPUT + bytes(1024 * 1024))
    for request in (
        saga_pb2.StartSagaRequest(saga_id="completes", definition="bursts", input=payload),
        saga_pb2.StartSagaRequest(definition="nobody", input=payload),
        saga_pb2.StartSagaRequest(definition="completes", input=long),
        saga_pb2.StartSagaRequest(
            saga_id="a b", definition="A", input=payload, deadline_ms=-1, traceparent="x"
        ),
    ):
        yield error_of(sagas.StartSaga, request)
        response = sagas.StartSagas(saga_pb2.StartSagasRequest(starts=[request]))
        assert response.results[0].HasField("error")
        yield str(response)


def said_by(address: str, code: int, arguments: list[str]) -> str:
    """What a command prints, which ends with this code."""
    ended = amends(*arguments, AMENDS_TARGET=address)
    assert ended.returncode == code, (arguments, ended.stderr)
    return ended.stdout + ended.stderr


# -- where the secrets are not ---------------------------------------------------------------------


def test_the_runtime_s_log_has_none(seen: Seen) -> None:
    """Not at debug, not of a commit that failed, not of a breaker that opened on their words."""
    for event in (
        *("saga_turned_back", "step_stuck", "step_given_up", "attempt_failed", "step_executed"),
        *("breaker_changed", "operator_acted", "cancel_requested", "commit_failed"),
    ):
        assert event in seen.runtime_log, event
    assert leaks(seen.runtime_log, *SECRETS.values()) == []


def test_every_line_about_a_saga_leads_to_its_trace(seen: Seen) -> None:
    """The log and the collector name the same traces; what cannot be read has none to name."""
    lines = [line for line in seen.runtime_log.splitlines() if "saga_id" in line]
    traces = {found[1] for line in lines if (found := TRACE_ID.search(line)) is not None}
    about = [line for line in lines if "store_failed" not in line]
    assert [line for line in about if TRACE_ID.search(line) is None] == []
    assert set(seen.otlp.trace_ids()) <= traces


def test_the_participants_log_has_none(seen: Seen) -> None:
    """From INFO on: what a handler raised is told by its type and its place."""
    assert "ValueError" in seen.participants_log
    assert "RuntimeError" in seen.participants_log
    assert leaks(seen.participants_log, *SECRETS.values()) == []


def test_no_span_has_one(seen: Seen) -> None:
    """Neither of the runtime nor of a participant; nor the headers that they came with."""
    assert {span.service for span in seen.otlp.spans()} == {"amends", "vault"}
    names = {span.name for span in seen.otlp.spans()}
    assert {f"saga {name}" for name in (*ENDED, "breaks")} <= names
    for one in seen.otlp.requests:
        assert leaks(one.body, *SECRETS.values()) == []
        assert leaks(str(one.headers), *SECRETS.values()) == []


def test_labels_are_shown_on_purpose(seen: Seen) -> None:
    """They are for finding sagas, in lists and in traces: so they are no place for a secret."""
    assert leaks(seen.otlp.raw, LABEL) == [LABEL]
    assert leaks(seen.runtime_log, LABEL) == []
    assert leaks(seen.metrics, LABEL) == []


def test_no_trace_that_is_asked_for_has_one(seen: Seen) -> None:
    """They are made by the same projection, of the same records."""
    assert len(seen.traces) == len(DEFINITIONS)
    for trace in seen.traces:
        assert leaks(trace, *SECRETS.values()) == []


def test_no_metric_has_one(seen: Seen) -> None:
    """Labels are names and words for programs."""
    assert "amends_saga_ends_total" in seen.metrics
    assert leaks(seen.metrics, *SECRETS.values()) == []


def test_no_error_of_the_api_has_one(seen: Seen) -> None:
    """Neither its words nor its details; a payload is told by its size."""
    assert any("are the most" in error for error in seen.errors)
    assert leaks("".join(seen.errors), *SECRETS.values()) == []


def test_commands_show_payloads_only_if_asked(seen: Seen) -> None:
    """What a participant said in words for people is an operator's to see, and nothing else."""
    assert leaks("".join(seen.commands), PAYLOAD, EXCEPTION) == []


# -- a bug of ours ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_bug_that_quotes_a_payload_is_logged_without_it(tmp_path: Path, form: str) -> None:
    """Deciding fails with an exception that has everything in it: the log has types and places."""
    text = json.dumps({"name": "waits", "steps": [KEEP]})
    (tmp_path / "waits.json").write_text(text, encoding="utf-8")
    ready = tmp_path / "ready.json"
    program = Program(
        *(str(HERE / "buggy_runtime.py"), "serve", "--until-stdin-closes"),
        *("--listen", "127.0.0.1:0", "--database", str(tmp_path / "amends.db")),
        *("--participant", "vault=127.0.0.1:1", "--definition", str(tmp_path / "waits.json")),
        *("--log-level", "debug", "--log-format", form, "--ready-file", str(ready)),
    )
    try:
        with grpc.insecure_channel(address_in(ready, program, "address")) as channel:
            sagas = saga_pb2_grpc.SagaServiceStub(channel)
            start(sagas, "waits")
            cancel = saga_pb2.CancelSagaRequest(saga_id="waits", author="ada", reason=MESSAGE)
            errors = [error_of(sagas.CancelSaga, cancel) for _ in range(2)]
            trace_id = sagas.GetTrace(saga_pb2.GetTraceRequest(saga_id="waits")).trace_id
    finally:
        program.end()
    assert leaks("".join(errors), *SECRETS.values()) == []
    assert leaks(program.said, *SECRETS.values()) == []
    crashes = re.split(r"(?m)(?=^.*\bdecide_crashed\b)", program.said)[1:]
    assert len(crashes) == 2
    for crash in crashes:
        for part in ("waits", trace_id, "CancelSaga", "RuntimeError", "decide_with_a_bug"):
            assert part in crash
