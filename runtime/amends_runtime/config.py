"""What a runtime is told at its start: where it listens, who its participants are, every limit.

How to think about it. A configuration is four layers, and the upper one wins, key by key:

    flags            of `amends serve`
    environment      AMENDS_SECTION__KEY, for example AMENDS_SERVER__LISTEN
    file             TOML, the one that --config or AMENDS_CONFIG names
    defaults         in this module

1. What comes out is `Config`: plain, frozen, whole. Nothing reads the environment or a file later,
   and `Config()` in a test is the defaults, whatever the environment of the test says.
2. Everything that is wrong is said at once, one line each: which file, variable or flag, which
   key, what to write instead. A key that nobody knows is an error: it is one that does nothing.
3. Durations are in seconds (`*_s`), sizes in bytes. A relative path in a file starts at the file's
   own folder; in a flag or a variable at the current one.

docs/configuration.md is made from the docstrings below; each says why its default is what it is.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, EnvSettingsSource, NoDecode, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError

from amends_runtime.core.addresses import (
    HOST,
    check_address,
    check_collector,
    check_http_listen,
    check_participant_name,
)
from amends_runtime.errors import ConfigurationError
from amends_runtime.tls import (
    ParticipantTls,
    ServerTls,
    TlsFault,
    read_participant_tls,
    read_server_tls,
)

__all__ = [
    "Breaker",
    "CallerTrace",
    "Config",
    "Flags",
    "Limits",
    "LogFormat",
    "LogLevel",
    "OtlpProtocol",
    "Participant",
    "Server",
    "Telemetry",
    "Tls",
    "load",
    "read_tls",
]

ENVIRONMENT_PREFIX: Final = "AMENDS_"
CONFIG_VARIABLE: Final = "AMENDS_CONFIG"

MAX_SERVICE_NAME: Final = 255
MAX_SHOWN: Final = 60  # of a wrong value in an error line: enough to recognise it

CallerTrace = Literal["join", "link"]
OtlpProtocol = Literal["grpc", "http/protobuf"]
LogFormat = Literal["auto", "console", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]


# -- values ----------------------------------------------------------------------------------------


def _listen_address(text: str) -> str:
    return check_address(text, lowest_port=0)


def _not_a_bool(value: object) -> object:
    # Python's bool is an int, so `mailbox = true` would quietly mean 1.
    if isinstance(value, bool):
        raise ValueError(f"must be a number, not {str(value).lower()}")  # noqa: TRY004  # pydantic's rule
    return value


def _split_path_list(value: object) -> object:
    # A variable holds a list as PATH does; in TOML a single string is as clear as a list of one.
    if isinstance(value, str):
        return [part for part in value.split(os.pathsep) if part]
    return value


def _no_zero_byte(value: str) -> str:
    if not value or "\0" in value:
        raise ValueError("must be the path of a file")
    return value


def _service_name(name: str) -> str:
    if not (0 < len(name) <= MAX_SERVICE_NAME and name.isprintable()):
        raise ValueError(
            f"must be 1 to {MAX_SERVICE_NAME} printable characters, not {_shown(name)}"
        )
    return name


def _tls_server_name(name: str) -> str:
    if not HOST.fullmatch(name):
        raise ValueError(
            f"must be a host's name without a port, such as payments.example, not {_shown(name)}"
        )
    return name


ParticipantName = Annotated[str, AfterValidator(check_participant_name)]
ListenAddress = Annotated[str, AfterValidator(_listen_address)]
MetricsAddress = Annotated[str, AfterValidator(check_http_listen)]
ParticipantAddress = Annotated[str, AfterValidator(check_address)]
FilePath = Annotated[str, AfterValidator(_no_zero_byte)]
OtlpEndpoint = Annotated[str, AfterValidator(check_collector)]
ServiceName = Annotated[str, AfterValidator(_service_name)]
TlsServerName = Annotated[str, AfterValidator(_tls_server_name)]
Count = Annotated[int, BeforeValidator(_not_a_bool)]
Ratio = Annotated[float, BeforeValidator(_not_a_bool), Field(ge=0, le=1, allow_inf_nan=False)]
Seconds = Annotated[float, BeforeValidator(_not_a_bool), Field(allow_inf_nan=False)]

MIB: Final = 1024 * 1024


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


# -- the configuration -----------------------------------------------------------------------------


class Server(_Section):
    """Where the runtime is reached, and where it keeps what it promised."""

    listen: ListenAddress = "127.0.0.1:7233"
    """`host:port` or `unix:path` for clients and operators; port 0 takes a free one. Only this
    machine by default, because whoever reaches the port can start and cancel sagas."""

    tls_cert: FilePath | None = None
    """The server's certificate, PEM, followed by those between it and its authority; with
    `tls_key`. Every connection is then encrypted, and plain text is refused. See [tls.md](tls.md).
    """

    tls_key: FilePath | None = None
    """Its private key, PEM, not encrypted. Only the runtime's user should be able to read it."""

    tls_client_ca: FilePath | None = None
    """Certificates of authorities, PEM. Every client must then show a certificate that one of them
    has signed, for health checks and reflection too. Whoever has one may do everything, so use
    authorities that sign for nobody else."""

    insecure: bool = False
    """Whether `listen` may be an address that other machines reach although clients need no
    certificate: without `tls_client_ca` whoever reaches it is an operator, and encryption alone
    does not change that. Say true only where the network, or a proxy, lets nobody else in."""

    database: FilePath = "amends.db"
    """The SQLite file with every saga; made if it is missing, its folder is not. On a local disk:
    locks and syncs of network file systems cannot be relied on."""


