"""`amends dev`, as somebody meets it who has just installed amends."""

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from amends_runtime.cli import dev as module
from amends_runtime.cli.dev_files import DevFiles
from amends_runtime.cli.exits import Exit, ExitCode
from amends_runtime.errors import StoreInUse
from amends_runtime.storage import open_sqlite_store
from tests.cli.conftest import PATIENCE_S, Served, amends, environment

LAST_LINE = "Ctrl-C ends it; amends dev --reset starts afresh."


class Dev:
    """`amends dev` in a folder, on a free port, with its output read up to its last line."""

    def __init__(self, folder: Path, *arguments: str, **extra: str) -> None:
        self.ready = folder / "ready.json"
        for flag, value in (("--listen", "127.0.0.1:0"), ("--ready-file", str(self.ready))):
            if flag not in arguments:
                arguments = (*arguments, flag, value)
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "amends_runtime", "dev", "--until-stdin-closes"),
                *arguments,
            ],
            cwd=folder,
            env=environment(**extra),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_up(self) -> str:
        """Read what it prints until it has said all; return it."""
        assert self.process.stdout is not None
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if line.rstrip() == LAST_LINE:
                return "".join(lines)
        raise AssertionError("".join(lines) + self.wait_ended()[1])

    @property
    def address(self) -> str:
        """Where the runtime is."""
        found: str = json.loads(self.ready.read_text(encoding="utf-8"))["address"]
        return found

    def wait_ended(self) -> tuple[int, str]:
        """Wait for its end; return its exit code and what it said on standard error."""
        _, err = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, err

    def end(self, number: signal.Signals) -> tuple[int, str]:
        """Send a signal, and wait."""
        self.process.send_signal(number)
        return self.wait_ended()


Start = Callable[..., Dev]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start `amends dev` in the test's folder."""
    started: list[Dev] = []

    def begin(*arguments: str, **extra: str) -> Dev:
        one = Dev(tmp_path, *arguments, **extra)
        started.append(one)
        return one

    yield begin
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.process.communicate()


def state(saga_id: str, address: str) -> str:
    """The state of a saga, waited for."""
    shown = amends("wait", saga_id, "-o", "json", "--timeout", "30", "--target", address)
    found: str = json.loads(shown.stdout)["state"]
    return found


def test_it_shows_a_saga_and_where_everything_is(start: Start, tmp_path: Path) -> None:
    """Addresses and files, the saga's history in words, and what to try next."""
    one = start()
    said = one.wait_up()
    assert re.search(rf"runtime +{re.escape(one.address)}\n", said)
    assert re.search(r"participant +demo at 127\.0\.0\.1:\d+, in this process\n", said)
    assert str(tmp_path / "amends-dev.db") in said
    happened = re.findall(r"(?m)^\d{4}-\S+Z +(.+)$", said)
    assert happened[0].startswith("started: ")
    assert happened[0].endswith("execute reserve")
    assert happened[-1].startswith("ship is executed")
    assert happened[-1].endswith("ended COMPLETED")
    assert one.end(signal.SIGINT) == (0, "")
    assert not one.ready.exists()


