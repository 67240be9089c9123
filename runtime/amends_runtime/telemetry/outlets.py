"""The ways out for metrics: the endpoint that is scraped, the collector that is sent to, or none.

Where there is none, nothing is counted, nothing is looked at, and neither of the libraries that
would be needed is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from anyio.abc import TaskGroup

from amends_runtime.ports import Observer
from amends_runtime.telemetry.gauges import Gauges, Sources
from amends_runtime.telemetry.metrics import Metrics
from amends_runtime.telemetry.otel_variables import (
    Protocol,
    Variables,
    find_destination,
    find_exporters,
)

if TYPE_CHECKING:
    from amends_runtime.telemetry.otlp_metrics import MetricSending
    from amends_runtime.telemetry.prometheus import PrometheusEndpoint

__all__ = ["MetricOutlets", "metrics_listen"]

DEFAULT_HOST = "localhost"  # these two are OpenTelemetry's
DEFAULT_PORT = 9464


def metrics_listen(variables: Variables, configured: str | None) -> str | None:
    """Where the endpoint is to be: what was configured, else what OpenTelemetry's variables say.

    `OTEL_METRICS_EXPORTER` has to name prometheus; `OTEL_EXPORTER_PROMETHEUS_HOST` and `_PORT` are
    looked at only then. None: there is to be none.
    """
    if configured is not None:
        return configured
    if "prometheus" not in (find_exporters(variables, "metrics") or ()):
        return None
    host = variables.text("OTEL_EXPORTER_PROMETHEUS_HOST") or DEFAULT_HOST
    port = variables.number("OTEL_EXPORTER_PROMETHEUS_PORT", 65_535)
    is_bare_ipv6 = ":" in host and not host.startswith("[")
    return f"{f'[{host}]' if is_bare_ipv6 else host}:{DEFAULT_PORT if port is None else int(port)}"


class MetricOutlets:
    """What was asked for, by the configuration or else by OpenTelemetry's variables.

    Made before anything else is opened, and closed after everything else: `start`, `look`, `end`,
    `close`, in this order. `listen` is the endpoint's `host:port`; `otlp_endpoint` is the
    configuration's and `otlp` whether it is for metrics, too. Raises ConfigurationError where the
    port cannot be had; what else is wrong stands in `variables`.
    """

    def __init__(
        self,
        variables: Variables,
        *,
        listen: str | None,
        otlp: bool,
        otlp_endpoint: str | None,
        otlp_protocol: Protocol | None,
    ) -> None:
        self.metrics = Metrics()
        self._gauges: Gauges | None = None
        self._endpoint: PrometheusEndpoint | None = None
        self._sending: MetricSending | None = None
        listen = metrics_listen(variables, listen)
        to = find_destination(
            variables, "metrics", endpoint=otlp_endpoint, protocol=otlp_protocol, asked=otlp
        )
        if otlp and to is None:
            variables.remark(
                "no metrics are sent: [telemetry] otlp_metrics is true, and nothing says where to;"
                " set otlp_endpoint"
            )
        variables.check()
        if to is not None:
            from amends_runtime.telemetry.otlp_metrics import (  # noqa: PLC0415  # see above
                MetricSending,
                find_interval_s,
            )

            self._sending = MetricSending(self.metrics, to, find_interval_s(variables))
        if listen is not None:
            from amends_runtime.telemetry.prometheus import (  # noqa: PLC0415  # see above
                PrometheusEndpoint,
            )

            self._endpoint = PrometheusEndpoint(listen, self.metrics)

    @property
    def observers(self) -> list[Observer]:
        """Who has to be told what happens; empty where nobody wants to know."""
        return [self.metrics] if self._endpoint is not None or self._sending is not None else []

    @property
    def address(self) -> str:
        """Where Prometheus finds them; empty: nowhere."""
        return "" if self._endpoint is None else self._endpoint.address

    @property
    def where(self) -> str:
        """All ways out, for people; empty: there is none."""
        ways = [self.address, "" if self._sending is None else self._sending.where]
        return ", ".join(filter(None, ways))

    async def start(
        self, tasks: TaskGroup, sources: Sources, sender: Mapping[str, str], store_id: str
    ) -> None:
        """Shows and sends from now on. `sender` is what OTLP says of who sends, beside the store.

        The tasks that look end with their group.
        """
        if not self.observers:
            return
        self._gauges = Gauges(self.metrics, sources)
        await self._gauges.look()
        tasks.start_soon(self._gauges.run, name="gauges")
        tasks.start_soon(self._gauges.run_lag, name="event loop lag")
        if self._endpoint is not None:
            self._endpoint.start()
        if self._sending is not None:
            from amends_runtime.telemetry.otlp import resource  # noqa: PLC0415  # see above

            self._sending.start(resource(store_id, sender))

    async def end(self) -> None:
        """Looks once more, and lets the last export begin. `wait_sent` gives it time."""
        if self._gauges is not None:
            await self._gauges.look()
        if self._sending is not None:
            self._sending.end()

    async def wait_sent(self, timeout_s: float) -> bool:
        """Until the last export is through; False after `timeout_s`, and then it is given up."""
        return self._sending is None or await self._sending.wait_ended(timeout_s)

    def close(self) -> None:
        """Gives the endpoint's port back."""
        if self._endpoint is not None:
            self._endpoint.close()
