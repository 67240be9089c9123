"""OpenTelemetry's own variables, and what comes of them where the configuration says nothing.

How to think about it. The variables are OpenTelemetry's, so their meaning is its specification's,
and the same environment can be given to every service of a system. `[telemetry]` is ours and more
particular: what it says counts, and a variable only where it is silent.

1. A variable that is empty is not set.
2. A wrong number, word or yes-or-no is ignored with a warning, as the specification demands: they
   are `OTEL_SDK_DISABLED`, `OTEL_TRACES_EXPORTER`, `OTEL_METRICS_EXPORTER`, `..._PROTOCOL`,
   `..._COMPRESSION`, `..._TIMEOUT`, `..._INSECURE`, `OTEL_TRACES_SAMPLER` and its `_ARG`,
   `OTEL_METRIC_EXPORT_INTERVAL`; and so is an `OTEL_RESOURCE_ATTRIBUTES` that cannot be read. Any
   other wrong value (an endpoint, headers, a file) keeps the runtime from starting: telemetry that
   goes nowhere is noticed on the day on which it is needed.
3. A signal's own variable (`OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`) is over the general one.
4. Nothing here imports OpenTelemetry.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final, Literal
from urllib.parse import SplitResult, unquote, urlsplit

import msgspec

from amends_runtime.errors import ConfigurationError

__all__ = [
    "Destination",
    "Protocol",
    "Signal",
    "Variables",
    "find_destination",
    "find_exporters",
    "find_ratio",
    "find_resource_attributes",
]

Signal = Literal["traces", "metrics"]
Protocol = Literal["grpc", "http/protobuf"]

TIMEOUT_S: Final = 10.0  # the specification's default
HARDLY_MEANT_MS: Final = 100  # some programs read the same variable as seconds: 10 is such a value
MAX_TIMEOUT_S: Final = 3600.0
DEFAULT_ENDPOINTS: Final = {
    "grpc": "http://localhost:4317",
    "http/protobuf": "http://localhost:4318",
}
PORTS: Final[Mapping[int, Protocol]] = {4317: "grpc", 4318: "http/protobuf"}
"""Where collectors take OTLP, each port one protocol and never the other."""
HEADER_NAMES: Final[Mapping[Protocol, re.Pattern[str]]] = {
    "grpc": re.compile(r"(?!.*-bin$)[0-9a-z_.\-]+", re.IGNORECASE),  # -bin is for what is no text
    "http/protobuf": re.compile(r"[!#$%&'*+\-.^_`|~0-9a-z]+", re.IGNORECASE),
}
ANY_SIGNAL_PATH: Final = re.compile(r"/v1/(traces|metrics)/?$")


class Variables:
    """An environment, read by the specification's rules.

    What it wants said stands in `remarks`, a line each. Call `check` when everything was read.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self.remarks: list[str] = []
        self._faults: list[str] = []

    def check(self) -> None:
        """Raises ConfigurationError with all values that the runtime must not start with."""
        if self._faults:
            raise ConfigurationError("\n".join(dict.fromkeys(self._faults)))

    def text(self, name: str) -> str:
        """Its value, or empty."""
        return self._environment.get(name, "").strip()

    def flag(self, name: str) -> bool | None:
        """Whether it is true; None: it is not set."""
        value = self.text(name).lower()
        if not value:
            return None
        if value not in {"true", "false"}:
            self.remark(f"{name} must be true or false, not {value[:60]!r}: false is assumed")
        return value == "true"

    def number(self, name: str, highest: float) -> float | None:
        """Its value, from 0 to `highest`; None: it is not set, or not such a number."""
        text = self.text(name)
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value <= highest:  # not a number compares with nothing
            self.ignore(name, f"a number from 0 to {highest:g}")
            return None
        return value

    def word(self, name: str, known: Collection[str]) -> str:
        """Its value, if it is one of these; else empty."""
        value = self.text(name).lower()
        if value and value not in known:
            self.ignore(name, " or ".join(sorted(known)))
            return ""
        return value

    def first(self, *names: str) -> str:
        """The first of these that is set; the last if none is."""
        return next((name for name in names if self.text(name)), names[-1])

    def remark(self, what: str) -> None:
        """Something that the operator should know."""
        self.remarks.append(what)

    def ignore(self, name: str, wanted: str) -> None:
        """Remarks that a value is not what it must be, and that it counts as not set."""
        self.remark(f"{name} is ignored: it must be {wanted}, not {self.text(name)[:60]!r}")

    def fault(self, what: str) -> None:
        """Something that the runtime must not start with."""
        self._faults.append(what)


