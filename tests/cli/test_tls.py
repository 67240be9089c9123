"""TLS at the command line: how a runtime says that it listens, and what a command says of it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from amends_runtime.cli.app import run
from tests.certificates import Authority
from tests.cli.conftest import Serve, amends


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """Who has signed everything."""
    return Authority(tmp_path)


def refusal(command: subprocess.CompletedProcess[str], code: int) -> str:
    """Give the one line of a command that ends with this code."""
    assert (command.returncode, command.stdout) == (code, ""), command.stderr
    [line] = command.stderr.splitlines()
    assert line.startswith("amends: ")
    for word in ("ca=", "cert=", "key=", "tls=", "server_name=", "ClientTls"):
        assert word not in line  # the SDK's words, not a person's
    return line.removeprefix("amends: ")


# -- serve -----------------------------------------------------------------------------------------


def test_a_runtime_says_how_it_listens(serve: Serve, authority: Authority) -> None:
    """In plain text, with TLS, or with TLS both ways; paths of flags start at this folder."""
    authority.issue("runtime")
    tls = ("--tls-cert", "runtime.pem", "--tls-key", "runtime.key")
    started = {
        "plain text": serve("--database", "1.db"),
        "TLS": serve(*tls, "--database", "2.db"),
        "mutual TLS": serve(*tls, "--tls-client-ca", "ca.pem", "--database", "3.db"),
    }
    for security, served in started.items():
        assert served.wait_for("amends is up")["security"] == security


def test_what_is_wrong_with_files_is_said_at_once(serve: Serve, tmp_path: Path) -> None:
    """A line each, exit code 2, and no database."""
    served = serve("--tls-cert", "nope.pem", "--tls-key", ".", "--tls-client-ca", "amends.toml")
    assert served.wait_ended() == 2
    assert served.lines == [
        "amends: --tls-cert: nope.pem: there is no such file",
        "amends: --tls-key: . is not a file: give the path of a PEM file",
        "amends: --tls-client-ca: amends.toml: there is no such file",
    ]
    assert not (tmp_path / "amends.db").exists()


# -- commands --------------------------------------------------------------------------------------


def test_a_command_that_speaks_otherwise_is_told_how(
    serve: Serve, tmp_path: Path, authority: Authority
) -> None:
    """Exit code 5 and one line, in flags, whichever side has it wrong."""
    authority.issue("runtime", names=("runtime.example",))
    strangers = Authority(tmp_path, "strangers")
    secured = serve("--tls-cert", "runtime.pem", "--tls-key", "runtime.key", "--database", "1.db")
    plain = serve("--database", "2.db")
    at_secured = ("list", "--target", secured.wait_for("amends is up")["address"])
    at_plain = ("list", "--target", plain.wait_for("amends is up")["address"])
    ca = ("--tls-ca", str(authority.cert))

    for command, hint in (
        (at_secured, "if it is a runtime that speaks TLS, give --tls-ca (AMENDS_TLS_CA)"),
        ((*at_plain, *ca), "leave --tls-ca, --tls-cert and --tls-key out"),
        ((*at_secured, "--tls-ca", str(strangers.cert)), "as --tls-ca"),
        ((*at_secured, *ca), "give its name as --tls-server-name"),
    ):
        assert hint in refusal(amends(*command), 5)

    named = amends(*at_secured, *ca, "--tls-server-name", "runtime.example", "-o", "json")
    assert named.returncode == 0
    assert json.loads(named.stdout)["sagas"] == []
    assert amends(*at_plain, AMENDS_TLS_CA="", AMENDS_TLS_CERT="").returncode == 0


def test_files_that_cannot_be_used_are_exit_code_2(
    tmp_path: Path,
    authority: Authority,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before anything is sent; the line names flag and file."""
    for name in [name for name in os.environ if name.startswith("AMENDS_")]:
        monkeypatch.delenv(name)
    cert, key = authority.issue("client")
    other = authority.issue("other")
    nope = tmp_path / "nope.pem"
    for flags, begins in (
        (("--tls-ca", nope), f"--tls-ca '{nope}' cannot be read (No such file or directory)"),
        (("--tls-ca", key), f"--tls-ca '{key}' holds no certificate"),
        (("--tls-cert", cert), f"--tls-cert '{cert}' is given without its key: give --tls-key"),
        (
            ("--tls-key", key),
            f"--tls-key '{key}' is given without its certificate: give --tls-cert",
        ),
        (
            ("--tls-cert", cert, "--tls-key", other.key),
            f"--tls-key '{other.key}' is not the key of --tls-cert '{cert}'",
        ),
    ):
        code = run(["list", *map(str, flags)])
        said = subprocess.CompletedProcess([], code, *capsys.readouterr())
        assert refusal(said, 2).startswith(begins)
