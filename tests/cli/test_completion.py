"""Completion: the scripts are valid, and a real shell completes with them."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from amends import Client
from amends_runtime.cli.app import run
from amends_runtime.cli.candidates import MOST
from tests.cli.conftest import ORDER, PATIENCE_S, Serve, amends, environment


@pytest.fixture
def script(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The script for a shell, in a file."""
    capsys: pytest.CaptureFixture[str] = request.getfixturevalue("capsys")
    assert run(["completion", request.param]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    file = tmp_path / f"amends.{request.param}"
    file.write_text(out, encoding="utf-8")
    return file


@pytest.mark.parametrize("script", ["bash", "zsh", "fish"], indirect=True)
def test_a_script_is_valid(script: Path) -> None:
    """The shell itself says so where it is installed; everywhere it names all commands."""
    text = script.read_text(encoding="utf-8")
    for word in ("participants", "abandon", "watch", "--started-from", "jsonl"):
        assert word in text
    shell = script.suffix[1:]
    if shutil.which(shell):
        option = "--no-execute" if shell == "fish" else "-n"
        checked = subprocess.run(
            [shell, option, str(script)],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert (checked.returncode, checked.stderr) == (0, "")


ASK = """
source "$0"
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
_amends
printf '%s\\n' "${COMPREPLY[@]}"
"""


def completed(script: Path, *words: str, **extra: str) -> list[str]:
    """What a real bash offers for the last of these words."""
    asked = subprocess.run(
        [
            *("bash", "--norc", "-c"),
            ASK,
            *(str(script), *words),
        ],
        env=environment(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}", **extra),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    assert asked.stderr == ""
    return asked.stdout.split()


@pytest.mark.parametrize("script", ["bash"], indirect=True)
def test_a_real_bash_completes(script: Path) -> None:
    """Commands, commands of groups, options, and the values that an option may have."""
    assert completed(script, "amends", "par") == ["participants"]
    assert set(completed(script, "amends", "")) >= {"dev", "serve", "start", "watch", "retry"}
    assert set(completed(script, "amends", "participants", "")) == {"list", "add", "remove"}
    assert completed(script, "amends", "start", "--inp") == ["--input"]
    assert completed(script, "amends", "list", "--state", "ST") == ["STUCK"]
    assert completed(script, "amends", "list", "-o", "j") == ["json", "jsonl"]
    assert completed(script, "amends", "completion", "") == ["bash", "zsh", "fish"]


@pytest.mark.parametrize("script", ["bash"], indirect=True)
def test_what_only_the_runtime_knows_is_asked_for(script: Path, target: str) -> None:
    """Ids, definitions and participants of the runtime that is named; nothing if there is none."""
    started = amends("start", "order", "--id", "tab-1", "--wait", "--target", target)
    assert started.returncode == 0, started.stderr
    there = {"AMENDS_TARGET": target}
    names = completed(script, "amends", "start", "", **there)
    assert set(names) >= {"order", "turning", "waiting"}
    assert completed(script, "amends", "get", "tab", **there) == ["tab-1"]
    assert completed(script, "amends", "cancel", "tab", **there) == []
    assert completed(script, "amends", "list", "--definition", "ord", **there) == ["order"]
    assert completed(script, "amends", "participants", "remove", "", **there) == []
    assert completed(script, "amends", "get", "--target", target, "tab") == ["tab-1"]
    assert completed(script, "amends", "get", "", AMENDS_TARGET="127.0.0.1:1") == []


@pytest.mark.parametrize("script", ["bash"], indirect=True)
def test_an_old_saga_is_found_by_what_is_typed(
    script: Path, serve: Serve, tmp_path: Path, payments: str
) -> None:
    """Not only among the newest; and what an operator added is what he can take back."""
    (tmp_path / "order.json").write_text(json.dumps(ORDER), encoding="utf-8")
    options = ("--definition", "order.json", "--participant", f"payments={payments}")
    there = {"AMENDS_TARGET": serve(*options).wait_for("amends is up")["address"]}
    asyncio.run(many_sagas(there["AMENDS_TARGET"], ["first-1", *map(str, range(MOST))]))
    assert completed(script, "amends", "get", "first", **there) == ["first-1"]
    assert len(completed(script, "amends", "get", "", **there)) == MOST
    assert "first-1" not in completed(script, "amends", "get", "", **there)
    assert completed(script, "amends", "participants", "remove", "", **there) == []
    added = amends("participants", "add", f"extra={payments}", "--reason", "test", **there)
    assert (added.returncode, added.stderr) == (0, "")
    assert completed(script, "amends", "participants", "remove", "", **there) == ["extra"]


async def many_sagas(target: str, ids: list[str]) -> None:
    """Start a saga under each of these ids, one after another."""
    async with Client(target) as client:
        for saga_id in ids:
            await client.start("order", {"amount": 1}, saga_id=saga_id)


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """The line names those that there are."""
    assert run(["completion", "tcsh"]) == 2
    assert '"bash", "zsh", "fish"' in capsys.readouterr().err
