"""The README's code does what the README says: it is run here as it stands there."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import sqlite3
import tomllib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import amends
from amends_runtime.config import Config, Participant, Server
from amends_runtime.core.definition import normalise, violations
from amends_runtime.engine import run_engine
from amends_runtime.wire import definition_from_proto

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


class SeenWatching(amends.Client):
    """A client of which can be seen that its watch has begun."""

    def __init__(self, target: str) -> None:
        super().__init__(target)
        self.begun = asyncio.Event()

    async def watch(self, **conditions: Any) -> AsyncIterator[amends.WatchEvent]:
        """The first event says that from now on everything is told."""
        async for event in super().watch(**conditions):
            self.begun.set()
            yield event

    async def run(self, page: Any, tell: Callable[[str], None]) -> None:
        """Runs the page's function with this client."""
        async with self:
            await page(self, tell)


def names_of_the_clients_page() -> dict[str, Any]:
    """Runs all code blocks of docs/clients.md, one after the other, and gives what they define."""
    page = (README.parent / "docs" / "clients.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    names: dict[str, Any] = {}
    exec(compile(code, "docs/clients.md", "exec"), names)  # noqa: S102  # it is our own page
    return names


async def test_the_client_of_its_page_orders_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred tasks over one client: each has its saga's end, and each charge took place once."""
    monkeypatch.chdir(tmp_path)
    payments = a_module_of_the_readme("payments", tmp_path)
    start = a_module_of_the_readme("start", tmp_path)
    names = names_of_the_clients_page()
    assert isinstance(names["secure_client"](), amends.Client)
    async with amends.serve(payments.payments, listen="127.0.0.1:0") as server:
        config = Config(
            server=Server(listen="127.0.0.1:0", database=str(tmp_path / "amends.db")),
            participants={"payments": Participant(address=server.address)},
        )
        async with run_engine(config) as engine:
            async with amends.Client(engine.address) as client:
                await client.register(start.order)
            sagas = await names["order_all"](engine.address, 100)
    assert [saga.state for saga in sagas] == [amends.SagaState.COMPLETED] * 100
    with sqlite3.connect(tmp_path / "payments.db") as database:
        charged = database.execute("SELECT order_id, count(*) FROM charges GROUP BY 1").fetchall()
    database.close()
    assert dict(charged) == {f"A-{number}": 1 for number in range(100)}


async def test_the_clients_page_looks_and_operates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its watch tells of what gets stuck; retry, abandon and cancel do what they say."""
    names = names_of_the_clients_page()
    bank_is_down = True
    payments = amends.Participant("payments", barrier=None)

    @payments.execute("charge", compensatable=False)
    def charge(call: amends.Call) -> None:
        if call.json() == "refuse":
            raise amends.Rejected("limit_exceeded")
        if bank_is_down:
            raise amends.Broken("bank_is_down")

    order = amends.Definition("order").pivot("charge", "payments", "charge")
    async with amends.serve(payments) as server:
        config = Config(
            server=Server(listen="127.0.0.1:0", database=str(tmp_path / "amends.db")),
            participants={"payments": Participant(address=server.address)},
        )
        async with run_engine(config) as engine, amends.Client(engine.address) as client:
            await client.register(order)
            stuck: asyncio.Queue[str] = asyncio.Queue()
            async with asyncio.TaskGroup() as tasks:
                watching = SeenWatching(engine.address)
                watch = tasks.create_task(watching.run(names["tell_of_stuck"], stuck.put_nowait))
                await watching.begun.wait()
                for saga_id in ("a", "b"):
                    await client.start("order", saga_id=saga_id)
                assert {await stuck.get(), await stuck.get()} == {"a", "b"}
                watch.cancel()
            assert await names["settled_by_hand"](client, "a") == ["charge"]
            bank_is_down = False
            await names["bank_is_back"](client, "b")
            assert (await client.wait("b", timeout_s=30)).completed
            assert (await names["customer_called"](client, "b")).startswith("too late: ")
            assert {"saga order", "step charge"} <= set(await names["names_of_spans"](client, "b"))
            await (await client.start("order", "refuse", saga_id="c")).result(timeout_s=30)
            await names["print_refused"](client)
    assert capsys.readouterr().out.endswith("\nc rejected\n")  # after the runtime's log


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


def test_the_two_forms_of_the_definition_page_have_one_content(tmp_path: Path) -> None:
    """What the builder makes and what the file says are the same definition."""
    page = (README.parent / "docs" / "definitions.md").read_text()
    # The first of each; the other is a two-phase commit, of which tests/cli knows.
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    toml = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)[0]
    (tmp_path / "order.py").write_text(code)
    spec = importlib.util.spec_from_file_location("page_order", tmp_path / "order.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    from_file = amends.Definition.from_dict(tomllib.loads(toml))
    assert normalise(definition_from_proto(from_file.to_proto())) == normalise(
        definition_from_proto(module.order.to_proto())
    )
    assert violations(definition_from_proto(from_file.to_proto())) == []


def test_every_link_between_pages_leads_somewhere() -> None:
    """A page that names another one, or a file of the code, names one that exists."""
    root = README.parent
    pages = [*root.glob("*.md"), *(root / "docs").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_participant_of_the_readme_is_short() -> None:
    """The README promises a participant in 25 lines."""
    (block,) = re.findall(r"```python\n# payments.py\n(.*?)```", README.read_text(), re.DOTALL)
    assert len([line for line in block.splitlines() if line.strip()]) <= 25