class Participant(_Section):
    """One participant. The section's name is the name that definitions use."""

    address: ParticipantAddress
    """`host:port` or `unix:path`. Addresses stand here and never in a definition or a request: a
    caller who could name addresses could make the runtime call any of them."""

    tls_ca: FilePath | None = None
    """Certificates of authorities, PEM. The participant is then reached with TLS, never in plain
    text, and its certificate must be signed by one of them and be for the host of its address;
    wherever an operator moves it. See [tls.md](tls.md)."""

    tls_cert: FilePath | None = None
    """The runtime's own certificate, PEM, with `tls_key`: for a participant that asks for one."""

    tls_key: FilePath | None = None
    """Its private key, PEM, not encrypted. Only the runtime's user should be able to read it."""

    tls_server_name: TlsServerName | None = None
    """The name that the participant's certificate must have, where it is not the address's host,
    such as an IP address behind which another name is meant. Leave it out wherever you can."""

    concurrency: Count | None = Field(default=None, ge=1, le=100_000)
    """Calls under way at the same time; further ones wait in the participant's lane. Without it, as
    many as the participant announces on its stream, and 256 by the unary verbs: enough to keep one
    HTTP/2 connection busy without burying a small service."""

    transport: Literal["auto", "unary"] = "auto"
    """How it is called. `auto`: in batches over one stream where the participant has it
    (Exchange), else by the unary verbs. `unary`: by those alone, for a proxy in between that ends
    long streams or balances single calls."""


