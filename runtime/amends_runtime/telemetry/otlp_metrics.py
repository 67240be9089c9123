"""The metrics by OTLP: the same table, pushed to a collector every minute.

How to think about it. A daemon thread of its own makes OpenTelemetry's values of the readings, has
the library encode them, and sends the bytes as spans are sent (see `collector`), again and again.
Nothing waits for it: a collector that hangs holds up this thread alone, and since all numbers are
cumulative the next export that gets through says everything that one which failed has not. So
there is no queue, nothing is tried twice, and nothing is lost but the points in between.

At the end there is one export more, for as long as `wait_ended` has time; what has not got through
by then is given up, and the process ends with the thread in whatever it was waiting for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, Final, cast

import anyio.to_thread
import structlog
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    HistogramDataPoint,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.metrics.export import Histogram as OtelHistogram
from opentelemetry.sdk.metrics.export import Metric as OtelMetric
from opentelemetry.sdk.resources import Resource

from amends_runtime.telemetry.collector import MAX_REASON, Refused, way_to
from amends_runtime.telemetry.meters import HistogramValue
from amends_runtime.telemetry.metrics import Kind, Metric, Metrics, Reading
from amends_runtime.telemetry.otel_variables import Destination, Variables
from amends_runtime.telemetry.otlp import SCOPE

__all__ = ["MetricSending", "find_interval_s", "metrics_data"]

_log = structlog.get_logger(__name__)

INTERVAL_MS: Final = 60_000.0  # the specification's default
LEAST_INTERVAL_MS: Final = 100.0  # encoding takes some milliseconds of the interpreter's time
MAX_INTERVAL_MS: Final = 24 * 3600 * 1000.0


def find_interval_s(variables: Variables) -> float:
    """How often metrics are sent: `OTEL_METRIC_EXPORT_INTERVAL`, or every minute."""
    value_ms = variables.number("OTEL_METRIC_EXPORT_INTERVAL", MAX_INTERVAL_MS) or INTERVAL_MS
    return max(value_ms, LEAST_INTERVAL_MS) / 1000


class MetricSending:
    """Sends metrics to one collector, from `start` on.

    `end` asks for the last export and returns at once; `wait_ended` gives it time.
    """

    def __init__(self, metrics: Metrics, to: Destination, interval_s: float) -> None:
        self._metrics = metrics
        self.where = str(to)
        """Which collector, for people."""
        self._sender = Resource({})
        self._interval_s = interval_s
        self._way = way_to(to)
        self._ending = threading.Event()
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="metrics by OTLP", daemon=True)

    def start(self, sender: Resource) -> None:
        """Sends from now on, for the first time after one interval. `sender` is who does."""
        self._sender = sender
        self._thread.start()

    def end(self) -> None:
        """Lets the thread send what there is now, and end."""
        self._ending.set()

    async def wait_ended(self, timeout_s: float) -> bool:
        """Until the last export is through; False after `timeout_s`, and then it is given up."""
        if self._thread.ident is not None:
            await anyio.to_thread.run_sync(self._thread.join, timeout_s)
        if self._thread.is_alive():
            _log.warning(
                "metrics_abandoned",
                to=self.where,
                hint="the numbers since the last export are not there: is the collector well?",
            )
            return False
        return True

    def _run(self) -> None:
        while not self._ending.wait(self._interval_s):
            self._send()
        self._send()
        self._way.close()

    def _send(self) -> None:
        failure = self._failure()
        if failure is not None and not self._failing:
            _log.warning(
                "metrics_not_sent",
                to=self.where,
                why=failure,
                hint="sagas go on, and the next export says it all; is the collector there, does it"
                " take metrics, and does it speak this protocol?",
            )
        elif failure is None and self._failing:
            _log.info("metrics_sent_again", to=self.where)
        self._failing = failure is not None

    def _failure(self) -> str | None:
        """Sends, and answers why that failed, in a few words for people; None: it did not."""
        try:
            data = metrics_data(self._metrics, self._sender)
            answer = self._way.send(encode_metrics(data).SerializeToString())
        except Exception as error:  # noqa: BLE001  # the library's, in encoding, not a saga's
            return f"{type(error).__name__}: {error}"[:MAX_REASON]
        if isinstance(answer, Refused):
            return answer.why
        if answer.rejected:
            return f"it refused {answer.rejected} points: {answer.why}"[:MAX_REASON]
        return None


# -- values ----------------------------------------------------------------------------------------


def metrics_data(metrics: Metrics, sender: Resource) -> MetricsData:
    """Everything that there is to show, as the SDK has it; cumulative since `metrics` began."""
    shown = list(_shown(metrics.readings(), metrics.began_ns, time.time_ns()))
    scope = ScopeMetrics(SCOPE, shown, "")
    return MetricsData([ResourceMetrics(sender, [scope], "")])


def _shown(readings: Iterable[Reading], began_ns: int, now_ns: int) -> Iterator[OtelMetric]:
    for metric, values in readings:
        if not values:
            continue
        data: Sum | Gauge | OtelHistogram
        if metric.kind is Kind.HISTOGRAM:
            rows = [_row(metric, key, value, began_ns, now_ns) for key, value in values.items()]
            data = OtelHistogram(rows, AggregationTemporality.CUMULATIVE)
        else:
            points = [
                NumberDataPoint(_attributes(metric, key), began_ns, now_ns, cast("float", value))
                for key, value in values.items()
            ]
            is_sum = metric.kind is Kind.COUNTER
            cumulative = AggregationTemporality.CUMULATIVE
            data = Sum(points, cumulative, is_monotonic=True) if is_sum else Gauge(points)
        yield OtelMetric(metric.name, metric.description, metric.unit, data)


def _row(
    metric: Metric, labels: tuple[str, ...], value: object, began_ns: int, now_ns: int
) -> HistogramDataPoint:
    assert isinstance(value, HistogramValue), "a histogram's values are"
    unknown: Any = None  # the protocol knows these as optional, and so does the encoder
    return HistogramDataPoint(
        attributes=_attributes(metric, labels),
        start_time_unix_nano=began_ns,
        time_unix_nano=now_ns,
        count=value.count,
        sum=value.total,
        bucket_counts=value.buckets,
        explicit_bounds=metric.bounds,
        min=unknown,
        max=unknown,
    )


def _attributes(metric: Metric, labels: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(metric.labels, labels, strict=True))
