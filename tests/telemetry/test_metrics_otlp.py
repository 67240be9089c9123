"""The metrics by OTLP: to a real receiver, one that hangs, and one that comes back."""

from __future__ import annotations

import json
import queue
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio.to_thread
import msgspec
import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsPartialSuccess,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.metrics.v1.metrics_pb2 import AggregationTemporality

import amends
from amends_runtime.config import Config, OtlpProtocol, Participant, Server, Telemetry
from amends_runtime.engine import Engine, run_engine
from amends_runtime.telemetry import otlp_metrics
from amends_runtime.telemetry.metrics import TABLE, Kind, Metrics
from amends_runtime.telemetry.otel_variables import Destination, Variables
from amends_runtime.telemetry.otlp import resource
from amends_runtime.telemetry.otlp_metrics import MetricSending, find_interval_s
from amends_runtime.telemetry.outlets import MetricOutlets
from tests.actors.runtimes import ONE_STEP, a_shop
from tests.cli.conftest import Served
from tests.telemetry.otlp_receiver import (
    Behaviour,
    ReceivedMetric,
    Receiver,
    plain,
    receiving,
)
from tests.telemetry.test_collector import Web, web_collector

PARTLY = ExportMetricsServiceResponse(
    partial_success=ExportMetricsPartialSuccess(
        rejected_data_points=2, error_message="the key hunter2 may not"
    )
).SerializeToString()
PROTOCOLS: tuple[OtlpProtocol, ...] = ("grpc", "http/protobuf")
PATIENCE_S = 60  # bounds a test that hangs; nothing is measured by it
OFTEN = "200"
"""The export interval of these tests, in milliseconds."""


@pytest.fixture(autouse=True)
def _only_these_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics are sent often; nothing else is said by the environment."""
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", OFTEN)


def address_of(receiver: Receiver, protocol: OtlpProtocol) -> str:
    """Where the receiver takes this protocol."""
    return receiver.grpc_address if protocol == "grpc" else receiver.http_url


@asynccontextmanager
async def a_runtime(
    folder: Path, telemetry: Telemetry
) -> AsyncIterator[tuple[Engine, amends.Client]]:
    """A runtime with a shop."""
    async with amends.serve(a_shop(), listen="127.0.0.1:0") as shop:
        config = Config(
            server=Server(listen="127.0.0.1:0", database=str(folder / "amends.db")),
            participants={"shop": Participant(address=shop.address)},
            telemetry=telemetry,
        )
        async with (
            run_engine(config) as engine,
            amends.Client(engine.address, timeout_s=30) as client,
        ):
            yield engine, client


async def complete(client: amends.Client, sagas: int) -> None:
    """Start so many sagas and wait for their ends."""
    await client.register(ONE_STEP)
    for _ in range(sagas):
        await (await client.start("one")).result(timeout_s=30)


def number(metric: ReceivedMetric, **labels: str) -> float:
    """The value of the point with these attributes: of a histogram, its count."""
    data: Any = getattr(metric.proto, str(metric.proto.WhichOneof("data")))
    for point in data.data_points:
        if plain(point.attributes) == labels:
            if metric.proto.HasField("histogram"):
                return float(point.count)
            return float(point.as_int if point.HasField("as_int") else point.as_double)
    return 0.0


def latest(receiver: Receiver, name: str) -> ReceivedMetric | None:
    """How this metric came last."""
    received = receiver.received.metrics(name)
    return received[-1] if received else None


def says(receiver: Receiver, name: str, value: float, **labels: str) -> bool:
    """Whether this is what it said last."""
    metric = latest(receiver, name)
    return metric is not None and number(metric, **labels) == value


# -- to a collector that is there ------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=["grpc", "http"])
async def test_the_whole_table_arrives(tmp_path: Path, protocol: OtlpProtocol) -> None:
    """Names, units, kinds and numbers, from a runtime that says who it is."""
    async with receiving() as receiver:
        telemetry = Telemetry(
            otlp_endpoint=address_of(receiver, protocol), otlp_protocol=protocol, otlp_metrics=True
        )
        async with a_runtime(tmp_path, telemetry) as (engine, client):
            await complete(client, 3)
            await receiver.wait_until(
                lambda: (
                    says(receiver, "amends.saga.starts", 3, definition="one")
                    and says(receiver, "amends.saga.ends", 3, definition="one", outcome="completed")
                )
            )
            store_id = engine.store.identity.store_id
        by_name = {metric.name: metric for metric in TABLE}
        arrived = {metric.proto.name: metric for metric in receiver.received.metrics()}
        # Those without a label have something to say from the start.
        assert {metric.name for metric in TABLE if not metric.labels} <= set(arrived)
        for name, metric in arrived.items():
            wanted = by_name[name]
            assert metric.proto.unit == wanted.unit
            assert metric.proto.description == wanted.description
            kind = {Kind.COUNTER: "sum", Kind.HISTOGRAM: "histogram"}.get(wanted.kind, "gauge")
            assert metric.proto.WhichOneof("data") == kind
            assert metric.scope == "amends"
            assert metric.resource["service.name"] == "amends"
            assert metric.resource["service.instance.id"] == store_id
        cumulative = AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE
        starts = arrived["amends.saga.starts"].proto.sum
        assert starts.is_monotonic
        assert starts.aggregation_temporality == cumulative
        [point] = starts.data_points
        assert 0 < point.start_time_unix_nano <= point.time_unix_nano
        histogram = arrived["amends.saga.duration"].proto.histogram
        assert histogram.aggregation_temporality == cumulative
        [row] = histogram.data_points
        assert list(row.explicit_bounds) == list(by_name["amends.saga.duration"].bounds)
        assert sum(row.bucket_counts) == row.count == 3
        assert not row.HasField("min")
        assert {request.transport for request in receiver.received.requests} == {
            "grpc" if protocol == "grpc" else "http"
        }


async def test_the_end_is_sent_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What happened within the last interval is not lost with the runtime."""
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "3600000")
    async with receiving() as receiver:
        telemetry = Telemetry(otlp_endpoint=receiver.grpc_address, otlp_metrics=True)
        async with a_runtime(tmp_path, telemetry) as (_, client):
            await complete(client, 2)
            assert receiver.received.metrics() == []
        assert says(receiver, "amends.saga.ends", 2, definition="one", outcome="completed")