class Limits(_Section):
    """How much of anything there may be at once. Nothing in the process grows without a bound."""

    payload_bytes: Count = Field(default=MIB, ge=1, le=3 * MIB)
    """An input or a result. 1 MiB, so that a saga's history stays readable and a commit short;
    store larger data elsewhere and pass a reference. The SDK sends no more than 1 MiB in any case,
    and all payloads of a saga together are 3 MiB at most, which fits into gRPC's usual message."""

    live_sagas: Count = Field(default=100_000, ge=1, le=10_000_000)
    """Sagas under way at the same time: with a call that is made or waits for its participant.
    Further starts are refused with RESOURCE_EXHAUSTED and a time to retry after. A live saga costs
    a few kilobytes and its payloads; one that only waits for an instant or a person leaves memory
    and does not count. Sagas that exist still come in when they are due, up to a quarter above it,
    those that compensate first: one participant's outage must not hold up all others."""

    park_after_s: Seconds = Field(default=10.0, ge=0, le=86_400)
    """A saga that has nothing to do for at least so long leaves memory, and is read again when its
    time has come. Reading it costs a fraction of a millisecond, which is not worth it for a wait of
    few seconds."""

    mailbox: Count = Field(default=1024, ge=16, le=1_000_000)
    """Messages that wait for one saga. Replies and timers always find room, so that a flood of
    requests for a saga cannot hold up its progress."""

    commit_batch: Count = Field(default=512, ge=1, le=10_000)
    """Turns in one commit. More turns share one sync of the disk; beyond some hundred the commit
    itself gets long and everyone in it waits."""

    commit_queue: Count = Field(default=4096, ge=1, le=1_000_000)
    """Turns that wait to be committed; while there are so many, starts are refused with
    RESOURCE_EXHAUSTED and a time to retry after. Some commits' worth: beyond that a caller is
    better told than kept waiting."""


class Breaker(_Section):
    """When a participant that does not answer is left alone, and for how long."""

    failures_to_open: Count = Field(default=5, ge=1, le=10_000)
    """Failures running until calls wait. One slow call or one lost connection is not an outage."""

    open_s: Seconds = Field(default=1.0, gt=0, le=3600)
    """Seconds until the first probe. Short, because most outages are restarts."""

    max_open_s: Seconds = Field(default=30.0, gt=0, le=86_400)
    """The wait doubles with each failed probe up to this. A participant that is back is noticed
    within that time."""

    @model_validator(mode="after")
    def _fit_together(self) -> Breaker:
        if self.open_s > self.max_open_s:
            raise ValueError(
                f"open_s ({self.open_s:g}) must not be more than max_open_s ({self.max_open_s:g})"
            )
        return self


class Telemetry(_Section):
    """What the runtime tells collectors: traces of sagas, and metrics.

    See [observing.md](observing.md). Where nothing stands here, OpenTelemetry's variables count:
    `OTEL_SDK_DISABLED`, `OTEL_TRACES_EXPORTER`, `OTEL_METRICS_EXPORTER`; those that begin with
    `OTEL_EXPORTER_OTLP_` or `OTEL_EXPORTER_OTLP_TRACES_` and end with `ENDPOINT`, `PROTOCOL`,
    `HEADERS`, `TIMEOUT` (milliseconds), `COMPRESSION`, `INSECURE`, `CERTIFICATE`, `CLIENT_KEY` or
    `CLIENT_CERTIFICATE`, and the same for `METRICS`; `OTEL_TRACES_SAMPLER` and its `_ARG`,
    `OTEL_METRIC_EXPORT_INTERVAL`, `OTEL_EXPORTER_PROMETHEUS_HOST` and `_PORT`, `OTEL_SERVICE_NAME`,
    `OTEL_RESOURCE_ATTRIBUTES`. As their specification has it, a wrong number or word in one is
    ignored, and a yes-or-no other than true and false is false, each with a warning; a wrong
    endpoint, header or file keeps the runtime from starting.
    """

    otlp_endpoint: OtlpEndpoint | None = None
    """Where traces are sent: `host:port` (plain text), or a URL such as `https://collector:4317`,
    without the path of a signal. Only an `https` URL may leave the port out. Without an endpoint,
    and without OpenTelemetry's variables, nothing is sent anywhere. Sagas never wait for it: while
    it is away spans wait, and are dropped when too many do."""

    otlp_protocol: OtlpProtocol | None = None
    """`grpc`, which collectors take at port 4317, or `http/protobuf`, at 4318. Default `grpc`."""

    otlp_metrics: bool = False
    """Whether metrics are sent there, too. Not by default, because Jaeger takes none."""

    traces_ratio: Ratio | None = None
    """The share of sagas whose trace is kept, from 0 to 1; default 1. A caller whose trace a saga
    joins has decided for it. What tracing every saga costs stands in
    [performance.md](performance.md); under heavy load 0.01 shows enough, and
    `amends trace export` any other saga."""

    caller_trace: CallerTrace = "join"
    """`join` puts a saga into the trace of whoever started it; `link` gives it a trace of its own
    that links there, for callers whose own traces are long or sampled in their own way."""

    metrics_listen: MetricsAddress | None = None
    """`host:port` of an HTTP endpoint for Prometheus, at `/metrics`; 9464 is the usual port, 0
    takes a free one. It shows names of definitions, steps and participants, and counts, to
    everybody who reaches it. Without one there is none."""

    service_name: ServiceName | None = None
    """What the runtime is called in traces and metrics; default `amends`."""


