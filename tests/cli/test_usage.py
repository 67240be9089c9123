"""What a person can type wrong, and what the command line says then. No runtime is needed."""

import os
import sys
from pathlib import Path

import pytest

from amends_runtime.cli.app import build_app, run

CLOSED = "127.0.0.1:1"  # nobody listens on port 1


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever AMENDS_* the machine has, a test starts without it."""
    for name in [name for name in os.environ if name.startswith("AMENDS_")]:
        monkeypatch.delenv(name)


def complaint(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    """The one line on standard error of a command that ends with `code`; nothing is printed."""
    assert run(arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    [line] = err.splitlines()
    assert line.startswith("amends: ")
    return line.removeprefix("amends: ")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("gt order-1", 'Unknown command "gt". Did you mean "get"? See amends --help'),
        (
            "definitions lst",
            'Unknown command "lst". Did you mean "list"? See amends definitions --help',
        ),
        ("get", 'Command "get" parameter ID requires an argument; see amends get --help'),
        (
            "get a b",
            "one argument too many: b (quote a value that has spaces); see amends get --help",
        ),
        (
            "get a --tagret x",
            "Unknown option: --tagret. Did you mean --target? See amends get --help",
        ),
        (
            "list -o yaml",
            (
                'Invalid value "yaml" for -o. Choose from: "table", "json", "jsonl"; '
                "see amends list --help"
            ),
        ),
        ("list --limit 0", 'Invalid value "0" for --limit. Must be >= 1; see amends list --help'),
        ("list --label x", "--label x: write --label KEY=VALUE"),
        ("list --label x=1 --label x=2", "--label x: is given twice; keep one of them"),
        (
            "start order --timeout 3",
            "--timeout: bounds --wait; add --wait, or leave it out",
        ),
        (
            "start order --deadline nan",
            'Invalid value "nan" for --deadline. Must be > 0; see amends start --help',
        ),
        (
            "start order --content-type a/b",
            "--content-type: is the type of --input; give one",
        ),
        ("start order --input @nope", "--input @nope: there is no such file; check the path"),
        (
            "cancel order-1",
            'Command "cancel" parameter --reason requires an argument; see amends cancel --help',
        ),
        ("definitions register nope.toml", "nope.toml: there is no such file; check the path"),
        (
            "definitions register nope.ini",
            ("nope.ini: is none of .yaml, .yml, .toml and .json; definition files are"),
        ),
        (
            "serve --config nope.toml",
            ("nope.toml: there is no such file; check --config (or AMENDS_CONFIG)"),
        ),
        (
            "serve --participant payments",
            ("--participant payments: write --participant NAME=ADDRESS"),
        ),
        (
            "serve --participant payments=7001",
            (
                "--participant payments: must be host:port or "
                'unix:path, for example "127.0.0.1:7001" (IPv6 in brackets: "[::1]:7001"), not '
                "'7001'"
            ),
        ),
        (
            "serve --definition nope/*.toml",
            ("nope/*.toml: no file matches; check the pattern, or leave it out"),
        ),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: str,
    line: str,
) -> None:
    """The line says what is wrong and what to write or read instead."""
    monkeypatch.chdir(tmp_path)
    assert complaint(capsys, 2, *arguments.split()) == line


@pytest.mark.parametrize("text", ["{", "", "nan", "{'a': 1}", "[" * 100_000])
def test_an_input_that_is_no_json_is_refused_without_being_shown(
    capsys: pytest.CaptureFixture[str], text: str
) -> None:
    """Inputs may be secrets: the line says where it stops being JSON, not what it is."""
    said = complaint(capsys, 2, "start", "order", "--input", text, "--target", CLOSED)
    assert said.startswith("--input: ")
    assert "'a'" not in said
    assert len(said) < 250


def test_an_input_file_that_is_no_json_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Bytes that are not UTF-8, a folder, a file that is cut off."""
    (tmp_path / "a").write_bytes(b"\xff\xfe\xfa")
    assert complaint(capsys, 2, "start", "x", "--input", f"@{tmp_path}/a").startswith(
        "--input: is not UTF-8"
    )
    assert "Is a directory" in complaint(capsys, 2, "start", "x", "--input", f"@{tmp_path}")


def test_no_standard_output_is_one_line() -> None:
    """As in `amends list >&-`: the descriptor is closed, and Python has no stream for it."""
    import subprocess  # noqa: PLC0415  # one test that needs a closed descriptor

    command = f"exec {sys.executable} -m amends_runtime version >&-"
    finished = subprocess.run(
        ["/bin/sh", "-c", command], stderr=subprocess.PIPE, text=True, check=False
    )
    assert finished.returncode == 1
    [line] = finished.stderr.splitlines()
    assert line.startswith("amends: standard output is closed")


