"""`amends serve` as an operator meets it: up, down, and refusing to start."""

import json
import os
import signal
import socket
import sqlite3
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import ORDER, Serve, Served, amends


def refusal(served: Served) -> tuple[int, str]:
    """The exit code of a runtime that does not start, and its one line."""
    code = served.wait_ended()
    said = [line for line in served.lines if not line.startswith("{")]
    assert len(said) == 1, said
    assert "Traceback" not in "\n".join(served.lines)
    return code, said[0].removeprefix("amends: ")


# -- up and down -----------------------------------------------------------------------------------


def test_the_ready_file_is_there_while_the_runtime_is_up(serve: Serve, tmp_path: Path) -> None:
    """It names pid and address, appears when all is up, and is gone at the end."""
    ready = tmp_path / "ready.json"
    ready.write_text("of an earlier run", encoding="utf-8")
    served = serve("--ready-file", "ready.json")
    up = served.wait_for("amends is up")
    content = json.loads(ready.read_text(encoding="utf-8"))
    assert content == {"pid": served.process.pid, "address": up["address"]}
    assert [path.name for path in tmp_path.iterdir() if "ready" in path.name] == ["ready.json"]
    assert amends("runtime", "--target", content["address"]).returncode == 0
    served.process.send_signal(signal.SIGTERM)
    assert served.wait_ended() == 0
    assert not ready.exists()


def test_it_says_where_traces_go_and_how_many(serve: Serve) -> None:
    """The share of sagas whose trace is kept is as easily forgotten as the address."""
    served = serve("--otlp", "127.0.0.1:1")
    up = served.wait_for("amends is up")
    assert (up["traces"], up["traces_ratio"]) == ("http://127.0.0.1:1 (grpc)", 1.0)
    served.process.send_signal(signal.SIGTERM)
    assert served.wait_ended() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_the_first_signal_stops_in_order(serve: Serve, number: signal.Signals) -> None:
    """Exit code 0, nothing on standard output, and the log says that it ended."""
    served = serve()
    served.wait_for("amends is up")
    served.process.send_signal(number)
    assert served.wait_ended() == 0
    assert json.loads(served.lines[-1])["message"] == "amends has stopped"
    assert served.process.stdout is not None
    assert served.process.stdout.read() == ""