class Config(_Section):
    """A runtime's whole configuration. Made by `load`, or by hand: `Config(server=Server(...))`."""

    server: Server = Server()
    participants: dict[ParticipantName, Participant] = {}
    definitions: Annotated[tuple[FilePath, ...], NoDecode, BeforeValidator(_split_path_list)] = ()
    """Definition files that are registered at start, by path or pattern, such as
    `"definitions/*.toml"`. Registering the same content again changes nothing."""

    limits: Limits = Limits()
    breaker: Breaker = Breaker()
    telemetry: Telemetry = Telemetry()
    log_format: LogFormat = "auto"
    """`console` for people, `json` for programs (one object a line), `auto` for console on a
    terminal and JSON elsewhere. Logs go to standard error."""

    log_level: LogLevel = "info"
    """The least that is logged: debug, info, warning or error. At debug each saga's start and end,
    and every attempt, has a line, which costs throughput."""


# -- loading ---------------------------------------------------------------------------------------


class Flags(_Section):
    """What `amends serve` was told on its command line; None and empty mean "not said"."""

    listen: str | None = None
    insecure: bool | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_client_ca: str | None = None
    database: str | None = None
    participants: dict[str, str] = {}
    definitions: tuple[str, ...] = ()
    otlp: str | None = None
    metrics_listen: str | None = None
    log_format: str | None = None
    log_level: str | None = None


def load(config_file: str | Path | None = None, flags: Flags | None = None) -> Config:
    """The configuration that flags, environment and file make together.

    `config_file` None means the file that AMENDS_CONFIG names, if any. The TLS files that it names
    are looked at, too. Raises ConfigurationError, whose message has one line per problem.
    """
    if config_file is None:
        config_file = os.environ.get(CONFIG_VARIABLE) or None
    misspelt = list(_misspelt_variables(os.environ))
    layers = _Layers(
        file_name=str(config_file or ""),
        file={} if config_file is None else _read_file(Path(config_file)),
        environment=_read_environment(),
        flags=_from_flags(flags or Flags()),
    )
    merged = layers.merged()
    config = None
    lines = misspelt
    try:
        config = Config.model_validate(merged)
    except ValidationError as invalid:
        lines += [layers.explain(error) for error in invalid.errors(include_url=False)]
    _, faults = _read_tls(merged)
    lines += [f"{layers.place(path)}: {what}" for path, what in faults]
    if lines or config is None:
        raise ConfigurationError("\n".join(dict.fromkeys(lines)))
    return config


class Tls(NamedTuple):
    """The contents of all TLS files of a configuration; None and absent: plain text."""

    server: ServerTls | None
    participants: dict[str, ParticipantTls]

    @property
    def remarks(self) -> list[str]:
        """What an operator should know of the files' dates, a line each."""
        read: list[ServerTls | ParticipantTls] = [*self.participants.values()]
        if self.server is not None:
            read.insert(0, self.server)
        return list(dict.fromkeys(remark for each in read for remark in each.remarks))


def read_tls(config: Config) -> Tls:
    """Reads the TLS files that the configuration names, as they are now.

    Raises ConfigurationError, whose message has one line per problem.
    """
    tls, faults = _read_tls(config.model_dump())
    if faults:
        raise ConfigurationError("\n".join(f"{'.'.join(path)}: {what}" for path, what in faults))
    return tls


