"""The way to a collector: the bytes of a message go there, and it says what became of them.

How to think about it. A message is bytes already (see `encoding`), and OTLP is one call, by gRPC or
as an HTTP POST. What is left is what a `Destination` says of the way, and what an answer means for
whoever sends.

1. Taken, maybe but for some spans: OTLP's partial success. Those would not be taken again, either.
2. Refused for now, or for good: OTLP has a table of the statuses that may pass. Nobody there, no
   answer in time, and a collector that asks to be left alone for a while may; what it finds wrong
   with the message itself does not, and sending it again would only hold up what comes next.
3. Nothing is retried here, and nothing logged: whoever sends knows how long there is time for it.
4. A collector is a stranger. What it may say is bounded in bytes and, from the first of the
   connection to the last of the answer, in time; and no header's value and no password is in what
   is told of a failure, whoever has put it there.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from email.utils import parsedate_to_datetime
from http.client import BadStatusLine
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias, cast
from urllib.parse import unquote, urlsplit

import msgspec

from amends_runtime.telemetry.encoding import Frame
from amends_runtime.telemetry.otel_variables import Destination, Signal
from amends_runtime.telemetry.spans import Span

if TYPE_CHECKING:
    import grpc
    import requests

__all__ = [
    "Answer",
    "Refused",
    "SpanExport",
    "Taken",
    "Way",
    "way_to",
]

EXPORT: Final[Mapping[Signal, str]] = {
    "traces": "/opentelemetry.proto.collector.trace.v1.TraceService/Export",
    "metrics": "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export",
}
USER_AGENT: Final = f"amends/{metadata.version('amends')}"
MAX_REASON: Final = 200  # characters of a collector's words that are shown
MAX_ANSWER_BYTES: Final = 64 * 1024  # one that is OTLP's has some hundreds
SHORTEST_SECRET: Final = 4  # characters; to hide what is shorter would hide half of the reason
RECONNECT_MS: Final = 5_000  # gRPC's own waits grow to two minutes, in which a collector is back

# https://opentelemetry.io/docs/specs/otlp/#failures. RESOURCE_EXHAUSTED passes if it says when:
# without that it is also what a message gets that is too large.
_MAY_PASS: Final = {
    "CANCELLED",
    "DEADLINE_EXCEEDED",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNAVAILABLE",
    "DATA_LOSS",
}
_MAY_PASS_HTTP: Final = {429, 502, 503, 504}

# What a part of the message may not get: it is too large, or something in it is wrong.
_OF_CONTENT: Final = {"INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"}
_OF_CONTENT_HTTP: Final = {400, 413, 422}


class Taken(msgspec.Struct, frozen=True):
    """The collector has the message, but for so many spans or points, and why not these."""

    rejected: int = 0
    why: str = ""


class Refused(msgspec.Struct, frozen=True):
    """It has not, and why not, in a few words for people.

    `may_pass`: the same message may be taken later, after `after_s` seconds if the collector says
    so, else 0. `of_content`: a part of it may be taken now, if another part is what was wrong.
    """

    why: str
    may_pass: bool = True
    after_s: float = 0.0
    of_content: bool = False


Answer: TypeAlias = Taken | Refused


class Way(Protocol):
    """A way to one collector. Used by one thread at a time, but for `close`."""

    def send(self, body: bytes) -> Answer:
        """Sends one message and waits for the answer, for the destination's time-out at most."""
        ...

    def close(self) -> None:
        """Breaks off what is being sent, where that can be done. From any thread; may hang."""
        ...


def way_to(to: Destination) -> Way:
    """The way there. Nothing is connected before something is sent.

    What it answers has no secret of the destination in it, and is short.
    """
    return _Discreet(_Grpc(to) if to.protocol == "grpc" else _Http(to), to)