def test_the_second_signal_ends_it_at_once(serve: Serve, tmp_path: Path) -> None:
    """A call that hangs holds up the way down for a while; a second signal does not wait for it."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        (tmp_path / "order.json").write_text(json.dumps(ORDER), encoding="utf-8")
        served = serve(
            *("--participant", f"payments=127.0.0.1:{silent.getsockname()[1]}"),
            *("--definition", "order.json", "--ready-file", "ready.json"),
        )
        address = served.wait_for("amends is up")["address"]
        assert amends("start", "order", "--target", address).returncode == 0
        connection, _ = silent.accept()  # the call is under way, and gets no answer
        with connection:
            served.process.send_signal(signal.SIGTERM)
            served.wait_for("stopping")
            served.process.send_signal(signal.SIGINT)
            assert served.wait_ended() == 1
    assert served.lines[-1] == "amends: a second signal (SIGINT): ending at once"
    assert not (tmp_path / "ready.json").exists()


def test_it_stops_when_standard_input_ends(serve: Serve) -> None:
    """A script that dies leaves nothing behind; without the flag standard input does not matter."""
    bound, free = serve(), serve("--database", "other.db", leashed=False)
    for served in (bound, free):
        served.wait_for("amends is up")
        assert served.process.stdin is not None
        served.process.stdin.close()
    bound.process.send_signal(signal.SIGTERM)  # what a script that dies may send besides
    assert bound.wait_ended() == 0
    assert free.process.poll() is None
    free.process.send_signal(signal.SIGTERM)
    assert free.wait_ended() == 0


def test_it_comes_up_from_a_file_and_finds_its_sagas_again(
    serve: Serve, tmp_path: Path, payments: str
) -> None:
    """A restart on the same database knows what was started before."""
    (tmp_path / "definitions").mkdir()
    (tmp_path / "definitions" / "order.toml").write_text(
        'name = "order"\n[[steps]]\nname = "charge"\nparticipant = "payments"\naction = "charge"\n',
        encoding="utf-8",
    )
    (tmp_path / "amends.toml").write_text(
        f"""
        definitions = ["definitions/*.toml"]
        [server]
        listen = "127.0.0.1:0"
        [participants.payments]
        address = "{payments}"
        """,
        encoding="utf-8",
    )
    arguments = ("--config", "amends.toml", "--listen", "unix:amends.sock")
    target = {"AMENDS_TARGET": f"unix:{tmp_path}/amends.sock"}
    first = serve(*arguments)
    up = first.wait_for("amends is up")
    assert up["address"] == "unix:amends.sock"
    assert (up["participants"], up["definitions"]) == (["payments"], ["order"])
    started = amends("start", "order", "--id", "order-1", "--wait", **target)
    assert started.returncode == 0, started.stderr
    first.process.send_signal(signal.SIGKILL)
    assert first.wait_ended() == -signal.SIGKILL
    second = serve(*arguments)
    second.wait_for("amends is up")
    got = amends("get", "order-1", "-o", "json", **target)
    assert json.loads(got.stdout)["state"] == "COMPLETED"


def test_the_log_is_json_where_nobody_watches(serve: Serve) -> None:
    """In a pipe each line of the log is one JSON object; --log-format console asks for text."""
    served = serve()
    served.wait_for("amends is up")
    assert all(json.loads(line)["level"] for line in served.lines)
    text = serve("--log-format", "console", "--database", "other.db")
    text.wait_for("amends is up")
    assert not any(line.startswith("{") for line in text.lines)


def test_no_payload_reaches_the_log_at_any_level(
    serve: Serve, tmp_path: Path, payments: str
) -> None:
    """Not even at debug, where libraries would log the parameters of every statement."""
    (tmp_path / "order.json").write_text(json.dumps(ORDER), encoding="utf-8")
    served = serve(
        *("--log-level", "debug", "--participant", f"payments={payments}"),
        *("--definition", "order.json"),
    )
    address = served.wait_for("amends is up")["address"]
    order = ("start", "order", "--id", "order-1", "--input", '{"card": "4111-1111"}')
    assert amends(*order, "--wait", "--target", address).returncode == 0
    served.process.send_signal(signal.SIGTERM)
    assert served.wait_ended() == 0
    log = "\n".join(served.lines)
    assert "order-1" in log
    assert "4111" not in log


# -- refusing to start -----------------------------------------------------------------------------


def test_a_ready_file_that_cannot_be_written_is_one_line(serve: Serve) -> None:
    """Whoever waits for it would wait for ever; so the runtime goes down again."""
    code, line = refusal(serve("--ready-file", "/proc/ready.json"))
    assert code == 2
    assert line.startswith("--ready-file /proc/ready.json: cannot be written")


def test_a_busy_port_is_one_line(serve: Serve) -> None:
    """It names the address and how to choose another."""
    with socket.create_server(("127.0.0.1", 0)) as busy:
        address = f"127.0.0.1:{busy.getsockname()[1]}"
        code, line = refusal(serve("--listen", address, "--ready-file", "ready.json"))
    assert code == 2
    assert address in line
    assert "another process listens there" in line


def test_an_address_for_all_the_world_needs_the_word(serve: Serve) -> None:
    """Without encryption only this machine is served, unless --insecure says that it is meant."""
    code, line = refusal(serve("--listen", "0.0.0.0:0"))
    assert code == 2
    assert "other machines" in line


def test_a_second_runtime_on_the_database_is_refused(serve: Serve) -> None:
    """Exit code 4, and the line names who has it."""
    first = serve()
    first.wait_for("amends is up")
    code, line = refusal(serve())
    assert code == 4
    assert "amends.db" in line
    assert str(first.process.pid) in line


def test_a_database_that_cannot_be_used_is_refused(serve: Serve, tmp_path: Path) -> None:
    """Exit code 5: no folder, a folder in its place, no database, a place that is read-only."""
    (tmp_path / "folder.db").mkdir()
    (tmp_path / "text.db").write_text("hello " * 100, encoding="utf-8")
    databases = ("nope/amends.db", "folder.db", "text.db", "/proc/amends.db")
    refused = [serve("--database", database) for database in databases]
    for database, served in zip(databases, refused, strict=True):
        code, line = refusal(served)
        assert code == 5, line
        assert Path(database).name in line or str(Path(database).parent) in line


def test_a_database_of_a_newer_version_is_refused(serve: Serve, tmp_path: Path) -> None:
    """Exit code 5, and it is not touched: an older program does not know what it would break."""
    first = serve()
    first.wait_for("amends is up")
    first.process.send_signal(signal.SIGTERM)
    assert first.wait_ended() == 0
    with sqlite3.connect(tmp_path / "amends.db") as database:
        (version,) = database.execute("PRAGMA user_version").fetchone()
        database.execute(f"PRAGMA user_version = {version + 1}")
    database.close()
    code, line = refusal(serve())
    assert code == 5
    assert "newer" in line


def test_a_definition_that_the_runtime_refuses_is_said(serve: Serve, tmp_path: Path) -> None:
    """A step of a participant that nobody configured: exit code 2, and nothing is served."""
    (tmp_path / "order.json").write_text(json.dumps(ORDER), encoding="utf-8")
    code, line = refusal(serve("--definition", "order.json", "--ready-file", "ready.json"))
    assert code == 2
    assert "participant 'payments' is not registered" in line
    assert not (tmp_path / "ready.json").exists()


def test_a_definition_may_name_a_participant_that_an_operator_added(
    serve: Serve, tmp_path: Path, payments: str
) -> None:
    """It stands in the database; one that nobody added is refused, with its place in the file."""
    (tmp_path / "order.json").write_text(json.dumps(ORDER), encoding="utf-8")
    first = serve("--listen", "unix:amends.sock")
    first.wait_for("amends is up")
    target = {"AMENDS_TARGET": f"unix:{tmp_path}/amends.sock"}
    code, line = refusal(serve("--definition", "order.json", "--database", "other.db"))
    assert (code, "participant 'payments' is not registered" in line) == (2, True)
    added = amends("participants", "add", f"payments={payments}", "--reason", "test", **target)
    assert added.returncode == 0, added.stderr
    first.process.send_signal(signal.SIGTERM)
    assert first.wait_ended() == 0
    second = serve("--listen", "unix:amends.sock", "--definition", "order.json")
    up = second.wait_for("amends is up")
    assert (up["participants"], up["definitions"]) == (["payments"], ["order"])
    removed = amends("participants", "remove", "payments", "--reason", "test", **target)
    assert removed.returncode == 0, removed.stderr
    second.process.send_signal(signal.SIGTERM)
    assert second.wait_ended() == 0
    code, line = refusal(serve("--definition", "order.json"))
    assert code == 2
    assert line.startswith("order.json:1:")
    assert "participant 'payments' is not registered" in line


def test_an_install_without_the_runtime_says_how_to_get_it() -> None:
    """`pip install amends` has the command, but not what it needs: one line and exit code 2."""
    import subprocess  # noqa: PLC0415  # for a fresh interpreter that lacks a package

    for package, arguments in (
        ("cyclopts", ["--help"]),
        ("rich", ["--help"]),
        ("pydantic_settings", ["serve"]),
        ("msgspec", ["serve"]),
    ):
        script = (
            f"import sys; sys.modules['{package}'] = None\n"
            "from amends_runtime.__main__ import main\n"
            "main()\n"
        )
        finished = subprocess.run(
            [sys.executable, "-c", script, *arguments],
            capture_output=True,
            text=True,
            env={**os.environ},
            check=False,
        )
        assert finished.returncode == 2, finished.stderr
        [line] = finished.stderr.splitlines()
        assert "pip install 'amends[runtime]'" in line