# -- what is sent, and which share of it -----------------------------------------------------------


def find_exporters(variables: Variables, signal: Signal) -> Collection[str] | None:
    """Who is to have this signal, by `OTEL_TRACES_EXPORTER` or `OTEL_METRICS_EXPORTER`.

    Of otlp and prometheus; empty: nobody is; None: nothing is said.
    """
    if variables.flag("OTEL_SDK_DISABLED"):
        return ()
    name = f"OTEL_{signal.upper()}_EXPORTER"
    known = {"otlp", "none"} if signal == "traces" else {"otlp", "prometheus", "none"}
    words = [word.strip().lower() for word in variables.text(name).split(",")]
    words = [word for word in words if word]
    if not words:
        return None
    if not known.issuperset(words):
        variables.ignore(name, " or ".join(sorted(known)))
        return None
    return [word for word in words if word != "none"]


SAMPLERS: Final[Mapping[str, float | None]] = {
    "always_on": 1.0,
    "always_off": 0.0,
    "traceidratio": None,
    "parentbased_always_on": 1.0,
    "parentbased_always_off": 0.0,
    "parentbased_traceidratio": None,
}
"""The share that each keeps; None: its argument says."""


def find_ratio(variables: Variables, traces_ratio: float | None = None) -> float:
    """The share of traces that is kept: `traces_ratio`, or the sampler's, or all.

    Whether a sampler is parent-based makes no difference: a caller whose trace a saga joins has
    decided in any case, because half a trace helps nobody.
    """
    if traces_ratio is not None:
        return traces_ratio
    share = SAMPLERS[variables.word("OTEL_TRACES_SAMPLER", SAMPLERS) or "parentbased_always_on"]
    argument = "OTEL_TRACES_SAMPLER_ARG"
    if share is None:
        share = variables.number(argument, 1.0)
    elif variables.text(argument):
        variables.remark(
            f"{argument} is ignored: it counts only with OTEL_TRACES_SAMPLER=traceidratio or"
            f" parentbased_traceidratio; {share:g} of all traces are kept"
        )
    return 1.0 if share is None else share


def find_resource_attributes(
    variables: Variables, service_name: str | None = None
) -> dict[str, str]:
    """What the variables say of the sender; `service.name` among it, which is `amends` by default.

    `service_name` is over `OTEL_SERVICE_NAME`, and that over `OTEL_RESOURCE_ATTRIBUTES`.
    """
    name = "OTEL_RESOURCE_ATTRIBUTES"
    pairs = _pairs(variables.text(name))
    if pairs is None:
        variables.remark(f"{name} is ignored: it must be key=value,key=value, percent-encoded")
    found = {"service.name": "amends", **(pairs or {})}
    chosen = service_name or variables.text("OTEL_SERVICE_NAME")
    return {**found, "service.name": chosen} if chosen else found


def _pairs(text: str) -> dict[str, str] | None:
    """`key=value,key=value`, percent-encoded; None: it is not that."""
    found: dict[str, str] = {}
    for member in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = member.partition("=")
        try:
            key = unquote(key.strip(), errors="strict")
            value = unquote(value.strip(), errors="strict")
        except UnicodeDecodeError:
            return None
        if not (equals and key):
            return None
        found[key] = value
    return found


