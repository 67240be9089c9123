"""The page for operators: its program is run here as it stands there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import anyio
import pytest

import amends
from amends_runtime.engine import Engine
from tests.api.shop import Shop

PAGE = Path(__file__).parents[2] / "docs" / "operating.md"
PATIENCE_S = 60.0


async def refuse(call: amends.Call) -> object:
    """A definite refusal of what must succeed."""
    raise amends.Rejected("nobody_home")


async def test_the_alarm_of_the_page(
    engine: Engine, shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It tells of a saga that gets stuck, and when it comes back of what did so meanwhile, once."""
    (block,) = re.findall(r"```python\n(# alarm\.py\n.*?)```", PAGE.read_text(), re.DOTALL)
    path = tmp_path / "alarm.py"
    path.write_text(block)
    spec = importlib.util.spec_from_file_location("alarm", path)
    assert spec is not None
    assert spec.loader is not None
    alarm = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alarm)
    token = tmp_path / "token"
    shop.behaviours["notify"] = refuse

    async def until_told(saga_id: str, *, start: bool) -> list[str]:
        """What it prints up to this saga; a saga of that id is started once it watches."""
        lines = ""
        with anyio.fail_after(PATIENCE_S):
            async with amends.Client(engine.address) as client, anyio.create_task_group() as tasks:
                tasks.start_soon(alarm.main, engine.address, str(token))
                while start and not token.exists():  # noqa: ASYNC110  # the program writes a file
                    await anyio.sleep(0.01)
                if start:
                    await client.start("order", saga_id=saga_id)
                while f"{saga_id} order\n" not in lines:
                    await anyio.sleep(0.01)
                    lines += capsys.readouterr().out
                tasks.cancel_scope.cancel()
        return [line for line in lines.splitlines() if line.endswith(" order")]

    assert await until_told("first", start=True) == ["first order"]
    async with amends.Client(engine.address) as client:
        await client.start("order", saga_id="meanwhile")
        async for event in client.watch(state=amends.SagaState.STUCK):
            if (await client.get("meanwhile")).state is amends.SagaState.STUCK:
                break
            assert event.resume_token
        shop.behaviours.clear()
        await client.retry("meanwhile", author="ada", reason="somebody is home")
        assert (await client.wait("meanwhile", timeout_s=PATIENCE_S)).completed
    assert await until_told("meanwhile", start=False) == ["meanwhile order"]