def _read_tls(table: Mapping[str, Any]) -> tuple[Tls, list[tuple[tuple[str, ...], str]]]:
    """The files, and what is wrong with them, by path. The table need not be valid."""
    faults: list[tuple[tuple[str, ...], str]] = []

    def found(path: tuple[str, ...], wrong: Iterable[TlsFault]) -> None:
        faults.extend(((*path, fault.key), fault.what) for fault in wrong)

    section = _texts(table.get("server"))
    server, wrong = read_server_tls(
        listen=section.get("listen", ""),
        cert=section.get("tls_cert", ""),
        key=section.get("tls_key", ""),
        client_ca=section.get("tls_client_ca", ""),
    )
    found(("server",), wrong)
    participants: dict[str, ParticipantTls] = {}
    sections = table.get("participants")
    for name, each in sections.items() if isinstance(sections, dict) else ():
        section = _texts(each)
        participant, wrong = read_participant_tls(
            address=section.get("address", ""),
            ca=section.get("tls_ca", ""),
            cert=section.get("tls_cert", ""),
            key=section.get("tls_key", ""),
            server_name=section.get("tls_server_name", ""),
        )
        found(("participants", name), wrong)
        if participant is not None:
            participants[name] = participant
    return Tls(server, participants), faults


def _texts(section: object) -> dict[str, str]:
    # Only what has the right type: validation speaks about the rest.
    if not isinstance(section, dict):
        return {}
    return {
        key: value for key, value in section.items() if isinstance(value, str) and "\0" not in value
    }


def _read_file(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ConfigurationError(
            f"{path}: there is no such file; check --config (or {CONFIG_VARIABLE})"
        ) from None
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        table = tomllib.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"{path}: is not TOML: byte {error.start} is not UTF-8; save the file as UTF-8"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path}: is not TOML: {error}") from None
    except RecursionError:
        raise ConfigurationError(f"{path}: is nested too deeply to be a configuration") from None
    _anchor_paths(table, path.parent)
    return table


def _anchor_paths(table: dict[str, Any], folder: Path) -> None:
    # Only what has the right type: validation speaks about the rest.
    def anchored(value: object) -> object:
        if not isinstance(value, str) or not value:
            return value
        if value.startswith("unix:"):
            path = value.removeprefix("unix:")
            return f"unix:{folder / path}" if path else value
        return str(folder / value)

    def anchor_address(section: object, key: str) -> None:
        if isinstance(section, dict):
            address = section.get(key)
            if isinstance(address, str) and address.startswith("unix:"):
                section[key] = anchored(address)

    def anchor_files(section: object, *keys: str) -> None:
        if isinstance(section, dict):
            for key in keys:
                if key in section:
                    section[key] = anchored(section[key])

    server = table.get("server")
    anchor_address(server, "listen")
    anchor_files(server, "database", "tls_cert", "tls_key", "tls_client_ca")
    participants = table.get("participants")
    if isinstance(participants, dict):
        for participant in participants.values():
            anchor_address(participant, "address")
            anchor_files(participant, "tls_ca", "tls_cert", "tls_key")
    definitions = table.get("definitions")
    if isinstance(definitions, str):
        definitions = [definitions]
    if isinstance(definitions, list):
        table["definitions"] = [anchored(pattern) for pattern in definitions]


class _Environment(Config, BaseSettings):
    # Only asked for its environment source; `Config` itself must not read anything.
    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX,
        env_nested_delimiter="__",
        env_ignore_empty=True,  # a container's way of leaving a variable unset
        frozen=True,
        extra="forbid",
    )


def _read_environment() -> dict[str, Any]:
    try:
        return EnvSettingsSource(_Environment)()
    except SettingsError as error:
        # Its message names the field only; the variables that hold JSON are few.
        raise ConfigurationError(
            f"the environment: {error}: a variable for a whole section must hold JSON, and "
            f"{ENVIRONMENT_PREFIX}SECTION__KEY sets a single key"
        ) from None


