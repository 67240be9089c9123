"""A whole system over mutual TLS: runtime, participants, clients and commands, each a process.

What is refused never reaches a handler, so it leaves nothing behind in any database.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import anyio.to_thread
import pytest

import amends
from amends import RecordKind, SagaState, StepState
from shop.catalogue import DECLINED_CARD, SERVICES
from shop.definition import order as order_definition
from shop.journal import Journal
from shop.ports import HeldPort
from shop.processes import Process, Processes
from shop.switches import write_switches
from tests.acceptance.world import SETTINGS, World
from tests.certificates import Authority, Issued
from tests.cli.conftest import amends as command

SERVICE_PROGRAM = Path(__file__).with_name("tls_service.py")


@dataclass(frozen=True)
class Certificates:
    """What is made for one run."""

    authority: Authority
    strangers: Authority
    runtime: Issued
    services: Issued
    client: Issued

    @property
    def client_tls(self) -> amends.ClientTls:
        """How a client speaks that gets in."""
        return amends.ClientTls(self.authority.cert, *self.client)


@dataclass(frozen=True)
class Secured:
    """The running system."""

    world: World
    certificates: Certificates

    @property
    def address(self) -> str:
        """Where the runtime listens."""
        return self.world.runtime.address


@pytest.fixture(scope="module")
async def system(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Secured]:
    """The shop's services and a runtime, all of them over mutual TLS."""
    folder = tmp_path_factory.mktemp("tls")
    authority = Authority(folder)
    certificates = Certificates(
        authority,
        Authority(folder, "strangers"),
        runtime=authority.issue("runtime"),
        services=authority.issue("services"),
        client=authority.issue("client"),
    )
    async with Processes(folder) as processes:
        write_switches(processes.switches, {})
        services = {name: start_service(processes, name, certificates) for name in SERVICES}
        for service in services.values():
            await service.wait_ready()
        async with runtime_of(processes, services, certificates) as world:
            yield Secured(world, certificates)


def start_service(processes: Processes, name: str, certificates: Certificates) -> Process:
    """Start one of the shop's services; it asks its caller for a certificate."""
    port = HeldPort()
    process = processes._add(
        name,
        port,
        str(SERVICE_PROGRAM),
        name,
        *map(str, certificates.services),
        str(certificates.authority.cert),
        f"--listen={port.address}",
        f"--database={processes.database(name)}",
    )
    process.start_nowait()
    return process


@asynccontextmanager
async def runtime_of(
    processes: Processes, services: Mapping[str, Process], certificates: Certificates
) -> AsyncIterator[World]:
    """Start a runtime that speaks mutual TLS in both directions; in the end, settle."""
    runtime = await start_runtime(processes, "amends", services, certificates)
    with Journal(processes.folder / "journal.jsonl") as journal:
        async with amends.Client(runtime.address, tls=certificates.client_tls) as client:
            await client.register(order_definition)
            world = World(processes, services, runtime, client, journal)
            yield world
            await world.settle()


async def start_runtime(
    processes: Processes,
    name: str,
    services: Mapping[str, Process],
    certificates: Certificates,
    *,
    shows_itself: bool = True,
) -> Process:
    """Start a runtime; unless `shows_itself`, participants learn nothing of who it is."""
    port = HeldPort()
    write_configuration(
        processes, name, port.address, services, certificates, shows_itself=shows_itself
    )
    process = processes._add(
        name,
        port,
        "-m",
        "amends_runtime",
        "serve",
        f"--config={processes.folder / name}.toml",
        "--until-stdin-closes",
    )
    await process.start()
    return process


def write_configuration(
    processes: Processes,
    name: str,
    address: str,
    services: Mapping[str, Process],
    certificates: Certificates,
    *,
    shows_itself: bool,
) -> None:
    """Write a runtime's configuration; relative paths start at its folder."""
    cert, key = certificates.runtime
    lines = [
        "[server]",
        f"listen = {json.dumps(address)}",
        f'database = "{name}.db"',
        f'tls_cert = "{cert.name}"',
        f'tls_key = "{key.name}"',
        f'tls_client_ca = "{certificates.authority.cert.name}"',
    ]
    for service in services.values():
        lines += [
            f"[participants.{service.name}]",
            f"address = {json.dumps(service.address)}",
            f'tls_ca = "{certificates.authority.cert.name}"',
        ]
        if shows_itself:
            lines += [f'tls_cert = "{cert.name}"', f'tls_key = "{key.name}"']
    text = "\n".join([*lines, SETTINGS, ""])
    (processes.folder / f"{name}.toml").write_text(text, encoding="utf-8")


# -- who is let in ---------------------------------------------------------------------------------


