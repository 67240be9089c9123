"""The page about TLS does what it says: its commands, its configuration and its code are run."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import amends
from amends_runtime.config import Config, load
from amends_runtime.engine import run_engine
from tests.certificates import Authority

PAGE = Path(__file__).parents[1] / "docs" / "tls.md"


def blocks(language: str) -> list[str]:
    """Give the page's blocks of code in a language."""
    found: list[str] = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return found


def the_code_of(name: str) -> SimpleNamespace:
    """Run the block that begins with `# NAME.py`, and give what it defines."""
    (block,) = [block for block in blocks("python") if block.startswith(f"# {name}.py\n")]
    defined: dict[str, Any] = {"__name__": name}
    exec(compile(block, f"{PAGE}:{name}.py", "exec"), defined)  # noqa: S102  # it is our own page
    return SimpleNamespace(**defined)


def make_by_openssl(folder: Path) -> None:
    """Make the certificates as the page does."""
    subprocess.run(["/bin/sh", "-e"], input=blocks("sh")[0].encode(), cwd=folder, check=True)


def make_by_hand(folder: Path) -> None:
    """Make the same files without OpenSSL's command, which not every machine has."""
    services, clients = Authority(folder, "services"), Authority(folder, "clients")
    for name in ("runtime", "payments"):
        services.issue(name)
    clients.issue("frontend", names=("frontend",))


WAYS = [make_by_hand, *([make_by_openssl] if shutil.which("openssl") else [])]


@pytest.mark.parametrize("make", WAYS)
async def test_the_page_runs_an_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any
) -> None:
    """The client's certificate opens the runtime, the runtime's the participant, and no other."""
    monkeypatch.chdir(tmp_path)
    make(tmp_path)
    tls = amends.TlsFiles("payments.pem", "payments.key", client_ca="services.pem")
    async with (
        amends.serve(the_code_of("payments").payments, tls=tls) as server,
        run_engine(configuration(tmp_path, server.address)) as engine,
    ):
        saga = await the_code_of("frontend").main(engine.address)
        assert saga.completed
        assert saga.step("charge").state is amends.StepState.EXECUTED

        wrong = amends.ClientTls("services.pem", "payments.pem", "payments.key")
        async with amends.Client(engine.address, tls=wrong, retry_unavailable=False) as client:
            with pytest.raises(amends.Unavailable):  # payments may not start sagas
                await client.start("order", {"cents": 1})


def configuration(folder: Path, payments: str) -> Config:
    """Load the page's configuration, with ports that are free here."""
    [text] = blocks("toml")
    text = text.replace("127.0.0.1:7233", "127.0.0.1:0").replace("127.0.0.1:7001", payments)
    (folder / "amends.toml").write_text(f"{text}\n[breaker]\nopen_s = 0.1\n", encoding="utf-8")
    return load(folder / "amends.toml")