# -- where it is sent ------------------------------------------------------------------------------


class Destination(msgspec.Struct, frozen=True, kw_only=True):
    """Where a signal is sent, and how. For `http/protobuf` the endpoint is the signal's whole URL.

    The files are PEM, and were there when they were looked for; empty: none. `str()` is what may be
    shown: no headers, and no user or password.
    """

    signal: Signal
    protocol: Protocol
    endpoint: str
    timeout_s: float = TIMEOUT_S
    gzip: bool = False
    headers: dict[str, str] = {}
    certificate: str = ""
    client_key: str = ""
    client_certificate: str = ""

    @property
    def is_secure(self) -> bool:
        """Whether it is reached by TLS."""
        return self.endpoint.startswith("https://")

    def __str__(self) -> str:
        url = urlsplit(self.endpoint)
        host = url.netloc.rpartition("@")[2]
        return f"{url.scheme}://{host}{url.path.rstrip('/')} ({self.protocol})"


def find_destination(
    variables: Variables,
    signal: Signal,
    *,
    endpoint: str | None = None,
    protocol: Protocol | None = None,
    asked: bool = True,
) -> Destination | None:
    """Where this signal is sent; None: nowhere.

    `endpoint` and `protocol` are the configuration's, an address or the base of all signals' URLs.
    An endpoint in the configuration also counts where `OTEL_SDK_DISABLED` or `OTEL_*_EXPORTER=none`
    are set. `asked` False: the general endpoint is for other signals, and only an exporter `otlp`
    or an endpoint of its own asks for this one.
    """
    chosen = find_exporters(variables, signal)
    own = f"OTEL_EXPORTER_OTLP_{signal.upper()}_"
    how: Protocol = protocol or _protocol(variables, own)
    base = ""
    configured = False
    if endpoint is not None and (asked or (chosen and "otlp" in chosen)):
        if chosen is not None and "otlp" not in chosen:
            variables.remark(f"{signal} are sent: [telemetry] is over OpenTelemetry's variables")
        name, configured = "the OTLP endpoint", True
        base = endpoint if how == "grpc" else ANY_SIGNAL_PATH.sub("", endpoint)
    elif chosen is not None and "otlp" not in chosen:
        return None
    elif variables.text(f"{own}ENDPOINT"):
        name = f"{own}ENDPOINT"
    elif variables.text("OTEL_EXPORTER_OTLP_ENDPOINT") and (asked or chosen):
        name = "OTEL_EXPORTER_OTLP_ENDPOINT"
        base = variables.text(name)
    elif chosen:
        name, base = f"OTEL_{signal.upper()}_EXPORTER", DEFAULT_ENDPOINTS[how]
    else:
        return None
    certificate = _file(variables, own, "CERTIFICATE")
    client_key = _file(variables, own, "CLIENT_KEY")
    client_certificate = _file(variables, own, "CLIENT_CERTIFICATE")
    if bool(client_key) != bool(client_certificate):
        variables.fault(
            "OTEL_EXPORTER_OTLP_CLIENT_KEY and OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE go together:"
            " set both or neither"
        )
    url = _url(variables, name, base or variables.text(name), own, certificate)
    if url is None:
        return None  # a fault, which `check` raises
    if PORTS.get(url.port or 0, how) != how:
        variables.remark(
            f"{name} has port {url.port}, where collectors expect {PORTS[url.port or 0]}, and the"
            f" protocol is {how}: set OTEL_EXPORTER_OTLP_PROTOCOL or [telemetry] otlp_protocol"
        )
    path = url.path
    if how == "grpc":
        if configured and path.strip("/"):  # a variable's is ignored, as its specification has it
            variables.fault(
                f"{name}: gRPC knows no path such as {path[:60]!r}: leave it out, or choose the"
                " protocol http/protobuf"
            )
        if "@" in url.netloc:
            variables.fault(
                f"{name}: gRPC knows no user in an address: use OTEL_EXPORTER_OTLP_HEADERS"
            )
        if url.port is None:  # gRPC's own default is TLS's, for plain text, too
            url = url._replace(netloc=f"{url.netloc}:{443 if url.scheme == 'https' else 80}")
        path = ""
    elif base:
        path = f"{path.rstrip('/')}/v1/{signal}"
    return Destination(
        signal=signal,
        protocol=how,
        endpoint=url._replace(path=path, fragment="").geturl(),
        timeout_s=_timeout_s(variables, own),
        gzip=_compression(variables, own) == "gzip",
        headers=_headers(variables, own, how),
        certificate=certificate,
        client_key=client_key,
        client_certificate=client_certificate,
    )


