"""The README's code does what the README says: it is run here as it stands there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

import amends
from amends_runtime.config import Config, Participant, Server
from amends_runtime.engine import run_engine

README = Path(__file__).parents[1] / "README.md"


def a_module_of_the_readme(name: str, folder: Path) -> ModuleType:
    """Writes the code block that begins with `# NAME.py` to a file and imports it."""
    blocks: list[str] = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (block,) = [block for block in blocks if block.startswith(f"# {name}.py\n")]
    path = folder / f"{name}.py"
    path.write_text(block)
    spec = importlib.util.spec_from_file_location(f"readme_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def test_the_participant_and_the_start_of_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An order completes; one above the limit is refused, and nothing is charged for it."""
    monkeypatch.chdir(tmp_path)  # the README's participant keeps its database where it is started
    payments = a_module_of_the_readme("payments", tmp_path)
    start = a_module_of_the_readme("start", tmp_path)
    async with amends.serve(payments.payments, listen="127.0.0.1:0") as server:
        config = Config(
            server=Server(listen="127.0.0.1:0", database=str(tmp_path / "amends.db")),
            participants={"payments": Participant(address=server.address)},
        )
        async with run_engine(config) as engine:
            saga = await start.main(engine.address)
            assert saga.state is amends.SagaState.COMPLETED
            async with amends.Client(engine.address) as client:
                dear = await client.start("order", {"order_id": "A-2", "cents": 200_000})
                refused = await dear.result(timeout_s=30)
            assert refused.state is amends.SagaState.COMPENSATED
            assert refused.turn is not None
            assert "limit_exceeded" in str(refused.turn)


def test_the_participant_of_the_readme_is_short() -> None:
    """The README promises a participant in 25 lines."""
    (block,) = re.findall(r"```python\n# payments.py\n(.*?)```", README.read_text(), re.DOTALL)
    assert len([line for line in block.splitlines() if line.strip()]) <= 25