async def test_they_are_sent_only_to_who_asked(tmp_path: Path) -> None:
    """An endpoint for traces gets no metrics: Jaeger takes none."""
    async with receiving() as receiver:
        telemetry = Telemetry(otlp_endpoint=receiver.grpc_address)
        async with a_runtime(tmp_path, telemetry) as (_, client):
            await complete(client, 1)
        assert len(receiver.spans()) > 0
        assert receiver.received.metrics() == []


async def test_opentelemetrys_variables_ask_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways at once, without a line of configuration."""
    async with receiving() as receiver:
        monkeypatch.setenv("OTEL_METRICS_EXPORTER", "otlp,prometheus")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", f"http://{receiver.grpc_address}")
        monkeypatch.setenv("OTEL_EXPORTER_PROMETHEUS_HOST", "127.0.0.1")
        monkeypatch.setenv("OTEL_EXPORTER_PROMETHEUS_PORT", "0")
        monkeypatch.setenv("OTEL_SERVICE_NAME", "orders")
        async with a_runtime(tmp_path, Telemetry()) as (engine, client):
            await complete(client, 1)
            assert engine.metrics_address.startswith("127.0.0.1:")
            collector = f"http://{receiver.grpc_address} (grpc)"
            assert engine.metrics_to == f"{engine.metrics_address}, {collector}"
            await receiver.wait_until(
                lambda: says(receiver, "amends.saga.starts", 1, definition="one")
            )
        metric = latest(receiver, "amends.saga.starts")
        assert metric is not None
        assert metric.resource["service.name"] == "orders"
        assert receiver.spans() == []


# -- to one that is not ----------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=["grpc", "http"])
@pytest.mark.parametrize("behaviour", [Behaviour.HANG, Behaviour.REFUSE], ids=["hangs", "refuses"])
async def test_a_collector_that_does_not_answer_harms_nothing(
    tmp_path: Path, protocol: OtlpProtocol, behaviour: Behaviour
) -> None:
    """Sagas complete, and the process ends in order, with the last export given up."""
    async with (
        receiving() as receiver,
        amends.serve(a_shop(), listen="127.0.0.1:0") as shop,
    ):
        receiver.behave(behaviour)
        (tmp_path / "amends.toml").write_text(
            "[telemetry]\notlp_metrics = true\n"
            f'otlp_endpoint = "{address_of(receiver, protocol)}"\notlp_protocol = "{protocol}"\n',
            encoding="utf-8",
        )
        served = Served(
            *("--config", "amends.toml", "--listen", "127.0.0.1:0"),
            *("--participant", f"shop={shop.address}"),
            cwd=tmp_path,
        )
        try:
            up = await anyio.to_thread.run_sync(served.wait_for, "amends is up")
            async with amends.Client(up["address"], timeout_s=30) as client:
                await complete(client, 20)
            served.process.send_signal(signal.SIGTERM)
            assert await anyio.to_thread.run_sync(served.wait_ended) == 0
        finally:
            served.close()
    assert json.loads(served.lines[-1])["message"] == "amends has stopped"
    log = "\n".join(served.lines)
    assert "Traceback" not in log
    assert "opentelemetry" not in log, "the exporter's own lines are replaced by ours"
    assert receiver.received.metrics() == []


@pytest.mark.parametrize(
    ("status", "body", "why"),
    [
        (200, b"", None),
        (200, b"<html>welcome</html>", "its answer is not OTLP"),
        (200, PARTLY, "it refused 2 points: the key *** may not"),
        (302, b"", "HTTP 302 Found"),
        (401, b"", "HTTP 401 Unauthorized"),
    ],
    ids=["taken", "page", "in part", "elsewhere", "refused"],
)
async def test_what_was_not_taken_does_not_count_as_sent(
    status: int, body: bytes, why: str | None
) -> None:
    """And no secret is in what is told of it."""
    with web_collector(Web(status, body, Location="/login")) as to:
        of_metrics = msgspec.structs.replace(to, signal="metrics", headers={"api-key": "hunter2"})
        sending = MetricSending(Metrics(), of_metrics, interval_s=60)
        failure = await anyio.to_thread.run_sync(sending._failure)
        sending._way.close()
    assert failure is None if why is None else failure is not None and failure.startswith(why)


class Log:
    """What is logged, by whatever thread."""

    def __init__(self) -> None:
        self.events: queue.Queue[str] = queue.Queue()

    def warning(self, event: str, **_: object) -> None:
        """Keep it."""
        self.events.put(event)

    info = warning

    async def next(self) -> str:
        """The next event."""
        return await anyio.to_thread.run_sync(lambda: self.events.get(timeout=PATIENCE_S))


async def test_one_that_comes_back_gets_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers are cumulative, so nothing is missing; the log says once that it was away."""
    metrics, log = Metrics(), Log()
    monkeypatch.setattr(otlp_metrics, "_log", log)
    async with receiving() as receiver:
        receiver.behave(Behaviour.REFUSE)
        to = Destination(
            signal="metrics",
            protocol="grpc",
            endpoint=f"http://{receiver.grpc_address}",
            timeout_s=60.0,
        )
        sending = MetricSending(metrics, to, interval_s=0.05)
        sending.start(resource("store-1", {}))
        metrics.batch_committed(1, 0.001)
        assert await log.next() == "metrics_not_sent"
        metrics.batch_committed(1, 0.001)
        receiver.behave(Behaviour.ANSWER)
        await receiver.wait_until(lambda: says(receiver, "amends.commit.turns", 2))
        assert await log.next() == "metrics_sent_again"  # the receiver has it before it answers
        sending.end()
        assert await sending.wait_ended(30)
    assert log.events.empty()


def test_the_interval_is_opentelemetrys() -> None:
    """A minute, unless the variable says otherwise; what it says is bounded below."""
    assert find_interval_s(Variables({})) == 60
    assert find_interval_s(Variables({"OTEL_METRIC_EXPORT_INTERVAL": "5000"})) == 5
    assert find_interval_s(Variables({"OTEL_METRIC_EXPORT_INTERVAL": "1"})) == 0.1
    variables = Variables({"OTEL_METRIC_EXPORT_INTERVAL": "often"})
    assert find_interval_s(variables) == 60
    assert len(variables.remarks) == 1


def test_asking_for_metrics_without_a_place_is_remarked() -> None:
    """Nobody believes that they are sent."""
    variables = Variables({})
    outlets = MetricOutlets(
        variables, listen=None, otlp=True, otlp_endpoint=None, otlp_protocol=None
    )
    assert outlets.observers == []
    assert "otlp_metrics is true" in variables.remarks[0]