def _protocol(variables: Variables, own: str) -> Protocol:
    name = variables.first(f"{own}PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    word = variables.word(name, ("grpc", "http/protobuf"))
    return "http/protobuf" if word == "http/protobuf" else "grpc"


def _url(
    variables: Variables, name: str, text: str, own: str, certificate: str
) -> SplitResult | None:
    """The endpoint as a URL. One without a scheme is plain text, unless something speaks of TLS."""
    if "://" not in text:
        insecure = variables.flag(variables.first(f"{own}INSECURE", "OTEL_EXPORTER_OTLP_INSECURE"))
        is_plain = not certificate if insecure is None else insecure
        text = f"{'http' if is_plain else 'https'}://{text}"
    try:
        url = urlsplit(text)
        port = url.port
    except ValueError:
        url, port = urlsplit(""), None
    if url.scheme not in {"http", "https"} or not url.hostname or port == 0 or url.query:
        variables.fault(
            f"{name}: must be host:port, or a URL such as http://127.0.0.1:4317 or"
            " https://collector.example:4318"
        )
        return None
    return url


def _timeout_s(variables: Variables, own: str) -> float:
    name = variables.first(f"{own}TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT")
    value_ms = variables.number(name, MAX_TIMEOUT_S * 1000)
    if not value_ms:  # 0, too, which leaves no time for anything
        return TIMEOUT_S
    if value_ms < HARDLY_MEANT_MS:
        variables.remark(f"{name} is in milliseconds: {value_ms:g} is a very short time")
    return value_ms / 1000


def _compression(variables: Variables, own: str) -> str:
    name = variables.first(f"{own}COMPRESSION", "OTEL_EXPORTER_OTLP_COMPRESSION")
    return variables.word(name, ("gzip", "none"))


def _headers(variables: Variables, own: str, how: Protocol) -> dict[str, str]:
    name = variables.first(f"{own}HEADERS", "OTEL_EXPORTER_OTLP_HEADERS")
    found = _pairs(variables.text(name))
    # Neither the pairs nor what is wrong with them is shown: it is where keys and passwords are.
    if found is None or not all(
        value.isprintable() and value.isascii() for value in found.values()
    ):
        variables.fault(f"{name}: must be name=value,name=value, percent-encoded")
        return {}
    if any(value != value.strip() for value in found.values()):
        variables.fault(f"{name}: a value must not begin or end with a space, nor with %20")
        return {}
    if not all(HEADER_NAMES[how].fullmatch(key) for key in found):
        what = "letters, digits, _ . and -, not ending in -bin" if how == "grpc" else "a header's"
        variables.fault(f"{name}: has a name that cannot be sent by {how}: it must be {what}")
        return {}
    return {key.lower(): value for key, value in found.items()}


def _file(variables: Variables, own: str, what: str) -> str:
    name = variables.first(f"{own}{what}", f"OTEL_EXPORTER_OTLP_{what}")
    path = variables.text(name)
    if not path:
        return ""
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "is no path"
        variables.fault(f"{name}: {path[:60]!r} cannot be read: {why}")
        return ""
    if b"-----BEGIN " not in content:
        variables.fault(f"{name}: {path[:60]!r} is not a PEM file")
        return ""
    return path
