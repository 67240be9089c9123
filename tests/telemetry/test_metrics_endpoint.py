"""The endpoint that Prometheus scrapes: what it shows, to whom, and that it disturbs nobody."""

from __future__ import annotations

import contextlib
import http.client
import json
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from types import SimpleNamespace

import anyio.to_thread
import pytest
import structlog.testing

import amends
from amends_runtime.config import Config, Flags, Limits, Participant, Server, Telemetry, load
from amends_runtime.core.breaker import BreakerState
from amends_runtime.core.records import SagaState
from amends_runtime.engine import Engine, run_engine
from amends_runtime.errors import ConfigurationError, StoreError, WrongState
from amends_runtime.storage import open_sqlite_store
from amends_runtime.telemetry import outlets, prometheus
from amends_runtime.telemetry.metrics import TABLE, Metrics, Reading
from amends_runtime.telemetry.otel_variables import Variables
from amends_runtime.telemetry.outlets import metrics_listen
from amends_runtime.telemetry.prometheus import MAX_SCRAPES, TIMEOUT_S, PrometheusEndpoint
from tests.actors.runtimes import NOWHERE, ONE_STEP, a_shop, damage
from tests.cli.conftest import Served
from tests.cli.conftest import amends as command
from tests.telemetry.scraping import get, openmetrics_families, scrape, scraped

CANARY = "canary-4711"
PATIENCE = 6_000  # hundredths of a second: bounds a test that would never end


@contextmanager
def an_endpoint(listen: str = "127.0.0.1:0") -> Iterator[PrometheusEndpoint]:
    """An endpoint without a runtime."""
    with closing(PrometheusEndpoint(listen, Metrics())) as endpoint:
        endpoint.start()
        yield endpoint


@asynccontextmanager
async def a_runtime(
    folder: Path, shop: amends.Participant, limits: Limits | None = None
) -> AsyncIterator[tuple[Engine, amends.Client]]:
    """A runtime with an endpoint, and with two participants: this one, and one that is away."""
    async with amends.serve(shop, listen="127.0.0.1:0") as server:
        config = Config(
            server=Server(listen="127.0.0.1:0", database=str(folder / "amends.db")),
            participants={
                "shop": Participant(address=server.address),
                "absent": Participant(address=NOWHERE),
            },
            limits=limits or Limits(),
            telemetry=Telemetry(metrics_listen="127.0.0.1:0"),
        )
        async with (
            run_engine(config) as engine,
            amends.Client(engine.address, timeout_s=30) as client,
        ):
            yield engine, client


# -- what it shows ---------------------------------------------------------------------------------