def _misspelt_variables(environment: Iterable[str]) -> Iterator[str]:
    """Lines for variables that were surely meant for us, since they would silently do nothing.

    Not every AMENDS_* is ours: an orchestrator that runs a service of that name adds such as
    AMENDS_SERVICE_HOST by itself. One that differs from a key only in its underscores, or has a
    double one, is.
    """
    known = {"".join(path).replace("_", ""): path for path in _known_paths()}
    sections = set(Config.model_fields)
    for name in sorted(environment):
        if not name.startswith(ENVIRONMENT_PREFIX):
            continue
        parts = name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
        if parts[0] in sections:
            continue  # what is below is validated like the file
        path = known.get("".join(parts).replace("_", ""))
        if path is not None:
            yield f"{name}: there is no such variable; did you mean {_variable(path)}?"
        elif len(parts) > 1:
            close = _did_you_mean(parts[0], sections)
            hint = close and f"; did you mean {ENVIRONMENT_PREFIX}{close.upper()}__…?"
            yield f"{name}: there is no section {parts[0]}{hint or _known_list(sections)}"


def _known_paths() -> Iterator[tuple[str, ...]]:
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, _Section):
            yield from ((name, key) for key in field.annotation.model_fields)
        else:
            yield (name,)


def _from_flags(flags: Flags) -> dict[str, Any]:
    server = {
        "listen": flags.listen,
        "insecure": flags.insecure,
        "tls_cert": flags.tls_cert,
        "tls_key": flags.tls_key,
        "tls_client_ca": flags.tls_client_ca,
        "database": flags.database,
    }
    telemetry = {"otlp_endpoint": flags.otlp, "metrics_listen": flags.metrics_listen}
    values = {
        "server": {key: value for key, value in server.items() if value is not None},
        "participants": {name: {"address": at} for name, at in flags.participants.items()},
        "telemetry": {key: value for key, value in telemetry.items() if value is not None},
        "definitions": list(flags.definitions),
        "log_format": flags.log_format,
        "log_level": flags.log_level,
    }
    return {key: value for key, value in values.items() if value not in (None, {}, [])}


# -- layers and their errors -----------------------------------------------------------------------

FLAGS: Final[Mapping[str, str]] = {
    "server.listen": "--listen",
    "server.insecure": "--insecure",
    "server.tls_cert": "--tls-cert",
    "server.tls_key": "--tls-key",
    "server.tls_client_ca": "--tls-client-ca",
    "server.database": "--database",
    "participants": "--participant",
    "definitions": "--definition",
    "telemetry.otlp_endpoint": "--otlp",
    "telemetry.metrics_listen": "--metrics-listen",
    "log_format": "--log-format",
    "log_level": "--log-level",
}


class _Layers:
    """The layers, and for each key the one that a value of it came from."""

    def __init__(
        self,
        file_name: str,
        file: dict[str, Any],
        environment: dict[str, Any],
        flags: dict[str, Any],
    ) -> None:
        self.file_name = file_name
        self.file = file
        self.environment = environment
        self.flags = flags

    def merged(self) -> dict[str, Any]:
        """One table; definitions of flags are added to the others, as participants are."""
        lower = _over(self.environment, self.file)
        merged = _over(self.flags, lower)
        before, added = lower.get("definitions"), self.flags.get("definitions")
        if before and added:
            before = _split_path_list(before)
            merged["definitions"] = [*before, *added] if isinstance(before, list) else before
        return merged

    def explain(self, error: ErrorDetails) -> str:
        """One line: where it stands, what is wrong, what to write instead."""
        path = tuple(str(part) for part in error["loc"] if part != "[key]")
        if error["type"] == "missing":
            # Whoever began the section is asked for the rest of it.
            return f"{self.place(path[:-1])}: {path[-1]} is missing{_example(path)}"
        what = _what(error, path)
        if not path:
            return f"{self.file_name or 'the configuration'}: {what}"
        return f"{self.place(path)}: {what}"

    def place(self, path: Sequence[str]) -> str:
        """Where a key's value stands: the flag, the variable, or the file and its key."""
        if _reaches(self.flags, path):
            dotted = ".".join(path)
            flag = next((FLAGS[key] for key in FLAGS if dotted.startswith(key)), dotted)
            return f"{flag} {path[1]}" if path[0] == "participants" and len(path) > 1 else flag
        if _reaches(self.environment, path):
            return _variable(path)
        dotted = _dotted(path)
        return f"{self.file_name}: {dotted}" if self.file_name else dotted


