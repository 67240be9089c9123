"""`-o jsonl`: a JSON document a line, for a reader that reads lines and may leave early."""

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from amends_runtime.cli.app import run
from amends_runtime.cli.documents import to_json_line
from tests.cli.conftest import PATIENCE_S, amends, environment

SHELF = ("--label", "shelf=jsonl")


@pytest.fixture(scope="module", autouse=True)
def sagas(target: str) -> None:
    """Three sagas that have completed."""
    for number in range(3):
        started = amends(
            *("start", "order", "--id", f"jsonl-{number}", *SHELF, "--wait", "--target", target)
        )
        assert started.returncode == 0, started.stderr


Printed = Callable[..., str]


@pytest.fixture
def printed(target: str, capsys: pytest.CaptureFixture[str]) -> Printed:
    """Run a command that succeeds; return what it printed."""

    def ask(*arguments: str) -> str:
        assert run([*arguments, "--target", target]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return ask


def test_what_lists_prints_each_thing_on_a_line(printed: Printed) -> None:
    """The same values as in the list of -o json."""

    def lines(*arguments: str) -> list[dict[str, object]]:
        return [json.loads(line) for line in printed(*arguments, "-o", "jsonl").splitlines()]

    found = lines("list", *SHELF)
    assert [saga["saga_id"] for saga in found] == ["jsonl-2", "jsonl-1", "jsonl-0"]
    assert not {"steps", "input", "turn"} & found[0].keys()
    for name, command in {
        "sagas": ("list", *SHELF),
        "records": ("history", "jsonl-1"),
        "definitions": ("definitions", "list"),
    }.items():
        assert lines(*command) == json.loads(printed(*command, "-o", "json"))[name]
    assert [each["name"] for each in lines("participants")] == ["absent", "payments"]
    assert [each["participant"] for each in lines("breakers")] == ["absent", "payments"]


def test_what_prints_one_document_prints_it_on_one_line(printed: Printed) -> None:
    """A program that reads lines reads every command."""
    for command in (("get", "jsonl-0"), ("wait", "jsonl-0"), ("definitions", "get", "order")):
        [line] = printed(*command, "-o", "jsonl").splitlines()
        assert json.loads(line) == json.loads(printed(*command, "-o", "json"))


def test_that_there_are_more_is_said_on_standard_error(
    target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is no document around the lines to say it in."""
    assert run(["list", *SHELF, "--limit", "2", "-o", "jsonl", "--target", target]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert "there are more" in err


@pytest.mark.parametrize("command", ["list", "history jsonl-0", "definitions list", "breakers"])
def test_a_reader_that_leaves_after_a_line_is_no_error(target: str, command: str) -> None:
    """As in `amends list -o jsonl | head -1`."""
    piped = subprocess.run(
        [
            *("/bin/bash", "-o", "pipefail", "-c"),
            f'"$0" -m amends_runtime {command} -o jsonl | head -1',
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
    json.loads(line)


def test_a_reader_that_is_not_there_is_no_error(target: str) -> None:
    """It has left before the first line."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        finished = subprocess.run(
            [sys.executable, "-m", "amends_runtime", "list", "-o", "jsonl", "--target", target],
            stdout=writing,
            stderr=subprocess.PIPE,
            env=environment(),
            check=False,
            timeout=PATIENCE_S,
        )
    finally:
        os.close(writing)
    assert (finished.returncode, finished.stderr) == (0, b"")


def test_a_document_is_one_line_whatever_is_in_it() -> None:
    """What some readers take for the end of a line is escaped, and comes back as it was."""
    nasty = {"é": "a\nb\rc\u2028d\u2029e\x85f\x1b[2J"}
    line = to_json_line(nasty)
    assert len(line.splitlines()) == 1
    assert json.loads(line) == nasty
    assert "\x1b" not in line