async def test_the_numbers_are_those_of_what_was_done(tmp_path: Path) -> None:
    """Five complete, three are compensated, one is abandoned; attempts and steps accordingly."""
    shop = a_shop()

    @shop.execute("refuse")
    async def refuse(call: amends.Call) -> None:
        raise amends.Rejected("no", CANARY)

    @shop.compensate("refuse")
    async def nothing(call: amends.Call) -> None:
        """A refusal has no effect."""

    @shop.execute("break")
    async def break_(call: amends.Call) -> None:
        raise amends.Broken("ledger_lost", CANARY)

    @shop.compensate("break")
    async def mend(call: amends.Call) -> None:
        """Never asked."""

    turning = amends.Definition("turning").step("a", "shop", "do").step("b", "shop", "refuse")
    broken = amends.Definition("broken").step("a", "shop", "break")
    async with a_runtime(tmp_path, shop) as (engine, client):
        for definition in (ONE_STEP, turning, broken):
            await client.register(definition)
        for name, count in (("one", 5), ("turning", 3)):
            for _ in range(count):
                handle = await client.start(name, {"secret": CANARY}, saga_id=None)
                await handle.result(timeout_s=30)
        stuck = await client.start("broken", {"secret": CANARY}, saga_id="saga-of-canary")
        await engine.supervisor.wait(
            "saga-of-canary", 30, until=lambda saga: saga.state is SagaState.STUCK
        )
        await stuck.abandon(author=CANARY, reason=CANARY)
        page = await anyio.to_thread.run_sync(get, engine.metrics_address)
    shown = scraped(page.text)
    assert shown.values("amends_saga_starts_total") == {
        ("one",): 5,
        ("turning",): 3,
        ("broken",): 1,
    }
    assert shown.values("amends_saga_ends_total") == {
        ("one", "completed"): 5,
        ("turning", "compensated"): 3,
        ("broken", "abandoned"): 1,
    }
    assert shown.values("amends_attempts_total") == {
        ("done", "shop", "execute"): 8,
        ("rejected", "shop", "execute"): 3,
        ("done", "shop", "compensate"): 3,
        ("broken", "shop", "execute"): 1,
    }
    assert shown.values("amends_step_duration_seconds_count") == {
        ("one", "executed", "a"): 5,
        ("turning", "executed", "a"): 3,
        ("turning", "rejected", "b"): 3,
        ("turning", "compensated", "a"): 3,
        ("broken", "stuck", "a"): 1,
    }
    assert shown.values("amends_saga_duration_seconds_count") == shown.values(
        "amends_saga_ends_total"
    )
    assert shown.values("amends_attempt_duration_seconds_count") == shown.values(
        "amends_attempts_total"
    )
    assert shown.values("amends_operator_actions_total") == {("abandon",): 1}
    assert shown.value("amends_commit_turns_sum") >= 5 * 2 + 3 * 4 + 3
    assert shown.value("amends_commit_duration_seconds_count") > 0
    assert shown.value("amends_runtime_epoch") == 1
    assert shown.value("amends_store_size_bytes") > 0
    assert shown.value("amends_store_wal_size_bytes") > 0
    assert shown.value("amends_saga_without_wake_up") == 0
    # No payload, no words of people or participants, and no saga's id.
    assert CANARY not in page.text
    assert "canary" not in page.text
    assert {label for one in shown.series if one.name.startswith("amends_") for label in one.labels}
    allowed = {label for metric in TABLE for label in metric.labels} | {"le"}
    for one in shown.series:
        if one.name.startswith("amends_"):
            assert set(one.labels) <= allowed


async def test_what_waits_shows_in_gauges(tmp_path: Path) -> None:
    """A participant is away, a limit is reached, a history is damaged: each has its number."""
    limits = Limits(live_sagas=3)
    away = amends.Definition("away").step("a", "absent", "do")
    async with a_runtime(tmp_path, a_shop(), limits) as (engine, client):
        await client.register(away)
        for number in range(3):
            await client.start("away", saga_id=f"s-{number}")
        # Held by the breaker they are under way; one between two attempts would make room.
        while [lane.waiting for lane in engine.lanes.status() if lane.name == "absent"] != [3]:
            await anyio.lowlevel.checkpoint()
        with pytest.raises(amends.AmendsError):
            await client.start("away", saga_id="s-3", timeout_s=0.5)
        assert engine.supervisor.refused["LIVE_SAGAS"] > 0
    damage(tmp_path, "s-1")
    async with a_runtime(tmp_path, a_shop(), limits) as (engine, client):
        # What is asked for earlier is not recovery's to count.
        while engine.supervisor.recovery.running:
            await anyio.lowlevel.checkpoint()
        with pytest.raises(WrongState):
            await engine.supervisor.bring_in("s-1")
        for saga_id in ("s-0", "s-2"):
            await engine.supervisor.bring_in(saga_id)
        survey, recovery = await engine.supervisor.survey(), engine.supervisor.recovery
        shown = await scrape(engine.metrics_address)
    assert shown.value("amends_runtime_epoch") == 2
    assert shown.values("amends_lane_limit") == {("absent",): 256, ("shop",): 256}
    assert (survey.unreadable, survey.without_wake_up) == (1, 1)
    assert survey.active[SagaState.RUNNING] == 2
    assert (recovery.running, recovery.sagas) == (False, 3)