def _over(upper: Mapping[str, Any], lower: Mapping[str, Any]) -> dict[str, Any]:
    """`lower` with `upper` laid over it, table by table."""
    merged = dict(lower)
    for key, value in upper.items():
        below = merged.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            merged[key] = _over(value, below)
        else:
            merged[key] = value
    return merged


def _dotted(path: Sequence[str]) -> str:
    return ".".join(path).replace(".", "[", 1) + "]" if path[-1].isdigit() else ".".join(path)


def _reaches(layer: object, path: Sequence[str]) -> bool:
    for part in path:
        if isinstance(layer, list):
            return True
        if not isinstance(layer, dict) or part not in layer:
            return False
        layer = layer[part]
    return True


def _variable(path: Sequence[str]) -> str:
    return ENVIRONMENT_PREFIX + "__".join(part for part in path if not part.isdigit()).upper()


def _what(error: ErrorDetails, path: Sequence[str]) -> str:
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    match kind:
        case "extra_forbidden":
            return "there is no such key" + _mend_of_unknown(path)
        case "value_error":
            return str(context["error"])
        case "greater_than_equal":
            return f"must be at least {context['ge']:g}, not {_shown(value)}"
        case "greater_than":
            return f"must be more than {context['gt']:g}, not {_shown(value)}"
        case "less_than_equal":
            return f"must be at most {context['le']:g}, not {_shown(value)}"
        case "finite_number":
            return f"must be a finite number, not {_shown(value)}"
        case "literal_error":
            close = _did_you_mean(str(value).lower(), re.findall(r"'(\w+)'", context["expected"]))
            hint = f"; did you mean {close}?" if close else ""
            return f"must be {context['expected'].replace(chr(39), '')}, not {_shown(value)}{hint}"
        case "model_type" | "dict_type" | "model_attributes_type":
            return (
                f"must be a table: write [{'.'.join(path)}] and its keys below, not {_shown(value)}"
            )
        case "list_type" | "tuple_type":
            return f'must be a list, for example ["definitions/*.toml"], not {_shown(value)}'
        case _:
            pass
    wanted = kind.partition("_")[0]
    noun = {
        "int": "a whole number",
        "float": "a number",
        "string": "a text in quotes",
        "bool": "true or false",
    }.get(wanted)
    return f"must be {noun}, not {_shown(value)}" if noun else error["msg"]


def _mend_of_unknown(path: Sequence[str]) -> str:
    *parents, key = path
    keys = _keys_at(parents)
    close = _did_you_mean(key, keys)
    if close:
        return f"; did you mean {close}?"
    for known in _known_paths():
        if known[-1] == key and known != tuple(path):
            at = f"[{known[0]}]" if len(known) > 1 else "the top of the file, above all sections"
            return f"; {key} belongs in {at}"
    return _known_list(keys)


def _known_list(keys: Iterable[str]) -> str:
    return f"; there are {', '.join(sorted(keys))}"


def _keys_at(parents: Sequence[str]) -> list[str]:
    if not parents:
        return list(Config.model_fields)
    if parents[0] == "participants":
        return list(Participant.model_fields)
    section = Config.model_fields[parents[0]].annotation
    return (
        list(section.model_fields)
        if isinstance(section, type) and issubclass(section, _Section)
        else []
    )


def _example(path: Sequence[str]) -> str:
    if path[0] == "participants" and path[-1] == "address":
        return f'; write [participants.{path[1]}] address = "host:port"'
    return ""


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word.replace("-", "_"), list(known), n=1, cutoff=0.6)
    return close[0] if close else ""


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    text = text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"
    return repr(text) if isinstance(value, str) else text