class _Discreet:
    """A way that keeps the destination's secrets to itself; see rule 4."""

    def __init__(self, way: Way, to: Destination) -> None:
        self._way = way
        url = urlsplit(to.endpoint)
        given = [*to.headers.values(), url.username or "", url.password or ""]
        given += map(unquote, tuple(given))
        # And each word alone: of `Bearer SECRET` a collector may quote the second.
        secrets = {*given, *(word for text in given for word in text.split())}
        self._secrets = sorted((one for one in secrets if len(one) >= SHORTEST_SECRET), key=len)

    def send(self, body: bytes) -> Answer:
        try:
            answer = self._way.send(body)
        except Exception as error:  # noqa: BLE001  # a library's: it says nothing of the message
            answer = Refused(f"{type(error).__name__}: {error}")
        return msgspec.structs.replace(answer, why=self._shown(answer.why))

    def _shown(self, why: str) -> str:
        for secret in reversed(self._secrets):  # a longer one may have a shorter one in it
            why = why.replace(secret, "***")
        return _short(why)

    def close(self) -> None:
        self._way.close()


def _short(why: str) -> str:
    """Fit for a line: of a long one its beginning, and its end, where the cause stands."""
    why = "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in why)
    if len(why) <= MAX_REASON:
        return why
    head = MAX_REASON // 3
    return f"{why[:head]} … {why[head + 3 - MAX_REASON :]}"


class SpanExport:
    """Spans to one collector. `sender` are the resource attributes of who sends them."""

    def __init__(self, to: Destination, sender: Mapping[str, str]) -> None:
        self._frame = Frame(sender)
        self._way = way_to(to)

    def send(self, spans: Sequence[Span]) -> Answer:
        """Sends spans and waits for the answer, for the destination's time-out at most."""
        try:
            body = self._frame.encode(spans)
        except Exception as error:  # noqa: BLE001  # ours, of a span that nobody has thought of
            why = f"cannot be encoded: {type(error).__name__}"
            return Refused(why, may_pass=False, of_content=True)
        return self._way.send(body)

    def close(self) -> None:
        """Breaks off what is being sent. From any thread; may itself hang."""
        self._way.close()


def _read_answer(signal: Signal, body: bytes) -> Answer:
    """What an answer says that is a success by its status."""
    if not body:
        return Taken()
    if len(body) > MAX_ANSWER_BYTES:
        return Refused("its answer is too long to be OTLP", may_pass=False)
    from google.protobuf.message import DecodeError  # noqa: PLC0415  # seldom
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (  # noqa: PLC0415
        ExportMetricsServiceResponse,
    )
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (  # noqa: PLC0415
        ExportTraceServiceResponse,
    )

    try:
        if signal == "traces":
            of_spans = ExportTraceServiceResponse.FromString(body).partial_success
            return Taken(max(0, of_spans.rejected_spans), of_spans.error_message)
        of_points = ExportMetricsServiceResponse.FromString(body).partial_success
        return Taken(max(0, of_points.rejected_data_points), of_points.error_message)
    except DecodeError:
        return Refused("its answer is not OTLP", may_pass=False)


# -- gRPC ------------------------------------------------------------------------------------------


class _Grpc:
    def __init__(self, to: Destination) -> None:
        # A tenth of a second, which whoever sends nothing, or by HTTP, does not pay.
        import grpc  # noqa: PLC0415

        self._failed: type[Exception] = grpc.RpcError
        self._signal = to.signal
        self._timeout_s = to.timeout_s
        self._headers = tuple((name.lower(), text) for name, text in to.headers.items())
        self._compression = grpc.Compression.Gzip if to.gzip else grpc.Compression.NoCompression
        target = urlsplit(to.endpoint).netloc.rpartition("@")[2]
        options = (
            ("grpc.enable_retries", 0),
            ("grpc.max_reconnect_backoff_ms", RECONNECT_MS),
            ("grpc.max_receive_message_length", MAX_ANSWER_BYTES),
            ("grpc.primary_user_agent", USER_AGENT),
        )
        credentials = _grpc_credentials(to)
        self._channel = (
            grpc.insecure_channel(target, options)
            if credentials is None
            else grpc.secure_channel(target, credentials, options)
        )
        self._export: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(
            EXPORT[to.signal]  # bytes out, bytes in
        )

    def send(self, body: bytes) -> Answer:
        try:
            answer = self._export(
                body,
                timeout=self._timeout_s,
                metadata=self._headers,
                compression=self._compression,
            )
        except self._failed as error:
            return _refused_call(cast("grpc.Call", error))
        except ValueError:  # whose words may be the headers', and these are secret
            return Refused("gRPC does not send it: it was closed, or cannot send such a header")
        return _read_answer(self._signal, answer)

    def close(self) -> None:
        self._channel.close()