async def test_sizes_are_told_without_opening_a_file(tmp_path: Path) -> None:
    """Closing the database or its log in the process that owns them would drop SQLite's locks."""
    opened: list[object] = []
    watching = True

    def note(event: str, arguments: tuple[object, ...]) -> None:
        if watching and event == "open":
            opened.append(arguments[0])

    sys.addaudithook(note)
    async with open_sqlite_store(tmp_path / "amends.db") as store:
        opened.clear()
        sizes = (store.file_bytes, store.wal_bytes)
        watching = False
    assert opened == []
    assert all(size > 0 for size in sizes)


async def test_both_formats_are_well_formed(tmp_path: Path) -> None:
    """Prometheus' own text, and OpenMetrics for who asks for it; the parsers are the library's."""
    async with a_runtime(tmp_path, a_shop()) as (engine, client):
        await client.register(ONE_STEP)
        await (await client.start("one")).result(timeout_s=30)
        plain = await anyio.to_thread.run_sync(get, engine.metrics_address)
        accept = "application/openmetrics-text; version=1.0.0"
        openmetrics = await anyio.to_thread.run_sync(
            lambda: get(engine.metrics_address, accept=accept)
        )
    assert plain.content_type.startswith("text/plain; version=0.0.4")
    assert openmetrics.content_type.startswith("application/openmetrics-text; version=1.0.0")
    assert {metric.prometheus_name for metric in TABLE} <= openmetrics_families(openmetrics.text)
    names = scraped(plain.text).names
    assert {"process_cpu_seconds_total", "process_resident_memory_bytes", "python_info"} <= names


def test_nothing_else_is_served() -> None:
    """`/` says where to look; whatever else is asked for is not there."""
    with an_endpoint() as endpoint:
        hint = get(endpoint.address, "/")
        assert (hint.status, hint.text) == (200, "amends: the metrics are at /metrics\n")
        for path in ("/metrics/", "/favicon.ico", "/debug", "/metrics/../etc/passwd"):
            assert get(endpoint.address, path).status == 404, path
        assert get(endpoint.address, method="POST").status == 405
        assert get(endpoint.address, "/metrics?name[]=python_info").status == 200


def test_who_sends_nothing_keeps_nobody_else_out_for_ever() -> None:
    """Connections without a request take all places; the next one is hung up on, not kept."""
    with an_endpoint() as endpoint:
        host, _, port = endpoint.address.rpartition(":")
        held = [socket.create_connection((host, int(port))) for _ in range(MAX_SCRAPES)]
        try:
            with socket.create_connection((host, int(port))) as late:
                late.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
                # Reset, where the request was on its way when it was hung up on.
                with late.makefile("rb") as answer, contextlib.suppress(ConnectionResetError):
                    assert answer.read() == b""
        finally:
            for one in held:
                one.close()


def test_who_sends_slowly_keeps_nobody_else_out_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request has its time as a whole; one that goes on and on is hung up on, and others come."""
    monkeypatch.setattr(prometheus, "TIMEOUT_S", 0.2)  # in all; a single read may take longer
    with an_endpoint() as endpoint, contextlib.ExitStack() as stack:
        host, _, port = endpoint.address.rpartition(":")
        slow = [
            stack.enter_context(socket.create_connection((host, int(port))))
            for _ in range(MAX_SCRAPES)
        ]
        for one in slow:
            one.sendall(b"GET /metrics HTTP/1.1\r\nSlow: ")
        for one in slow:
            assert is_hung_up_on(one), "it may send for ever"
        assert scraped_again(endpoint.address)


def test_who_takes_an_answer_slowly_keeps_nobody_else_out_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An answer that is not taken is given up, however much of it is left."""
    metrics = Metrics()
    for number in range(500):  # some megabytes: more than the system's buffers hold
        metrics.breaker_changed(f"{number:x>8000}", BreakerState.CLOSED, BreakerState.OPEN)
    with (
        closing(PrometheusEndpoint("127.0.0.1:0", metrics)) as endpoint,
        contextlib.ExitStack() as stack,
    ):
        endpoint.start()
        host, _, port = endpoint.address.rpartition(":")
        for _ in range(MAX_SCRAPES):
            one = stack.enter_context(socket.socket())
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.connect((host, int(port)))
            one.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            assert one.recv(1) == b"H"
        later = SimpleNamespace(sleep=time.sleep, monotonic=lambda: time.monotonic() + TIMEOUT_S)
        monkeypatch.setattr(prometheus, "time", later)  # the time of all of them is over
        assert scraped_again(endpoint.address, "/")