def test_a_cancellation_needs_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    """An empty one would land in the history and help nobody there."""
    said = complaint(capsys, 2, "cancel", "order-1", "--reason", " ", "--target", CLOSED)
    assert said == "--reason: is empty; say why, it lands in the history"


def test_states_are_taken_in_any_case(capsys: pytest.CaptureFixture[str]) -> None:
    """As people type them; what is no state names those that there are."""
    assert CLOSED in complaint(capsys, 5, "list", "--state", "Running", "--target", CLOSED)
    said = complaint(capsys, 2, "list", "--state", "runing")
    assert '"RUNNING"' in said


def test_a_ready_file_in_no_folder_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It is looked at before anything is opened."""
    said = complaint(capsys, 2, "serve", "--ready-file", f"{tmp_path}/nope/ready.json")
    assert "make it first" in said


def test_nobody_at_the_target_is_exit_code_5(capsys: pytest.CaptureFixture[str]) -> None:
    """The line names the target and how to start a runtime or name another."""
    said = complaint(capsys, 5, "get", "order-1", "--target", CLOSED)
    assert CLOSED in said
    assert "(ipv4:127.0.0.1:1: Failed to connect to remote host: Connection refused)" in said
    assert "amends serve" in said
    assert "AMENDS_TARGET" in said


def test_shared_options_may_stand_before_the_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """--target and -o belong to all commands, so they are taken on both sides of the name."""
    for arguments in (
        ["--target", CLOSED, "-o", "json", "definitions", "list"],
        [f"--target={CLOSED}", "definitions", "list", "--output=json"],
        ["definitions", "list", "--target", CLOSED],
    ):
        assert CLOSED in complaint(capsys, 5, *arguments)


def test_the_environment_names_the_target(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """AMENDS_TARGET is asked where --target is not given."""
    monkeypatch.setenv("AMENDS_TARGET", CLOSED)
    assert CLOSED in complaint(capsys, 5, "list")


def test_an_empty_variable_is_not_set(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers leave variables unset by setting them to nothing."""
    for name in ("AMENDS_TARGET", "AMENDS_CONFIG", "AMENDS_DEBUG"):
        monkeypatch.setenv(name, "")
    said = complaint(capsys, 2, "serve", "--listen", "nowhere")
    assert said.startswith("--listen: must be host:port")
    assert CLOSED in complaint(capsys, 5, "list", "--target", CLOSED)


def test_an_argument_that_is_not_utf8_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """It could not be sent, and must not end in a traceback."""
    assert complaint(capsys, 2, "get", "\udcff") == (
        r"'\udcff': is not UTF-8; amends takes UTF-8 only"
    )


def test_debug_shows_the_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--debug, or AMENDS_DEBUG, adds what a bug report needs; nothing else does."""
    assert run(["get", "x", "--target", CLOSED, "--debug"]) == 5
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("AMENDS_DEBUG", "1")
    assert run(["get", "x", "--target", CLOSED]) == 5
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("AMENDS_DEBUG", "0")
    assert run(["get", "x", "--target", CLOSED]) == 5
    assert "Traceback" not in capsys.readouterr().err


def test_a_bug_is_one_line_and_exit_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line names where it is and how to see more, and not the error's text.

    The text may quote what must not be shown.
    """
    import amends  # noqa: PLC0415  # only this test wants to break it

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("card 4111")

    monkeypatch.setattr(amends, "Client", broken)
    assert run(["get", "x"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "internal error: RuntimeError at test_usage.py:" in err
    assert "--debug" in err
    assert "4111" not in err
    assert "Traceback" not in err


def every_command() -> list[str]:
    """Name every command, subcommands included."""
    names = []
    app = build_app()
    for name in app:
        if name.startswith("-"):
            continue
        inner = [sub for sub in app[name] if not sub.startswith("-")]
        names += [f"{name} {sub}" for sub in inner] if inner else [name]
    return names


@pytest.mark.parametrize("command", every_command())
def test_every_command_has_a_help_of_its_own(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """Help names the command, has an example, and says the exit codes."""
    assert run([*command.split(), "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith(f"Usage: amends {command}")
    assert "Exit codes: 0 done" in out
    assert command == "version" or f"amends {command}" in out.partition("For example:")[2]


def test_help_needs_neither_grpc_nor_pydantic() -> None:
    """Help comes at once: what is heavy is imported by the command that runs."""
    import subprocess  # noqa: PLC0415  # one test that needs a fresh interpreter

    script = (
        "import sys\n"
        "from amends_runtime.cli.app import run\n"
        "code = run(['--help'])\n"
        "heavy = {'grpc', 'pydantic', 'structlog', 'aiosqlite', 'amends'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert finished.stderr == ""
    assert finished.returncode == 0