def _refused_call(call: grpc.Call) -> Refused:
    status = call.code().name
    after_s = _retry_info_s(call)
    details = call.details() or ""
    if any(sign in details for sign in _NOT_HTTP2):
        details = "its answer is not HTTP/2, which gRPC is"
    return Refused(
        f"{status}: {details}",
        may_pass=status in _MAY_PASS or (status == "RESOURCE_EXHAUSTED" and after_s is not None),
        after_s=after_s or 0.0,
        of_content=status in _OF_CONTENT and after_s is None,
    )


_NOT_HTTP2: Final = ("Failed parsing HTTP/2", "http1.x server")  # gRPC's words for a web server


def _retry_info_s(call: grpc.Call) -> float | None:
    """In how many seconds the collector wants to be asked again; None: it does not say."""
    details = [
        value
        for key, value in call.trailing_metadata() or ()
        if key == "grpc-status-details-bin" and isinstance(value, bytes)
    ]
    if not details:
        return None
    from google.protobuf.message import DecodeError  # noqa: PLC0415  # seldom
    from google.rpc import error_details_pb2, status_pb2  # noqa: PLC0415

    info = error_details_pb2.RetryInfo()
    try:
        for detail in status_pb2.Status.FromString(details[0]).details:
            if detail.Unpack(info):
                return max(0.0, info.retry_delay.seconds + info.retry_delay.nanos / 1e9)
    except DecodeError:
        pass  # whose it is, it is no RetryInfo
    return None


def _grpc_credentials(to: Destination) -> grpc.ChannelCredentials | None:
    """What gRPC needs for TLS to this destination; None: it is plain text."""
    if not to.is_secure:
        return None
    import grpc  # noqa: PLC0415  # as above

    return grpc.ssl_channel_credentials(
        root_certificates=_content(to.certificate),
        private_key=_content(to.client_key),
        certificate_chain=_content(to.client_certificate),
    )


def _content(path: str) -> bytes | None:
    return Path(path).read_bytes() if path else None


# -- HTTP ------------------------------------------------------------------------------------------


class _Http:
    def __init__(self, to: Destination) -> None:
        self._signal = to.signal
        self._url = to.endpoint
        self._timeout_s = to.timeout_s
        self._gzip = to.gzip
        self._line = _Line()
        self._session = _http_session(to, self._line)
        self._session.headers["User-Agent"] = USER_AGENT
        self._session.headers.update(to.headers)
        self._session.headers["Content-Type"] = "application/x-protobuf"
        self._session.headers["Accept-Encoding"] = "identity"  # what is bounded is what is kept
        if to.gzip:
            self._session.headers["Content-Encoding"] = "gzip"
        if to.client_certificate:
            self._session.cert = (to.client_certificate, to.client_key)
        if "@" not in urlsplit(to.endpoint).netloc:
            # Else whatever ~/.netrc has for this host would stand instead of the headers.
            self._session.auth = lambda request: request

    def send(self, body: bytes) -> Answer:
        from urllib3.exceptions import HTTPError  # noqa: PLC0415  # as above

        late = threading.Event()
        watch = threading.Timer(self._timeout_s, self._cut_off, (late,))
        watch.daemon = True
        watch.start()
        is_whole = False
        try:
            with self._session.post(
                self._url,
                data=gzip.compress(body) if self._gzip else body,
                timeout=self._timeout_s,
                allow_redirects=False,  # it would arrive as a GET, without the spans
                stream=True,  # an answer is read as far as it can be one
            ) as response:
                status, after = response.status_code, response.headers.get("Retry-After", "")
                answer = response.raw.read(MAX_ANSWER_BYTES + 1, decode_content=True)
                is_whole = len(answer) <= MAX_ANSWER_BYTES
        except (OSError, HTTPError) as error:
            if late.is_set():
                return _late(self._timeout_s)
            return Refused(_reason(error, self._timeout_s))
        finally:
            watch.cancel()
            if not is_whole:
                self._line.cut()  # nothing of it is to come
        if late.is_set():  # a connection that is cut looks like an answer that has ended
            return _late(self._timeout_s)
        if 200 <= status < 300:
            return _read_answer(self._signal, answer)
        return Refused(
            f"HTTP {status} {response.reason or ''}".strip(),
            may_pass=status in _MAY_PASS_HTTP,
            after_s=_retry_after_s(after),
            of_content=status in _OF_CONTENT_HTTP,
        )

    def _cut_off(self, late: threading.Event) -> None:
        late.set()
        self._line.cut()

    def close(self) -> None:
        self._line.end()
        self._session.close()