def is_hung_up_on(slow: socket.socket) -> bool:
    """Whether that comes, while it sends a byte more now and then."""
    for _ in range(PATIENCE):
        if select.select([slow], [], [], 0.01)[0]:
            return True
        try:
            slow.sendall(b"y")
        except OSError:  # it came in between
            return True
    return False


def scraped_again(address: str, path: str = "/metrics") -> bool:
    """Whether a place becomes free: who was hung up on may have it for a moment more."""
    for _ in range(PATIENCE):
        with contextlib.suppress(OSError, http.client.HTTPException):
            return get(address, path).status == 200
        select.select([], [], [], 0.01)
    return False


def test_a_bug_in_a_scrape_is_logged_and_told(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It costs that scrape, and says what there is to say in the log alone."""
    metrics = Metrics()

    def broken() -> Iterator[Reading]:
        raise ZeroDivisionError(CANARY)

    with closing(PrometheusEndpoint("127.0.0.1:0", metrics)) as endpoint:
        endpoint.start()
        monkeypatch.setattr(metrics, "readings", broken)
        with structlog.testing.capture_logs() as logged:
            page = get(endpoint.address)
        assert (page.status, page.text) == (500, "amends: see its log\n")
        assert [entry["event"] for entry in logged] == ["scrape_failed"]
        monkeypatch.undo()
        assert get(endpoint.address).status == 200
    assert capfd.readouterr().err == ""


def test_many_scrape_at_once() -> None:
    """Each gets a whole page."""
    with an_endpoint() as endpoint:
        pages: list[str] = []
        threads = [
            threading.Thread(target=lambda: pages.append(get(endpoint.address).text))
            for _ in range(MAX_SCRAPES)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(pages) == MAX_SCRAPES
    assert all("amends_telemetry_overflows_total" in page for page in pages)


# -- where it is -----------------------------------------------------------------------------------


def test_the_port_is_free_again_after_the_end() -> None:
    """Another one can have it at once."""
    with an_endpoint() as endpoint:
        address = endpoint.address
        get(address)
    with an_endpoint(address) as again:
        assert again.address == address
        assert get(address).status == 200


def test_an_endpoint_that_never_started_can_be_closed() -> None:
    """As when the database cannot be opened."""
    PrometheusEndpoint("127.0.0.1:0", Metrics()).close()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_it_listens_where_it_was_told(host: str) -> None:
    """By name or by number."""
    with an_endpoint(f"{host}:0") as endpoint:
        assert get(endpoint.address).status == 200


async def test_a_port_that_is_taken_costs_no_database(tmp_path: Path) -> None:
    """It is refused in one line, and nothing was opened."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = Config(
            server=Server(listen="127.0.0.1:0", database=str(tmp_path / "amends.db")),
            telemetry=Telemetry(metrics_listen=f"127.0.0.1:{port}"),
        )
        with pytest.raises(ConfigurationError, match="another process listens there") as refused:
            async with run_engine(config):
                pass
    assert f"127.0.0.1:{port}" in str(refused.value)
    assert "--metrics-listen" in str(refused.value)
    assert list(tmp_path.iterdir()) == []