async def test_orders_run_over_mutual_tls(system: Secured) -> None:
    """One completes; one is refused by the bank, and what had been done is undone."""
    world = system.world
    completes = await world.start()
    refused = await world.start(card=DECLINED_CARD)

    assert (await world.end(completes)).completed
    assert sorted(world.effects(completes.saga_id)) == [
        "charge",
        "confirm",
        "place",
        "reserve",
        "ship",
    ]
    ended = await world.end(refused)
    assert ended.state is SagaState.COMPENSATED
    assert ended.step("charge").state is StepState.REJECTED
    assert world.effects(refused.saga_id)[-1] == "cancel"


@pytest.fixture(params=["no certificate", "a stranger's", "plain text", "trusts others"])
def refused_tls(
    request: pytest.FixtureRequest, system: Secured
) -> Iterator[amends.ClientTls | None]:
    """How a client speaks that is not let in, or does not want to be."""
    made = system.certificates
    match request.param:
        case "no certificate":
            yield amends.ClientTls(made.authority.cert)
        case "a stranger's":
            yield amends.ClientTls(made.authority.cert, *made.strangers.issue("stranger"))
        case "plain text":
            yield None
        case _:
            yield amends.ClientTls(made.strangers.cert, *made.client)


async def test_who_is_not_known_is_not_heard(
    system: Secured, refused_tls: amends.ClientTls | None
) -> None:
    """The client learns that nothing was started, and nothing was."""
    saga_id = amends.new_saga_id()
    async with amends.Client(system.address, tls=refused_tls, retry_unavailable=False) as client:
        with pytest.raises(amends.Unavailable) as unavailable:
            await client.start("order", {}, saga_id=saga_id)
        assert not unavailable.value.in_doubt
        assert "TLS" in str(unavailable.value)
        with pytest.raises(amends.Unavailable):
            await client.runtime()
    with pytest.raises(amends.NotFound):
        await system.world.client.get(saga_id)


# -- participants ----------------------------------------------------------------------------------


async def test_a_participant_does_not_listen_to_a_runtime_that_it_does_not_know(
    system: Secured,
) -> None:
    """Nothing is decided by that: the order waits, and goes on when the runtime has a certificate.

    Which is also how certificates are exchanged: new files, a restart, and nothing is lost.
    """
    world, made = system.world, system.certificates
    runtime = await start_runtime(
        world.processes, "unknown", world.services, made, shows_itself=False
    )
    async with amends.Client(runtime.address, tls=made.client_tls) as client:
        await client.register(order_definition)
        other = replace(world, runtime=runtime, client=client, started=[])
        waiting = await other.start()

        await other.wait_record(waiting.saga_id, RecordKind.ATTEMPT_FAILED, "place")

        orders = next(p for p in await client.participants() if p.name == "orders")
        assert "if it asks for a certificate, give the runtime one" in orders.last_error
        assert (await client.get(waiting.saga_id)).state is SagaState.RUNNING
        assert world.effects(waiting.saga_id) == []

        assert await runtime.stop() == 0
        write_configuration(
            world.processes,
            "unknown",
            runtime.address,
            world.services,
            made,
            shows_itself=True,
        )
        await runtime.start()

        assert (await other.end(client.handle(waiting.saga_id))).completed
    assert world.effects(waiting.saga_id).count("place") == 1


# -- the command line ------------------------------------------------------------------------------


async def test_commands_speak_mutual_tls(system: Secured) -> None:
    """By flags, which may stand before the command, and by variables."""
    made = system.certificates
    cert, key = made.client
    by_flags = await ran(
        *(f"--tls-ca={made.authority.cert}", f"--tls-cert={cert}", f"--tls-key={key}"),
        *("--target", system.address, "runtime", "-o", "json"),
    )
    by_variables = await ran(
        "runtime",
        "-o",
        "json",
        AMENDS_TARGET=system.address,
        AMENDS_TLS_CA=str(made.authority.cert),
        AMENDS_TLS_CERT=str(cert),
        AMENDS_TLS_KEY=str(key),
    )
    for code, output, errors in (by_flags, by_variables):
        assert (code, errors) == (0, "")
        assert json.loads(output)["store_id"]


async def test_a_command_without_the_certificate_is_refused(system: Secured) -> None:
    """Exit code 5, and a line that says which flags are missing."""
    ca = str(system.certificates.authority.cert)
    for flags, hint in ((["--tls-ca", ca], "--tls-cert and --tls-key"), ([], "--tls-ca")):
        code, output, errors = await ran("list", "--target", system.address, *flags)
        assert (code, output) == (5, "")
        [line] = errors.splitlines()
        assert hint in line


async def ran(*arguments: str, **environment: str) -> tuple[int, str, str]:
    """Run a command; give its exit code, its answer and its errors."""
    done = await anyio.to_thread.run_sync(lambda: command(*arguments, **environment))
    return done.returncode, done.stdout, done.stderr