def test_it_says_where_traces_and_metrics_go(start: Start) -> None:
    """By its flags, or by OpenTelemetry's variables, which count here, too."""
    one = start("--otlp", "127.0.0.1:1", "--metrics-listen", "127.0.0.1:0")
    said = one.wait_up()
    assert re.search(r"(?m)^traces +http://127\.0\.0\.1:1 \(grpc\)$", said)
    metrics = json.loads(one.ready.read_text(encoding="utf-8"))["metrics"]
    assert re.search(rf"(?m)^metrics +{re.escape(metrics)}$", said)
    assert one.end(signal.SIGTERM)[0] == 0
    two = start(OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:2")
    said = two.wait_up()
    assert re.search(r"(?m)^traces +http://127\.0\.0\.1:2 \(grpc\)$", said)
    assert not re.search(r"(?m)^metrics", said)


def test_every_command_that_it_names_works(start: Start) -> None:
    """As they stand there, one after the other, in another terminal; `watch` has no end."""
    one = start()
    said = one.wait_up()
    commands = re.findall(r"(?m)^  (amends (?!watch).+?)(?: {3,}#.*)?$", said)
    assert len(commands) == 7
    assert f"export AMENDS_TARGET={one.address}" in said
    told = ""
    for command in commands:
        asked = subprocess.run(
            ["/bin/sh", "-c", f'"$0" -m amends_runtime{command[6:]}', sys.executable],
            env=environment(AMENDS_TARGET=one.address),
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert asked.returncode == (6 if "--wait" in command else 0), asked.stderr
        told += asked.stdout
        if "--id mine" in command:
            wait = ("wait", "mine", "--timeout", "0.05", "--target", one.address)
            while "STUCK" not in amends(*wait).stderr:
                pass  # each look takes as long as its time-out; the test run's patience bounds it
    assert "limit_exceeded" in told
    assert "ledger_locked" in told
    assert "amends retry mine --reason WHY" in told
    assert state("mine", one.address) == "COMPLETED"
    code, err = one.end(signal.SIGTERM)
    assert code == 0
    assert "ledger_locked" in err  # what is stuck is never silent


def test_a_second_run_goes_on_with_the_first(start: Start) -> None:
    """After an orderly end and after a kill: sagas are still there, and each run has its own."""
    first = start()
    assert "hello-1" in first.wait_up()
    assert first.end(signal.SIGINT)[0] == 0
    second = start()
    assert "hello-2" in second.wait_up()
    assert second.end(signal.SIGKILL)[0] == -signal.SIGKILL
    third = start()
    assert "hello-3" in third.wait_up()
    for number in (1, 2, 3):
        assert state(f"hello-{number}", third.address) == "COMPLETED"
    assert third.end(signal.SIGINT) == (0, "")


def test_a_reset_removes_its_own_files_and_nothing_else(start: Start, tmp_path: Path) -> None:
    """The next run begins with the first saga again; a neighbour's file is left alone."""
    neighbour = tmp_path / "amends-dev.db.notes"
    neighbour.write_text("mine", encoding="utf-8")
    first = start()
    first.wait_up()
    first.end(signal.SIGKILL)  # leaves logs beside the databases
    second = start("--reset")
    said = second.wait_up()
    assert f"removed what earlier runs left in {tmp_path}/amends-dev.db" in said
    assert "hello-1" in said
    assert second.end(signal.SIGINT) == (0, "")
    DevFiles(str(tmp_path / "amends-dev.db")).remove()
    assert [path.name for path in tmp_path.iterdir()] == [neighbour.name]


def test_a_reset_while_it_runs_is_refused(start: Start) -> None:
    """Exit code 4; the one that runs does not notice."""
    one = start()
    one.wait_up()
    code, err = start("--reset", "--ready-file", "other.json").wait_ended()
    assert code == 4
    assert "is in use" in err
    assert state("hello-1", one.address) == "COMPLETED"
    assert one.end(signal.SIGINT) == (0, "")


def test_a_database_of_amends_serve_is_neither_used_nor_removed(
    start: Start, tmp_path: Path
) -> None:
    """Nobody may play with what may be real."""
    served = Served("--listen", "127.0.0.1:0", "--database", "real.db", cwd=tmp_path)
    try:
        served.wait_for("amends is up")
        served.process.send_signal(signal.SIGTERM)
        assert served.wait_ended() == 0
    finally:
        served.close()
    before = (tmp_path / "real.db").read_bytes()
    for arguments in ((), ("--reset",)):
        code, err = start("--database", "real.db", *arguments).wait_ended()
        assert code == 4
        [line] = err.splitlines()
        assert "was not made by amends dev" in line
    assert (tmp_path / "real.db").read_bytes() == before


def test_a_database_that_took_the_place_of_its_own_is_not_removed(
    start: Start, tmp_path: Path
) -> None:
    """The note beside it names another store."""
    for name in ("a.db", "b.db"):
        one = start("--database", name)
        one.wait_up()
        assert one.end(signal.SIGINT) == (0, "")
    ours, other = tmp_path / "a.db", tmp_path / "b.db"
    ours.write_bytes(other.read_bytes())
    code, err = start("--database", "a.db", "--reset").wait_ended()
    assert code == 4
    assert "is not the database that amends dev made here" in err
    assert ours.read_bytes() == other.read_bytes()


def test_it_reads_no_configuration(start: Start, tmp_path: Path) -> None:
    """Participants that do real work are not called because somebody tries something out."""
    (tmp_path / "real.toml").write_text(
        '[participants.payments]\naddress = "127.0.0.1:1"\n', encoding="utf-8"
    )
    one = start(
        AMENDS_CONFIG=str(tmp_path / "real.toml"),
        AMENDS_SERVER__DATABASE=str(tmp_path / "real.db"),
        AMENDS_PARTICIPANTS__SHIPPING__ADDRESS="127.0.0.1:1",
    )
    one.wait_up()
    listed = amends("participants", "-o", "json", "--target", one.address)
    assert [each["name"] for each in json.loads(listed.stdout)["participants"]] == ["demo"]
    assert not (tmp_path / "real.db").exists()
    assert one.end(signal.SIGINT) == (0, "")


def test_it_takes_participants_and_definitions_of_yours(
    start: Start, tmp_path: Path, payments: str
) -> None:
    """Besides its own; a name that is taken and a fault in a file are said before all else."""
    order = {
        "name": "order",
        "steps": [
            {"name": "charge", "participant": "payments", "action": "charge"},
            {"name": "ship", "participant": "demo", "action": "ship", "kind": "RETRIABLE"},
        ],
    }
    (tmp_path / "order.json").write_text(json.dumps(order), encoding="utf-8")
    one = start("--participant", f"payments={payments}", "--definition", "order.json")
    assert f"payments at {payments}" in one.wait_up()
    started = amends("start", "order", "--wait", "--target", one.address)
    assert started.returncode == 0, started.stderr
    assert one.end(signal.SIGINT) == (0, "")
    for arguments, word in {
        ("--participant", "demo=127.0.0.1:1"): "is the built-in one",
        ("--definition", "order.json"): "participant 'payments' is not registered",
        ("--listen", "0.0.0.0:0"): "is for this one only",
        ("--database", "nope/x.db"): "does not exist",
    }.items():
        code, err = start(*arguments).wait_ended()
        assert code in (2, 5)
        [line] = err.splitlines()
        assert word in line
    assert not (tmp_path / "amends.db").exists()


def test_a_port_that_is_taken_is_replaced_unless_it_was_asked_for(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any other by default, which it says; the one that was asked for, or none."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(module, "DEFAULT_PORT", port)
        assert module._free_address() == "127.0.0.1:0"
        code, err = start("--listen", f"127.0.0.1:{port}").wait_ended()
        assert code == 2
        assert f"cannot listen on 127.0.0.1:{port}: another process listens there" in err
        assert "choose another address with --listen, port 0 for any free one" in err
        assert "[server]" not in err  # it reads none
    assert not list(tmp_path.iterdir())
    assert module._free_address() == f"127.0.0.1:{port}"


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b'{"made_by": "somebody"}', b"\xff", b"[" * 4096],
    ids=["empty", "list", "no-keys", "of-somebody", "bytes", "deep"],
)
def test_a_note_that_is_none_is_said(tmp_path: Path, content: bytes) -> None:
    """Nothing is opened or removed on its word."""
    (tmp_path / "x.db.dev").write_bytes(content)
    files = DevFiles(str(tmp_path / "x.db"))
    for act in (files.claim, files.remove):
        with pytest.raises(Exit) as refused:
            act()
        assert refused.value.code is ExitCode.CONFLICT
        assert "is no note of amends dev" in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["x.db.dev"]


async def test_a_crash_before_the_store_has_an_id_leaves_files_that_can_be_removed(
    tmp_path: Path,
) -> None:
    """The note is there first; the store that was made after it has no saga, so it is ours."""
    files = DevFiles(str(tmp_path / "x.db"))
    files.claim()
    assert [path.name for path in tmp_path.iterdir()] == ["x.db.dev"]
    async with open_sqlite_store(files.database):
        with pytest.raises(StoreInUse):
            files.remove()
    files.claim()  # a second run may use it
    assert files.remove()
    assert not list(tmp_path.iterdir())
    assert not files.remove()