async def test_a_variable_that_was_ignored_is_named_though_the_port_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be why it is that port."""
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "prometheus")
    monkeypatch.setenv("OTEL_EXPORTER_PROMETHEUS_HOST", "127.0.0.1")
    monkeypatch.setenv("OTEL_EXPORTER_PROMETHEUS_PORT", "abc")
    config = Config(server=Server(listen="127.0.0.1:0", database=str(tmp_path / "amends.db")))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(outlets, "DEFAULT_PORT", taken.getsockname()[1])
        with structlog.testing.capture_logs() as entries, pytest.raises(ConfigurationError):
            async with run_engine(config):
                pass
    [said] = [str(entry["event"]) for entry in entries]
    assert said.startswith("OTEL_EXPORTER_PROMETHEUS_PORT is ignored: it must be a number")


async def test_a_database_that_cannot_be_opened_gives_the_port_back(tmp_path: Path) -> None:
    """What was taken first is let go of last."""
    with an_endpoint() as probe:
        address = probe.address
    config = Config(
        server=Server(listen="127.0.0.1:0", database=str(tmp_path / "no" / "amends.db")),
        telemetry=Telemetry(metrics_listen=address),
    )
    with pytest.raises(StoreError):
        async with run_engine(config):
            pass
    with an_endpoint(address):
        assert get(address).status == 200


def test_a_unix_socket_is_refused_by_name() -> None:
    """Prometheus could not reach it, so it would be of no use to anybody."""
    with pytest.raises(ConfigurationError) as refused:
        load(None, Flags(metrics_listen="unix:/run/amends-metrics.sock"))
    assert str(refused.value) == (
        "--metrics-listen: must be host:port: Prometheus scrapes no unix sockets"
    )


@pytest.mark.parametrize(
    ("environment", "listen"),
    [
        ({}, None),
        ({"OTEL_EXPORTER_PROMETHEUS_PORT": "9000"}, None),
        ({"OTEL_METRICS_EXPORTER": "prometheus"}, "localhost:9464"),
        ({"OTEL_METRICS_EXPORTER": "otlp, prometheus"}, "localhost:9464"),
        ({"OTEL_METRICS_EXPORTER": "otlp"}, None),
        ({"OTEL_METRICS_EXPORTER": "none"}, None),
        ({"OTEL_METRICS_EXPORTER": "prometheus", "OTEL_SDK_DISABLED": "true"}, None),
        (
            {
                "OTEL_METRICS_EXPORTER": "prometheus",
                "OTEL_EXPORTER_PROMETHEUS_HOST": "::1",
                "OTEL_EXPORTER_PROMETHEUS_PORT": "0",
            },
            "[::1]:0",
        ),
        (
            {"OTEL_METRICS_EXPORTER": "prometheus", "OTEL_EXPORTER_PROMETHEUS_PORT": "many"},
            "localhost:9464",
        ),
    ],
    ids=["nothing", "port-alone", "asked", "both", "otlp", "none", "disabled", "ipv6", "nonsense"],
)
def test_opentelemetrys_variables_open_it(environment: dict[str, str], listen: str | None) -> None:
    """Where the configuration says nothing; else that counts."""
    assert metrics_listen(Variables(environment), None) == listen
    assert metrics_listen(Variables(environment), "127.0.0.1:1") == "127.0.0.1:1"


# -- a real process --------------------------------------------------------------------------------


def test_the_ready_file_says_where_it_is(tmp_path: Path) -> None:
    """And the process ends at once, in order, while somebody scrapes and never reads on."""
    ready = tmp_path / "ready.json"
    served = Served(
        *("--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", "--ready-file", str(ready)),
        cwd=tmp_path,
    )
    try:
        served.wait_for("amends is up")
        content = json.loads(ready.read_text(encoding="utf-8"))
        assert set(content) == {"pid", "address", "metrics"}
        assert "amends_runtime_epoch 1.0" in get(content["metrics"]).text
        host, _, port = content["metrics"].rpartition(":")
        with socket.create_connection((host, int(port))):
            served.process.send_signal(signal.SIGTERM)
            assert served.wait_ended() == 0
        assert "Traceback" not in "\n".join(served.lines)
    finally:
        served.close()


def test_a_port_that_is_taken_ends_serve_with_one_line(tmp_path: Path) -> None:
    """Exit code 2, as for any wrong address."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ended = command(
            *("serve", "--listen", "127.0.0.1:0", "--metrics-listen", address),
            *("--database", str(tmp_path / "amends.db")),
        )
    assert ended.returncode == 2
    assert ended.stderr == (
        f"amends: cannot show metrics at {address}: another process listens there; choose another"
        " address with --metrics-listen or metrics_listen under [telemetry], port 0 for any free"
        " one\n"
    )
    assert list(tmp_path.iterdir()) == []
