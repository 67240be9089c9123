"""The compose file, as far as it can be checked without Docker: it has never been run here.

Files are there, ports and names agree, and the real programs take the command lines, configuration
and definition that the containers are given.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import yaml

import amends
from amends_runtime import config, engine
from amends_runtime.cli.app import build_app
from shop import server, tracing
from shop.catalogue import SERVICES
from shop.definition import order
from shop.ports import HeldPort
from shop.processes import Process, Processes
from shop.switches import write_switches
from tests.acceptance.world import PATIENCE_S, until
from tests.telemetry.otlp_receiver import receiving

ROOT = Path(__file__).parents[2]
HERE = ROOT / "deploy" / "compose"

OURS = ("amends", *SERVICES)
THEIRS = ("jaeger", "prometheus", "grafana")

ORDERS = {
    "order-1": "COMPLETED",
    "order-2": "COMPENSATED",
    "order-3": "COMPLETED",
    "order-4": "COMPLETED",
}
"""The page's orders, and how they end."""


def read(name: str) -> Any:
    """A YAML file of the folder."""
    return yaml.safe_load((HERE / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    """The containers, by name."""
    found: dict[str, dict[str, Any]] = read("compose.yaml")["services"]
    return found


@pytest.fixture(scope="module")
def amends_config() -> config.Config:
    """The runtime's configuration, as the runtime reads it; this machine's variables aside."""
    with pytest.MonkeyPatch.context() as patch:
        for variable in os.environ:
            if variable.startswith(config.ENVIRONMENT_PREFIX):
                patch.delenv(variable)
        return config.load(HERE / "amends.toml")


def mounts(services: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """What is mounted: by whom, from where, to where."""
    for name, service in services.items():
        for volume in service.get("volumes", []):
            source, target, *_ = volume.split(":")
            yield name, source, target


def taken_by_the_command_line(arguments: list[str]) -> None:
    """Let the real one read it; it raises what it would refuse."""
    build_app().parse_args(arguments, exit_on_error=False, print_error=False)


def test_all_services_are_there(services: dict[str, dict[str, Any]]) -> None:
    """The runtime, the shop, and what shows them."""
    assert set(services) == {*OURS, *THEIRS}


def test_what_is_mounted_is_there(services: dict[str, dict[str, Any]]) -> None:
    """A missing file would be mounted as an empty folder; a volume must be declared."""
    declared = set(read("compose.yaml")["volumes"])
    for name, source, _ in mounts(services):
        if source.startswith("."):
            assert (HERE / source).is_file(), f"{name} mounts {source}"
        else:
            assert source in declared, f"{name} mounts {source}"
    assert declared == {source for _, source, _ in mounts(services) if source[0] != "."}


def test_files_are_read_where_they_are_mounted(services: dict[str, dict[str, Any]]) -> None:
    """Each --config names a file that is mounted into that container, or is in the image."""
    targets = {(name, target) for name, _, target in mounts(services)}
    for name, service in services.items():
        for argument in service.get("command", []):
            _, is_config, path = argument.partition("--config=")
            _, is_file, path_of_file = argument.partition("--config.file=")
            if is_config or is_file:
                assert (name, path or path_of_file) in targets
    for path in read("prometheus.yaml")["rule_files"]:
        assert ("prometheus", path) in targets
    (provider,) = read("grafana/dashboards.yaml")["providers"]
    assert ("grafana", f"{provider['options']['path']}/amends.json") in targets


def test_nothing_is_published_beyond_the_loopback(services: dict[str, dict[str, Any]]) -> None:
    """Whoever reaches these ports is an operator; and no port twice."""
    published = [port.split(":") for each in services.values() for port in each.get("ports", [])]
    assert {host for host, _, _ in published} == {"127.0.0.1"}
    assert len({port for _, port, _ in published}) == len(published)


def test_nobody_is_root_and_images_are_exact(services: dict[str, dict[str, Any]]) -> None:
    """Not now, and not after an update that nobody has seen."""
    for name, service in services.items():
        user = service["user"].partition(":")[0]
        assert user.isdecimal(), name
        assert int(user) > 0, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "healthcheck" in service, name
        if service["image"].partition(":")[2] != "local":
            assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), name
    for image in re.findall(r"^FROM (\S+)", (HERE / "Dockerfile").read_text(), re.MULTILINE):
        assert re.search(r":\d+\.\d+\.\d+-", image) or image in {"build", "amends"}, image


def test_the_images_are_made_of_what_is_there(services: dict[str, dict[str, Any]]) -> None:
    """What is copied exists and is let into the build; each target is a stage."""
    text = (HERE / "Dockerfile").read_text()
    stages = re.findall(r"^FROM \S+ AS (\w+)", text, re.MULTILINE)
    allowed = [
        line.removeprefix("!")
        for line in (HERE / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    for copied in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE):
        for source in copied.split()[:-1]:
            assert (ROOT / source).exists()
            assert any(source == path or source.startswith(f"{path}/") for path in allowed)
    for service in services.values():
        if build := service.get("build"):
            assert (HERE / build["context"]).resolve() == ROOT
            assert (ROOT / build["dockerfile"]) == HERE / "Dockerfile"
            assert build["target"] in stages


def test_each_image_of_ours_has_one_builder(services: dict[str, dict[str, Any]]) -> None:
    """Two builds of one tag at once may fail; and who only uses it must not pull it."""
    for image in {services[name]["image"] for name in OURS}:
        users = [service for service in services.values() if service["image"] == image]
        policies = ["build" if "build" in each else "never" for each in users]
        assert policies.count("build") == 1, image
        assert [each.get("pull_policy") for each in users] == policies, image


def test_grafana_shows_metrics_and_traces_to_whoever_opens_it(
    services: dict[str, dict[str, Any]],
) -> None:
    """The dashboard is its first page, and its Explore, where traces are, takes an Editor."""
    environment = services["grafana"]["environment"]
    targets = {target for name, _, target in mounts(services) if name == "grafana"}
    assert environment["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] in targets
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Editor"


def test_the_runtime_takes_its_command_line_and_configuration(
    services: dict[str, dict[str, Any]], amends_config: config.Config
) -> None:
    """Its ports are those that are published, scraped and asked."""
    taken_by_the_command_line(services["amends"]["command"])

    targets = {port.rpartition(":")[2] for port in services["amends"]["ports"]}
    assert amends_config.server.listen.rpartition(":")[2] in targets
    assert amends_config.server.insecure
    metrics = amends_config.telemetry.metrics_listen
    assert metrics is not None
    assert metrics.rpartition(":")[2] in targets
    (job,) = read("prometheus.yaml")["scrape_configs"]
    alerts = (HERE / "../prometheus/alerts.yaml").read_text()
    assert set(re.findall(r'job="(\w+)"', alerts)) <= {job["job_name"]}
    assert job["static_configs"] == [{"targets": [f"amends:{metrics.rpartition(':')[2]}"]}]
    volumes = {target for name, _, target in mounts(services) if name == "amends"}
    assert str(Path(amends_config.server.database).parent) in volumes
    check = services["amends"]["healthcheck"]["test"]
    assert check[:2] == ["CMD", "amends"]
    taken_by_the_command_line(check[2:])


def test_the_runtime_and_the_services_find_each_other(
    services: dict[str, dict[str, Any]], amends_config: config.Config
) -> None:
    """Each participant is a container, and listens where the runtime looks for it."""
    assert set(amends_config.participants) == set(SERVICES)
    for name, participant in amends_config.participants.items():
        options = server._read_options(services[name]["command"])
        assert options.service == name
        assert participant.address == f"{name}:{options.port}"
        assert options.insecure
        assert options.host == "0.0.0.0"  # noqa: S104  # in a network of its own
        volumes = {target for mounted, _, target in mounts(services) if mounted == name}
        assert str(options.database.parent) in volumes
        assert options.switches is not None
        assert str(options.switches.parent) in volumes
        assert services[name]["healthcheck"]["test"][-1] == f"127.0.0.1:{options.port}"


def test_everybody_sends_to_jaeger(
    services: dict[str, dict[str, Any]], amends_config: config.Config
) -> None:
    """By OTLP over gRPC, at the port where Jaeger listens and which is published, too."""
    jaeger = read("jaeger.yaml")
    listens = jaeger["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"].rpartition(":")[2]
    assert amends_config.telemetry.otlp_endpoint == f"jaeger:{listens}"
    for name in SERVICES:
        environment = services[name]["environment"]
        assert environment["OTEL_EXPORTER_OTLP_ENDPOINT"] == f"http://jaeger:{listens}"
        assert environment["OTEL_EXPORTER_OTLP_PROTOCOL"] == "grpc"
    published = {port.rpartition(":")[2] for port in services["jaeger"]["ports"]}
    http = jaeger["receivers"]["otlp"]["protocols"]["http"]["endpoint"].rpartition(":")[2]
    shown = jaeger["extensions"]["jaeger_query"]["http"]["endpoint"].rpartition(":")[2]
    assert published == {listens, http, shown}
    sources = {
        each["type"]: each["url"] for each in read("grafana/datasources.yaml")["datasources"]
    }
    assert sources == {"prometheus": "http://prometheus:9090", "jaeger": f"http://jaeger:{shown}"}


def test_jaeger_s_configuration_holds_together() -> None:
    """What a pipeline names is defined, and all of it is used."""
    jaeger = read("jaeger.yaml")
    assert set(jaeger["service"]["extensions"]) == set(jaeger["extensions"])
    (pipeline,) = jaeger["service"]["pipelines"].values()
    for kind in ("receivers", "processors", "exporters"):
        assert set(pipeline[kind]) == set(jaeger[kind])
    (storage,) = jaeger["extensions"]["jaeger_storage"]["backends"]
    assert jaeger["extensions"]["jaeger_query"]["storage"]["traces"] == storage
    assert jaeger["exporters"]["jaeger_storage_exporter"]["trace_storage"] == storage


def test_the_definition_is_the_shop_s() -> None:
    """Byte for byte, so the demo's page is true of it, too."""
    (pattern,) = (HERE / path for path in ("order.toml",))
    assert amends.Definition.from_file(pattern).to_proto() == order.to_proto()


def test_nobody_is_killed_while_it_drains(services: dict[str, dict[str, Any]]) -> None:
    """A container's grace is longer than what its program takes at most."""
    runtime_s = engine.DRAIN_REQUESTS_S + engine.DRAIN_CALLS_S + engine.DRAIN_TURNS_S
    export_s = 2 * 2.0  # spans, and metrics where they are sent
    assert _seconds(services["amends"]["stop_grace_period"]) > runtime_s + export_s
    service_s = amends.server.LAST_REPLIES_S + amends.server.CLOSE_S + tracing.FLUSH_S
    for name in SERVICES:
        assert _seconds(services[name]["stop_grace_period"]) > server.GRACE_S + service_s


def _seconds(text: str) -> float:
    assert text.endswith("s")
    return float(text.removesuffix("s"))


async def test_the_page_s_commands_do_what_it_says(tmp_path: Path) -> None:
    """With the compose file's configuration, and processes at addresses of this machine instead.

    An order that completes, one that is refused, one whose runtime is killed, and a slow one, by
    the page's own commands, as they run in the containers; and the health check's after.
    """
    async with receiving() as receiver, Processes(tmp_path) as processes:
        write_switches(processes.switches, {})
        started = {process.name: process for process in await processes.start_services()}
        port = HeldPort()
        runtime = processes._add(
            "amends",
            port,
            *("-m", "amends_runtime", "serve", f"--config={HERE / 'amends.toml'}"),
            f"--listen={port.address}",
            f"--database={processes.database('amends')}",
            *(f"--participant={name}={each.address}" for name, each in started.items()),
            f"--otlp={receiver.grpc_address}",
            "--metrics-listen=127.0.0.1:0",
            "--until-stdin-closes",
        )
        await runtime.start()
        machine = Machine(processes, {**started, "amends": runtime})
        for line in commands_of_the_page():
            await machine.run(line)

        async with amends.Client(runtime.address) as client:
            ended = {each: await client.wait(each, timeout_s=PATIENCE_S) for each in ORDERS}
            trace_id = (await client.trace("order-3")).trace_id
        assert {each: str(saga.state) for each, saga in ended.items()} == ORDERS
        (faults,) = tmp_path.rglob("payments.faults.jsonl")
        assert [json.loads(line)["saga_id"] for line in faults.read_text().splitlines()] == [
            "order-4"
        ]
        check = read("compose.yaml")["services"]["amends"]["healthcheck"]["test"]
        words = [word for word in check[1:] if not word.startswith("--target")]
        healthy = await machine.run_amends(words)
        assert json.loads(healthy)["sagas"] == {"COMPLETED": 3, "COMPENSATED": 1}

        def is_whole() -> bool:
            spans = receiver.spans(trace_id)
            epochs = {span.attributes.get("amends.epoch") for span in spans}
            return any(span.name == "saga order" for span in spans) and {1, 2} <= epochs

        with anyio.fail_after(PATIENCE_S):  # one trace, of the runtime that was killed and the next
            await receiver.wait_until(is_whole)


def commands_of_the_page() -> list[str]:
    """Every line about the compose file, but for the one that begins it all."""
    text = (ROOT / "docs" / "observing.md").read_text().replace("\\\n", " ")
    lines = re.findall(r"^(?:echo .*)?docker compose --file .*$", text, re.MULTILINE)
    assert " up " in lines[0]
    return lines[1:]


class Machine:
    """Processes that stand for the containers."""

    def __init__(self, processes: Processes, containers: dict[str, Process]) -> None:
        self._processes = processes
        self._containers = containers

    async def run(self, line: str) -> None:
        """Do what a line of the page says."""
        echo, _, rest = line.rpartition(" | ")
        _, _, _, _, verb, *words = shlex.split(rest)
        if verb == "exec" and words[:2] == ["amends", "amends"]:
            await self.run_amends(words[1:])
        elif verb == "exec":
            *_, name, program, target = words
            command = read("compose.yaml")["services"][name]["command"]
            assert (program, f"--switches={target}") == ("tee", command[-1])
            write_switches(self._processes.switches, json.loads(shlex.split(echo)[1]))
        elif verb == "stop":
            await self._containers[words[0]].stop()
        elif verb == "start":
            await self._containers[words[0]].start()
        else:
            assert (verb, words) == ("kill", ["amends"])
            await self._wait_until_it_waits_for_shipping()
            self._containers["amends"].kill()

    async def run_amends(self, words: list[str]) -> bytes:
        """The command line in the runtime's container; gives what it wrote."""
        target = f"--target={self._containers['amends'].address}"
        command = [sys.executable, "-m", "amends_runtime", *words[1:], target]
        ran = await anyio.run_process(command, check=False)
        refused = "order-2" in words
        assert ran.returncode == (6 if refused else 0), ran.stderr.decode()
        return ran.stdout

    async def _wait_until_it_waits_for_shipping(self) -> None:
        """Until its breaker holds a call; whoever types is slower than that."""
        failures_to_open = config.load(HERE / "amends.toml").breaker.failures_to_open
        async with amends.Client(self._containers["amends"].address) as client:

            async def is_held() -> bool:
                ship = (await client.get("order-3")).step("ship")
                return ship.call_open and ship.attempt > failures_to_open

            await until(is_held, "order-3 to wait for shipping")


async def test_the_health_check_of_the_services_tells(tmp_path: Path) -> None:
    """It is asked of a real service, of one that is gone, and the service listens as it is told."""
    spec = importlib.util.spec_from_file_location("healthy", HERE / "healthy.py")
    assert spec is not None
    command = [sys.executable, str(HERE / "healthy.py")]
    async with Processes(tmp_path) as processes:
        write_switches(processes.switches, {})
        (payments,) = await processes.start_services(["payments"])
        assert (await anyio.run_process([*command, payments.address])).returncode == 0
        await payments.stop()
        gone = await anyio.run_process([*command, payments.address], check=False)
        assert gone.returncode == 1
        assert gone.stderr.decode().strip() == f"{payments.address}: UNAVAILABLE"


async def test_a_service_listens_for_other_machines_only_if_told(tmp_path: Path) -> None:
    """As in its container; without --insecure it refuses, and says why."""
    common = ["payments", "--listen=0.0.0.0:0", f"--database={tmp_path / 'payments.db'}"]
    refused = await anyio.run_process([sys.executable, "-m", "shop", *common], check=False)
    assert refused.returncode == server.EXIT_USAGE
    assert b"insecure" in refused.stderr

    ready = tmp_path / "ready"
    process = await anyio.open_process(
        [sys.executable, "-m", "shop", *common, "--insecure", f"--ready-file={ready}",
         "--until-stdin-closes"]
    )  # fmt: skip
    async with process:
        with anyio.fail_after(30):
            while not ready.exists():  # noqa: ASYNC110  # a file tells nobody that it is there
                await anyio.sleep(0.02)
        address = json.loads(ready.read_text())["address"]
        assert address.startswith("0.0.0.0:")
        port = int(address.rpartition(":")[2])
        socket.create_connection(("127.0.0.1", port)).close()
        assert process.stdin is not None
        await process.stdin.aclose()
        assert await process.wait() == 0
