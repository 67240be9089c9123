"""The endpoint that Prometheus scrapes.

1. It lives in daemon threads: a scrape takes nothing of the event loop but the interpreter's time,
   and the process ends without waiting for one.
2. Its port is taken before the database is opened, so that a wrong address costs nothing.
3. It shows the table of `metrics`, and what `prometheus_client` knows of the process and of Python.
   At `/metrics`, to whoever reaches it; at `/` a line that says so; nothing else.
4. Bounded: `MAX_SCRAPES` at a time, each with `TIMEOUT_S` in all to send its request and take the
   answer, however busily it does so: then it is hung up on, and its place is another's. Who comes
   when all places are taken is hung up on at once, and asks again at its next interval.
"""

from __future__ import annotations

import contextlib
import errno
import io
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any, Final, TextIO
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import structlog
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector, make_wsgi_app
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from amends_runtime.errors import ConfigurationError
from amends_runtime.telemetry.meters import HistogramValue
from amends_runtime.telemetry.metrics import Kind, Metric, Metrics, Values

__all__ = ["PrometheusEndpoint"]

MAX_SCRAPES: Final = 8  # two Prometheus servers, and some people with curl
TIMEOUT_S: Final = 10.0  # as long as Prometheus itself waits, by default
FULL_S: Final = 0.1  # before a process without a file descriptor to spare tries again
BACKLOG: Final = 16  # connections that wait while the runtime comes up

HINT: Final = b"amends: the metrics are at /metrics\n"

_log = structlog.get_logger(__name__)

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class PrometheusEndpoint:
    """The endpoint: takes its port when it is made, answers once it is started.

    `listen` is `host:port`; with port 0 `address` says which one it is. Raises ConfigurationError,
    in one line, where it cannot listen. Must be closed.
    """

    def __init__(self, listen: str, metrics: Metrics) -> None:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Table(metrics))
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self._server = _listening(listen)
        self._server.set_app(_only_metrics(make_wsgi_app(registry)))
        self._woken, self._waker = socket.socketpair()
        self._thread: threading.Thread | None = None
        host, port = self._server.server_address[:2]
        self.address = f"[{host!s}]:{port}" if ":" in str(host) else f"{host!s}:{port}"

    def start(self) -> None:
        """Answers from now on."""
        self._thread = threading.Thread(target=self._run, name="metrics endpoint", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Gives the port back. Answers that are under way go on in their threads."""
        self._waker.send(b"\0")
        if self._thread is not None:
            self._thread.join()
        self._server.server_close()
        self._woken.close()
        self._waker.close()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._server, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select(self._server.hang_up())]
                if self._woken in ready:
                    return
                self._server.handle_request()


# -- HTTP ------------------------------------------------------------------------------------------


class _Handler(WSGIRequestHandler):
    """One request: no log line, and no DNS question about who asks."""

    timeout = TIMEOUT_S  # of each read and write; `hang_up` bounds all of them together

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # as it is called there
        """Scrapes come every few seconds, and say nothing."""

    def get_stderr(self) -> TextIO:
        """The library writes tracebacks there about who does not read on. What counts is logged."""
        return io.StringIO()

    def address_string(self) -> str:
        return str(self.client_address[0])


class _Server(ThreadingMixIn, WSGIServer):
    """A thread for each request, and bounds for their number and their time."""

    daemon_threads = True
    request_queue_size = BACKLOG
    timeout = 0  # `handle_request` waits for nobody who has hung up in the meantime

    def __init__(self, family: socket.AddressFamily, address: Any) -> None:
        self.address_family = family
        # Who has a place, and until when, the oldest first. A socket is shut and closed under the
        # lock, so that nobody shuts one whose number has become another's.
        self._until_s: dict[socket.socket, float] = {}
        self._lock = threading.Lock()
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # The library's asks the DNS for this host's name, which may take as long as it likes.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()
        self.socket.setblocking(False)

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in {errno.EMFILE, errno.ENFILE}:
                time.sleep(FULL_S)  # who waits is still there, and would be tried without end
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            has_place = len(self._until_s) < MAX_SCRAPES
            if has_place:
                self._until_s[request] = time.monotonic() + TIMEOUT_S
        if has_place:
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def close_request(self, request: Any) -> None:
        """At the end of its thread, whatever became of it."""
        with self._lock:
            self._until_s.pop(request, None)
            super().close_request(request)

    def hang_up(self) -> float | None:
        """Hangs up on whoever's time is over. Seconds until the next one's is; None: nobody's.

        Their threads wake up to a request that has ended or an answer that nobody takes, and give
        their places back.
        """
        with self._lock:
            now_s = time.monotonic()
            for request, until_s in self._until_s.items():
                if until_s > now_s:
                    return until_s - now_s
                with contextlib.suppress(OSError):  # it has hung up by itself
                    request.shutdown(socket.SHUT_RDWR)
            return None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever hung up in the middle, or sent no request, is nobody's failure."""


def _listening(listen: str) -> _Server:
    host, _, port = listen.rpartition(":")
    try:
        found = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, _, _, _, address = found[0]
        return _Server(family, address)
    except OSError as error:
        why = _REASONS.get(error.errno or 0, error.strerror or str(error))
        if isinstance(error, socket.gaierror):
            why = f"{host!r} is not known ({error.strerror})"
        raise ConfigurationError(
            f"cannot show metrics at {listen}: {why}; choose another address with --metrics-listen"
            " or metrics_listen under [telemetry], port 0 for any free one"
        ) from None


_REASONS: Final = {
    errno.EADDRINUSE: "another process listens there",
    errno.EADDRNOTAVAIL: "this machine has no such address",
    errno.EACCES: "ports below 1024 need a privilege",
}


def _only_metrics(show: Application) -> Application:
    """`/metrics` by `show`; everything else is a line of text."""

    def answer(request: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path = request.get("PATH_INFO", "")
        status, text = "404 Not Found", HINT
        if path == "/metrics":
            try:
                return show(request, start)
            except Exception:  # noqa: BLE001  # a bug of ours costs a scrape
                _log.exception("scrape_failed")
                status, text = "500 Internal Server Error", b"amends: see its log\n"
        elif path == "/":
            status = "200 OK"
        start(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [text]

    return answer


# -- the table as Prometheus has it ----------------------------------------------------------------


class _Table(Collector):
    """Shows the readings of `metrics` as they are at a scrape."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Family]:
        for metric, values in self._metrics.readings():
            yield _family(metric, values)


def _family(metric: Metric, values: Values) -> Family:
    about = (metric.prometheus_name, metric.description)
    unit = metric.prometheus_unit
    if metric.kind is Kind.HISTOGRAM:
        histogram = HistogramMetricFamily(*about, labels=metric.labels, unit=unit)
        bounds = [*map(str, metric.bounds), "+Inf"]
        for labels, value in values.items():
            assert isinstance(value, HistogramValue), "a histogram's values are"
            buckets, below = [], 0
            for bound, count in zip(bounds, value.buckets, strict=True):
                below += count
                buckets.append((bound, below))
            histogram.add_metric(labels, buckets, value.total)
        return histogram
    if metric.kind is Kind.INFO:
        info = InfoMetricFamily(*about)
        for labels in values:
            info.add_metric([], dict(zip(metric.labels, labels, strict=True)))
        return info
    family = CounterMetricFamily if metric.kind is Kind.COUNTER else GaugeMetricFamily
    single = family(*about, labels=metric.labels, unit=unit)
    for labels, value in values.items():
        assert not isinstance(value, HistogramValue), "only a histogram's values are"
        single.add_metric(labels, value)
    return single