class _Line:
    """The connection of a session, for another thread to cut.

    What urllib3 and the system know as a time-out is one of each read: who sends a byte now and
    then, in the handshake, the headers or the body, would hold an exchange up for ever.
    """

    def __init__(self) -> None:
        self._held: socket.socket | None = None
        self._has_ended = False
        self._lock = threading.Lock()

    def hold(self, connected: socket.socket) -> None:
        """Keeps a handle of its own, which TLS does not take over; one at a time.

        Raises OSError, with the connection closed, if there is to be none any more.
        """
        with self._lock:
            if self._has_ended:
                connected.close()
                raise OSError(errno.ESHUTDOWN, "the way was closed")
            before, self._held = self._held, connected.dup()
        if before is not None:
            before.close()

    def end(self) -> None:
        """Cuts it, and lets no other follow."""
        with self._lock:
            self._has_ended = True
        self.cut()

    def cut(self) -> None:
        """Ends the connection, whoever waits for something on it. From any thread."""
        with self._lock:
            held, self._held = self._held, None
        if held is not None:
            with contextlib.suppress(OSError):  # the other side may have ended it
                held.shutdown(socket.SHUT_RDWR)
            held.close()


def _late(timeout_s: float) -> Refused:
    return Refused(f"no whole answer within {timeout_s:g} s")


def _reason(error: BaseException, timeout_s: float) -> str:
    """What the system said, below what two libraries have made of it."""
    if "Timeout" in type(error).__name__:
        return f"no answer within {timeout_s:g} s"
    if isinstance(error, ValueError):  # a header, which may be a secret, or the URL
        return f"HTTP does not send it: {type(error).__name__}"
    said = str(error)
    below: BaseException | None = error
    while below is not None:
        if isinstance(below, BadStatusLine) and not isinstance(below, OSError):
            return "its answer is not HTTP/1, as of a port for gRPC"  # and quoted, it is binary
        if isinstance(below, OSError) and below.strerror:
            said = below.strerror
        below = below.__cause__ or below.__context__
    return said or type(error).__name__


def _retry_after_s(header: str) -> float:
    """The header's seconds, or what is left until its date; 0 if it is neither."""
    if header.strip().isdecimal():
        return float(header)
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return 0.0


def _http_session(to: Destination, line: _Line) -> requests.Session:
    """The HTTP client for this destination: proxies are the environment's, trust is not.

    Without it `REQUESTS_CA_BUNDLE` would be over the certificate that was given for the collector.
    `line` holds its connection.
    """
    import requests  # noqa: PLC0415  # as above
    from requests.adapters import HTTPAdapter  # noqa: PLC0415
    from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, ProxyManager  # noqa: PLC0415
    from urllib3.connection import HTTPConnection, HTTPSConnection  # noqa: PLC0415

    class Plain(HTTPConnection):
        def _new_conn(self) -> socket.socket:
            connected = super()._new_conn()
            line.hold(connected)
            return connected

    class Secure(HTTPSConnection):
        def _new_conn(self) -> socket.socket:
            connected = super()._new_conn()
            line.hold(connected)
            return connected

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class SecurePool(HTTPSConnectionPool):
        ConnectionCls = Secure

    pools = {"http": PlainPool, "https": SecurePool}

    class Adapter(HTTPAdapter):
        def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
            super().init_poolmanager(*args, **kwargs)
            self.poolmanager.pool_classes_by_scheme = pools

        def proxy_manager_for(self, proxy: str, **kwargs: Any) -> ProxyManager:
            manager: ProxyManager = super().proxy_manager_for(proxy, **kwargs)
            if not proxy.lower().startswith("socks"):  # which has connections of its own
                manager.pool_classes_by_scheme = pools
            return manager

    class Session(requests.Session):
        def merge_environment_settings(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            settings = super().merge_environment_settings(*args, **kwargs)
            if to.certificate:
                settings["verify"] = to.certificate
            return settings

    session = Session()
    for scheme in pools:
        session.mount(f"{scheme}://", Adapter())
    return session
