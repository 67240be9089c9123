"""Logs: their two forms, and what must never be in them."""

import contextlib
import io
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest
import structlog

from amends_runtime.core.payload import Payload
from amends_runtime.errors import StoreUnusable
from amends_runtime.telemetry.logging import configure_logging

SECRET = b"4111-1111-1111-1111"


class Terminal(io.StringIO):
    """What a terminal looks like to whoever writes to it."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """The logging of the test run is as it was afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    """Read a log in JSON."""
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_is_one_object_a_line() -> None:
    """Each line names time, level and message first, and has what was given."""
    stream = io.StringIO()
    configure_logging("json", "info", stream)
    log = structlog.get_logger("test")
    log.info("first", saga_id="order-1", step="charge", attempt=2)
    log.warning("second\nline")
    first, second = lines(stream)
    assert list(first)[:3] == ["timestamp", "level", "message"]
    assert first.pop("timestamp").endswith("Z")
    assert first == {
        "level": "info",
        "message": "first",
        "saga_id": "order-1",
        "step": "charge",
        "attempt": 2,
    }
    assert second["message"] == "second\nline"
    assert "saga_id" not in second


def test_auto_is_json_in_a_pipe_and_console_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads decides: programs get JSON, people do not."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    pipe, terminal = io.StringIO(), Terminal()
    configure_logging("auto", "info", pipe)
    structlog.get_logger("one").info("hello")
    configure_logging("auto", "info", terminal)
    structlog.get_logger("two").info("hello")
    assert lines(pipe)[0]["message"] == "hello"
    assert "hello" in terminal.getvalue()
    assert "{" not in terminal.getvalue()
    assert "\x1b[" in terminal.getvalue()


def test_no_color_means_no_escape_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """NO_COLOR is kept on a terminal, too."""
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    configure_logging("console", "info", terminal)
    structlog.get_logger("test").info("hello", answer=42)
    assert "hello" in terminal.getvalue()
    assert "answer=42" in terminal.getvalue()
    assert "\x1b" not in terminal.getvalue()


@pytest.mark.parametrize("form", ["console", "json"])
@pytest.mark.parametrize("how", ["full", "closed", "nobody reads"])
def test_a_line_that_cannot_be_written_is_lost_and_nothing_else(form: str, how: str) -> None:
    """Of ours and of other libraries: a full disk or a closed pipe must end no saga."""
    stream = unwritable(how)
    configure_logging(form, "info", stream)
    if how == "closed":
        stream.close()
    structlog.get_logger("test").info("ours", attempt=1)
    logging.getLogger("other").error("foreign")
    with contextlib.suppress(OSError):
        stream.close()


def unwritable(how: str) -> TextIO:
    """A stream that cannot be written to, or is about to be closed."""
    if how == "full":
        return Path("/dev/full").open("w", encoding="utf-8", buffering=1)
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w", encoding="utf-8", buffering=1)


@pytest.mark.parametrize("form", ["console", "json"])
def test_the_level_is_kept(form: str) -> None:
    """What is below the level is not written, ours and other people's."""
    stream = io.StringIO()
    configure_logging(form, "warning", stream)
    log = structlog.get_logger("test")
    log.info("quiet")
    log.warning("loud")
    logging.getLogger("other").info("quiet")
    logging.getLogger("other").error("foreign")
    assert "quiet" not in stream.getvalue()
    assert "loud" in stream.getvalue()
    assert "foreign" in stream.getvalue()


@pytest.mark.parametrize("level", ["debug", "info"])
def test_other_libraries_speak_from_warning_upward(level: str) -> None:
    """Their records come in the same form, and never below warning.

    There aiosqlite logs the parameters of every statement, which are payloads.
    """
    stream = io.StringIO()
    configure_logging("json", level, stream)
    logging.getLogger("aiosqlite").debug("executing with %r", SECRET)
    logging.getLogger("grpc").info("chatter")
    logging.getLogger("grpc").warning("trouble with %s", "a port")
    [line] = lines(stream)
    assert (line["message"], line["level"], line["logger"]) == (
        "trouble with a port",
        "warning",
        "grpc",
    )


@pytest.mark.parametrize("form", ["console", "json"])
def test_payloads_are_shown_by_size_only(form: str) -> None:
    """Bytes never reach a log, whoever passes them, and however deep."""
    stream = io.StringIO()
    configure_logging(form, "debug", stream)
    log = structlog.get_logger("test")
    log.info("one", data=SECRET, view=memoryview(SECRET), payload=Payload(SECRET, "text/plain"))
    log.info("two", many=[Payload(SECRET)], by_name={"a": Payload(SECRET)})
    assert "4111" not in stream.getvalue()
    assert "<19 bytes>" in stream.getvalue()


@pytest.mark.parametrize("form", ["console", "json"])
def test_tracebacks_show_neither_variables_nor_texts(form: str) -> None:
    """A traceback names its frames and types; anything else of an exception may be a payload."""
    stream = io.StringIO()
    configure_logging(form, "info", stream)

    def fail() -> None:
        secret = SECRET.decode()
        try:
            raise KeyError(secret)
        except KeyError as cause:
            group = ExceptionGroup(secret, [ValueError(secret), RuntimeError(secret)])
            group.add_note(secret)
            raise group from cause

    try:
        fail()
    except ExceptionGroup:
        structlog.get_logger("test").exception("it failed")
        logging.getLogger("other").exception("it failed")
    assert "4111" not in stream.getvalue()
    for shown in ("in fail", "KeyError", "ExceptionGroup", "ValueError", "RuntimeError"):
        assert stream.getvalue().count(shown) >= 2, shown


@pytest.mark.parametrize("form", ["console", "json"])
def test_what_amends_and_the_operating_system_say_of_an_error_is_shown(form: str) -> None:
    """These texts are written by people who knew that they end up in logs."""
    stream = io.StringIO()
    configure_logging(form, "info", stream)
    for error in (
        StoreUnusable("the disk is gone\x1b[2J"),
        OSError(28, "No space left", SECRET.decode()),
    ):
        structlog.get_logger("test").error("it failed", exc_info=error)
    assert "StoreUnusable: the disk is gone" in stream.getvalue()
    assert "OSError: No space left" in stream.getvalue()
    assert "4111" not in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_a_chain_of_errors_without_an_end_is_cut() -> None:
    """Each of two errors can be the other's context; the log ends all the same."""
    stream = io.StringIO()
    configure_logging("json", "info", stream)
    one, other = ValueError(), KeyError()
    one.__context__, other.__context__ = other, one
    structlog.get_logger("test").error("it failed", exc_info=one)
    assert stream.getvalue().count("ValueError") < 20


def test_what_others_wrote_cannot_forge_a_line_or_drive_a_terminal() -> None:
    """Line breaks and escape sequences in values are written out."""
    stream = io.StringIO()
    configure_logging("console", "info", stream)
    structlog.get_logger("test").info("refused", error="no\n[info] all is well\x1b[2J\x9b")
    [line] = stream.getvalue().splitlines()
    assert "\\n[info] all is well\\x1b[2J\\x9b" in line.replace("\\\\", "\\")
    assert "\x1b" not in line
