"""The configuration: four layers, and one clear line for whatever is wrong with them."""

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from amends_runtime.config import Config, Flags, Limits, Participant, Server, load, read_tls
from amends_runtime.errors import ConfigurationError
from tests.certificates import Authority


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever AMENDS_* the machine has, a test starts without it."""
    for name in [name for name in os.environ if name.startswith("AMENDS_")]:
        monkeypatch.delenv(name)


def problems(
    folder: Path, text: str = "", flags: Flags | None = None, name: str = "amends.toml"
) -> list[str]:
    """What `load` says of a file, a line each, without the folder's name."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigurationError) as refused:
        load(path, flags)
    return str(refused.value).replace(f"{folder}{os.sep}", "").splitlines()


def configured(folder: Path, text: str, flags: Flags | None = None) -> Config:
    """Load a file of this text."""
    path = folder / "amends.toml"
    path.write_text(text, encoding="utf-8")
    return load(path, flags)


# -- layers ----------------------------------------------------------------------------------------


def test_the_defaults_are_a_whole_configuration() -> None:
    """Without file, environment and flags everything has its documented default."""
    config = load()
    assert config == Config()
    assert config.server == Server(listen="127.0.0.1:7233", database="amends.db")
    assert config.participants == {}
    assert config.definitions == ()
    assert config.limits == Limits(
        payload_bytes=1024 * 1024,
        live_sagas=100_000,
        mailbox=1024,
        commit_batch=512,
        commit_queue=4096,
    )
    assert (config.log_format, config.log_level) == ("auto", "info")


def test_a_file_is_read(tmp_path: Path) -> None:
    """Every section of a file arrives in the configuration."""
    config = configured(
        tmp_path,
        """
        log_level = "debug"
        definitions = ["/srv/definitions/*.toml"]

        [server]
        listen = "0.0.0.0:7000"
        database = "/var/lib/amends/amends.db"

        [participants.payments]
        address = "127.0.0.1:7001"

        [participants.inventory]
        address = "unix:/run/inventory.sock"
        concurrency = 8

        [limits]
        live_sagas = 10

        [breaker]
        open_s = 0.5
        """,
    )
    assert config.server == Server(listen="0.0.0.0:7000", database="/var/lib/amends/amends.db")
    assert config.participants == {
        "payments": Participant(address="127.0.0.1:7001"),
        "inventory": Participant(address="unix:/run/inventory.sock", concurrency=8),
    }
    assert config.definitions == ("/srv/definitions/*.toml",)
    assert config.limits.live_sagas == 10
    assert config.breaker.open_s == 0.5
    assert config.log_level == "debug"


def test_flags_go_over_environment_over_file_over_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The upper layer wins key by key; keys that it does not name stay."""
    monkeypatch.setenv("AMENDS_LIMITS__MAILBOX", "200")
    monkeypatch.setenv("AMENDS_LIMITS__LIVE_SAGAS", "20")
    monkeypatch.setenv("AMENDS_SERVER__LISTEN", "127.0.0.1:2")
    config = configured(
        tmp_path,
        """
        [server]
        listen = "127.0.0.1:1"
        database = "/data/file.db"
        [limits]
        mailbox = 100
        commit_batch = 10
        """,
        Flags(listen="127.0.0.1:3"),
    )
    assert config.server == Server(listen="127.0.0.1:3", database="/data/file.db")
    assert config.limits.mailbox == 200
    assert config.limits.live_sagas == 20
    assert config.limits.commit_batch == 10
    assert config.limits.commit_queue == 4096


def test_flags_add_participants_and_definitions(tmp_path: Path) -> None:
    """A participant or definition on the command line comes on top of those of the file."""
    config = configured(
        tmp_path,
        """
        definitions = ["/a.toml"]
        [participants.payments]
        address = "127.0.0.1:7001"
        concurrency = 3
        [participants.shipping]
        address = "127.0.0.1:7002"
        """,
        Flags(participants={"payments": "127.0.0.1:9", "new": "[::1]:8"}, definitions=("b.json",)),
    )
    assert config.definitions == ("/a.toml", "b.json")
    assert config.participants == {
        "payments": Participant(address="127.0.0.1:9", concurrency=3),
        "shipping": Participant(address="127.0.0.1:7002"),
        "new": Participant(address="[::1]:8"),
    }


def test_relative_paths_of_a_file_start_at_its_folder(tmp_path: Path) -> None:
    """A file means the same wherever the runtime is started; flags mean the current folder."""
    text = """
        definitions = ["definitions/*.toml"]
        [server]
        listen = "unix:amends.sock"
        database = "data/amends.db"
        [participants.payments]
        address = "unix:payments.sock"
    """
    config = configured(tmp_path, text)
    assert config.definitions == (f"{tmp_path}/definitions/*.toml",)
    assert config.server.listen == f"unix:{tmp_path}/amends.sock"
    assert config.server.database == f"{tmp_path}/data/amends.db"
    assert config.participants["payments"].address == f"unix:{tmp_path}/payments.sock"
    flags = Flags(database="other.db", listen="unix:other.sock")
    assert load(tmp_path / "amends.toml", flags).server == Server(
        database="other.db", listen="unix:other.sock"
    )


def test_the_environment_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AMENDS_CONFIG stands in for --config."""
    path = tmp_path / "here.toml"
    path.write_text('log_level = "error"', encoding="utf-8")
    monkeypatch.setenv("AMENDS_CONFIG", str(path))
    assert load().log_level == "error"


def test_the_environment_holds_participants_and_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names with a double underscore go down into sections; a list is written as in PATH."""
    monkeypatch.setenv("AMENDS_PARTICIPANTS__PAYMENTS__ADDRESS", "payments:7001")
    monkeypatch.setenv("AMENDS_PARTICIPANTS__PAYMENTS__CONCURRENCY", "7")
    monkeypatch.setenv("AMENDS_DEFINITIONS", "a.toml:b/*.json")
    monkeypatch.setenv("AMENDS_LOG_FORMAT", "json")
    config = load()
    assert config.participants == {"payments": Participant(address="payments:7001", concurrency=7)}
    assert config.definitions == ("a.toml", "b/*.json")
    assert config.log_format == "json"


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers leave variables unset by setting them to nothing."""
    monkeypatch.setenv("AMENDS_LOG_LEVEL", "")
    monkeypatch.setenv("AMENDS_CONFIG", "")
    assert load() == Config()


def test_a_configuration_is_frozen_and_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made by hand is what was written, and nobody changes it later."""
    monkeypatch.setenv("AMENDS_LOG_LEVEL", "error")
    config = Config()
    assert config.log_level == "info"
    with pytest.raises(ValidationError):
        config.log_level = "debug"


# -- TLS -------------------------------------------------------------------------------------------


def test_tls_files_of_a_file_start_at_its_folder(tmp_path: Path) -> None:
    """As its other paths do; what is read is what lies there."""
    authority = Authority(tmp_path)
    runtime = authority.issue("runtime")
    config = configured(
        tmp_path,
        """
        [server]
        tls_cert = "runtime.pem"
        tls_key = "runtime.key"
        tls_client_ca = "ca.pem"
        [participants.payments]
        address = "payments.example:7001"
        tls_ca = "ca.pem"
        tls_cert = "runtime.pem"
        tls_key = "runtime.key"
        tls_server_name = "pay.example"
        [participants.shipping]
        address = "127.0.0.1:7002"
        """,
    )
    assert config.server.tls_cert == str(runtime.cert)
    assert config.participants["payments"].tls_key == str(runtime.key)
    tls = read_tls(config)
    assert tls.server is not None
    assert tls.server.client_ca == authority.cert.read_bytes()
    assert list(tls.participants) == ["payments"]
    assert tls.participants["payments"].server_name == "pay.example"
    assert tls.remarks == []


def test_tls_may_stand_in_every_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A certificate of a flag goes with a key of the environment; who has which is the user's."""
    authority = Authority(tmp_path)
    runtime = authority.issue("runtime")
    monkeypatch.setenv("AMENDS_SERVER__TLS_KEY", str(runtime.key))
    monkeypatch.setenv("AMENDS_PARTICIPANTS__PAYMENTS__TLS_CA", str(authority.cert))
    flags = Flags(
        tls_cert=str(runtime.cert),
        tls_client_ca=str(authority.cert),
        participants={"payments": "127.0.0.1:7001"},
    )
    config = load(flags=flags)
    assert config.server == Server(
        tls_cert=str(runtime.cert), tls_key=str(runtime.key), tls_client_ca=str(authority.cert)
    )
    assert list(read_tls(config).participants) == ["payments"]


def test_the_variables_of_the_commands_do_not_reach_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """AMENDS_TLS_CERT is the certificate of a person at the command line."""
    for name in ("CA", "CERT", "KEY", "SERVER_NAME"):
        monkeypatch.setenv(f"AMENDS_TLS_{name}", "mine")
    assert load() == Config()


def test_every_fault_of_tls_files_has_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the place where the path stands, together with whatever else is wrong."""
    authority = Authority(tmp_path)
    runtime = authority.issue("runtime")
    other = authority.issue("other")
    monkeypatch.setenv("AMENDS_SERVER__TLS_KEY", str(other.key))
    monkeypatch.setenv("AMENDS_LOGLEVEL", "debug")
    monkeypatch.chdir(tmp_path)
    assert problems(
        tmp_path,
        """
        log_formt = "json"
        [server]
        tls_client_ca = "nope.pem"
        [participants.payments]
        address = "127.0.0.1:7001"
        tls_ca = "runtime.key"
        tls_key = "runtime.key"
        tls_server_name = "payments.example:7001"
        [participants.shipping]
        address = "unix:shipping.sock"
        tls_ca = "ca.pem"
        [participants.inventory]
        tls_cert = 3
        """,
        Flags(tls_cert=str(runtime.cert)),
    ) == [
        "AMENDS_LOGLEVEL: there is no such variable; did you mean AMENDS_LOG_LEVEL?",
        (
            "amends.toml: participants.payments.tls_server_name: must be a host's name without a"
            " port, such as payments.example, not 'payments.example:7001'"
        ),
        (
            "amends.toml: participants.inventory: address is missing; "
            'write [participants.inventory] address = "host:port"'
        ),
        "amends.toml: participants.inventory.tls_cert: must be a text in quotes, not 3",
        "amends.toml: log_formt: there is no such key; did you mean log_format?",
        (
            "AMENDS_SERVER__TLS_KEY: other.key is not the key of runtime.pem, whose first"
            " certificate must be the runtime's own: give two files that belong together"
        ),
        "amends.toml: server.tls_client_ca: nope.pem: there is no such file",
        (
            "amends.toml: participants.payments.tls_ca: runtime.key holds no certificate (it holds"
            " a private key): give a PEM file, in which one begins with -----BEGIN CERTIFICATE-----"
        ),
        (
            "amends.toml: participants.payments.tls_key: is given without tls_cert, its"
            " certificate: give both"
        ),
        (
            "amends.toml: participants.shipping.tls_ca: is for a host:port: a unix socket has no"
            " host whose name a certificate could prove, and its folder's permissions say who may"
            " use it; leave the tls_* keys out, or give a host:port"
        ),
    ]


def test_a_flag_that_lacks_its_other_half_is_named(tmp_path: Path) -> None:
    """An empty path is none: it must not mean plain text."""
    runtime = Authority(tmp_path).issue("runtime")
    assert problems(tmp_path, flags=Flags(tls_cert=str(runtime.cert))) == [
        "--tls-cert: is given without tls_key, its private key: give both"
    ]
    assert problems(tmp_path, flags=Flags(tls_cert="", tls_key="")) == [
        "--tls-cert: must be the path of a file",
        "--tls-key: must be the path of a file",
    ]


def test_files_of_a_configuration_by_hand_are_looked_at_when_they_are_read() -> None:
    """One line each, with the key."""
    with pytest.raises(ConfigurationError) as refused:
        read_tls(
            Config(
                server=Server(tls_cert="/nope/a.pem", tls_key="/nope/a.key"),
                participants={"payments": Participant(address="h:1", tls_ca="/nope/ca.pem")},
            )
        )
    assert str(refused.value).splitlines() == [
        "server.tls_cert: /nope/a.pem: there is no such file",
        "server.tls_key: /nope/a.key: there is no such file",
        "participants.payments.tls_ca: /nope/ca.pem: there is no such file",
    ]


# -- what is wrong ---------------------------------------------------------------------------------


def test_everything_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    """One line for each problem, with file, key, and what to write instead."""
    assert problems(
        tmp_path,
        """
        log_formt = "json"
        listen = "127.0.0.1:1"
        definitions = [3]
        [server]
        listn = "127.0.0.1:1"
        insecure = "maybe"
        [participants.payments]
        concurency = 3
        [participants.Pay]
        address = "h:1"
        [limits]
        mailbox = "many"
        live_sagas = 0
        commit_batch = 1.5
        commit_queue = true
        [breaker]
        open_s = "soon"
        max_open_s = inf
        """,
    ) == [
        "amends.toml: server.insecure: must be true or false, not 'maybe'",
        "amends.toml: server.listn: there is no such key; did you mean listen?",
        (
            "amends.toml: participants.payments: address is missing; "
            'write [participants.payments] address = "host:port"'
        ),
        (
            "amends.toml: participants.payments.concurency: there is no such key; "
            "did you mean concurrency?"
        ),
        (
            "amends.toml: participants.Pay: is not a participant's name: use a lower-case letter, "
            "then up to 47 of a-z 0-9 _ -"
        ),
        "amends.toml: definitions[0]: must be a text in quotes, not 3",
        "amends.toml: limits.live_sagas: must be at least 1, not 0",
        "amends.toml: limits.mailbox: must be a whole number, not 'many'",
        "amends.toml: limits.commit_batch: must be a whole number, not 1.5",
        "amends.toml: limits.commit_queue: must be a number, not true",
        "amends.toml: breaker.open_s: must be a number, not 'soon'",
        "amends.toml: breaker.max_open_s: must be at most 86400, not inf",
        "amends.toml: log_formt: there is no such key; did you mean log_format?",
        "amends.toml: listen: there is no such key; listen belongs in [server]",
    ]


@pytest.mark.parametrize(
    ("address", "complaint"),
    [
        ("7233", "must be host:port or unix:path"),
        ("::1", "must be host:port or unix:path"),
        (":7233", 'has no host: write "127.0.0.1:7233"'),
        ("http://127.0.0.1:7233", "must be host:port without http://, for example 127.0.0.1:7233"),
        ("127.0.0.1:", "has a port that cannot be: ''; write 0 to 65535"),
        ("127.0.0.1:65536", "has a port that cannot be: '65536'"),
        ("127.0.0.1:٣", "has a port that cannot be"),
        ("-a:1", "has a host that cannot be: '-a'"),
        ("a b:1", "has a host that cannot be: 'a b'"),
        ("[zz]:1", "has a host that cannot be: '[zz]'"),
        ("unix:", 'has no path: write "unix:/run/name.sock"'),
        (f"unix:/{'a' * 107}", "has a path of 108 bytes, and a socket's may have 107"),
    ],
)
def test_an_address_that_cannot_be_is_refused(tmp_path: Path, address: str, complaint: str) -> None:
    """The line says what is wrong with the address and how one is written."""
    [line] = problems(tmp_path, flags=Flags(listen=address))
    assert line.startswith(f"--listen: {complaint}")


COLLECTOR = 'must be host:port or a URL, for example "127.0.0.1:4317" or "https://collector.'


@pytest.mark.parametrize(
    ("endpoint", "complaint"),
    [
        ("127.0.0.1", 'has no port: write "127.0.0.1:4317", where'),
        (
            "http://c",
            'has no port: write "c:4317", where collectors take OTLP over gRPC, or "c:4318"',
        ),
        ("4317", 'has no host: write "127.0.0.1:4317", or where else the collector is'),
        (":4317", 'has no host: write "127.0.0.1:4317", or where else the collector is'),
        ("", COLLECTOR),
        (" ", COLLECTOR),
        ("http://", COLLECTOR),
        ("unix:/run/otlp.sock", COLLECTOR),
        ("ftp://c:1", COLLECTOR),
        ("https//c", COLLECTOR),
        ("c:4318/v1/traces", COLLECTOR),
        ("http://c:4318/?a=b", COLLECTOR),
        ("::1", COLLECTOR),
        ("c:port", "has a port that cannot be: 'port'; write 1 to 65535"),
        ("c:0", "has a port that cannot be: '0'; write 1 to 65535"),
        ("http://ada:secret@c:1", "takes no user or password: give them in OTEL_EXPORTER_OTLP_"),
    ],
)
def test_a_collector_that_cannot_be_is_refused(
    tmp_path: Path, endpoint: str, complaint: str
) -> None:
    """The line says what one looks like: URLs, and no unix socket."""
    [line] = problems(tmp_path, flags=Flags(otlp=endpoint))
    assert line.startswith(f"--otlp: {complaint}")
    assert "secret" not in line
    if complaint is COLLECTOR:
        assert line.endswith(f"not {endpoint!r}")


@pytest.mark.parametrize(
    "endpoint",
    [
        "c:4317",
        "[::1]:4317",
        "http://c:4318/base",
        "https://c",
        "https://[::1]/base",
        "https://c:1",
    ],
)
def test_a_collector_that_can_be_is_taken(endpoint: str) -> None:
    """Only https has a port that is understood by itself."""
    assert load(None, Flags(otlp=endpoint)).telemetry.otlp_endpoint == endpoint


@pytest.mark.parametrize(
    ("listen", "complaint"),
    [
        (
            "9464",
            'must be host:port, for example "127.0.0.1:9464" (IPv6 in brackets: "[::1]:9464")',
        ),
        ("unix:/a", "must be host:port: Prometheus scrapes no unix sockets"),
        ("http://127.0.0.1:9464", "must be host:port without http://, for example 127.0.0.1:9464"),
        (":9464", 'has no host: write "127.0.0.1:9464" (this machine only) or "0.0.0.0:9464"'),
    ],
)
def test_a_metrics_address_that_cannot_be_is_refused(
    tmp_path: Path, listen: str, complaint: str
) -> None:
    """What is advised is taken."""
    [line] = problems(tmp_path, flags=Flags(metrics_listen=listen))
    assert line.startswith(f"--metrics-listen: {complaint}")


@pytest.mark.parametrize("address", ["127.0.0.1:0", "[::1]:7233", "a-b.example:1", "unix:/a"])
def test_an_address_that_can_be_is_taken(address: str) -> None:
    """host:port with any free port, IPv6 in brackets, and unix sockets."""
    assert load(flags=Flags(listen=address)).server.listen == address


def test_a_participant_needs_a_real_port(tmp_path: Path) -> None:
    """Port 0 means "any free one", and nobody can be called there."""
    assert problems(tmp_path, flags=Flags(participants={"payments": "127.0.0.1:0"})) == [
        "--participant payments: has a port that cannot be: '0'; write 1 to 65535"
    ]


def test_a_wrong_variable_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line names the variable, since that is where the mend is."""
    monkeypatch.setenv("AMENDS_LIMITS__MAILBOX", "x")
    monkeypatch.setenv("AMENDS_BREAKER__OPN_S", "1")
    monkeypatch.setenv("AMENDS_PARTICIPANTS__PAYMENTS__CONCURRENCY", "1")
    assert problems(tmp_path) == [
        (
            "AMENDS_PARTICIPANTS__PAYMENTS: address is missing; "
            'write [participants.payments] address = "host:port"'
        ),
        "AMENDS_LIMITS__MAILBOX: must be a whole number, not 'x'",
        "AMENDS_BREAKER__OPN_S: there is no such key; did you mean open_s?",
    ]


def test_a_misspelt_variable_is_no_silent_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variable that was surely meant for amends, and would do nothing, is an error."""
    monkeypatch.setenv("AMENDS_SERVER_LISTEN", "127.0.0.1:1")
    monkeypatch.setenv("AMENDS_LOGLEVEL", "debug")
    monkeypatch.setenv("AMENDS_LIMTS__MAILBOX", "100")
    assert problems(tmp_path) == [
        "AMENDS_LIMTS__MAILBOX: there is no section limts; did you mean AMENDS_LIMITS__…?",
        "AMENDS_LOGLEVEL: there is no such variable; did you mean AMENDS_LOG_LEVEL?",
        "AMENDS_SERVER_LISTEN: there is no such variable; did you mean AMENDS_SERVER__LISTEN?",
    ]


def test_a_wrong_value_and_a_misspelt_variable_are_said_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever mends one must not find the other at the next start."""
    monkeypatch.setenv("AMENDS_LOGLEVEL", "debug")
    monkeypatch.setenv("AMENDS_LIMITS__MAILBOX", "x")
    assert problems(tmp_path) == [
        "AMENDS_LOGLEVEL: there is no such variable; did you mean AMENDS_LOG_LEVEL?",
        "AMENDS_LIMITS__MAILBOX: must be a whole number, not 'x'",
    ]


def test_variables_of_others_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """An orchestrator announces a service called amends by variables of that name."""
    monkeypatch.setenv("AMENDS_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("AMENDS_PORT_7233_TCP_ADDR", "10.0.0.1")
    monkeypatch.setenv("AMENDS_SERVER_PORT", "tcp://10.0.0.1:7233")
    monkeypatch.setenv("AMENDS_TARGET", "10.0.0.1:7233")
    assert load() == Config()


def test_a_variable_for_a_section_must_hold_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JSON for a whole section works; anything else is explained."""
    monkeypatch.setenv("AMENDS_PARTICIPANTS", '{"payments": {"address": "h:1"}}')
    assert load().participants == {"payments": Participant(address="h:1")}
    monkeypatch.setenv("AMENDS_PARTICIPANTS", "payments=h:1")
    [line] = problems(tmp_path)
    assert "participants" in line
    assert "JSON" in line


def test_values_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    """The first wait of a breaker must fit into the longest."""
    assert problems(tmp_path, "[breaker]\nopen_s = 60\n") == [
        "amends.toml: breaker: open_s (60) must not be more than max_open_s (30)"
    ]


def test_wrong_shapes_are_explained(tmp_path: Path) -> None:
    """A value where a table belongs, and a table where a value belongs."""
    assert problems(
        tmp_path,
        """
        server = "127.0.0.1:1"
        participants = []
        log_format = "jsn"
        """,
    ) == [
        (
            "amends.toml: server: must be a table: write [server] and its keys below, "
            "not '127.0.0.1:1'"
        ),
        (
            "amends.toml: participants: must be a table: write [participants] and its keys below, "
            "not []"
        ),
        "amends.toml: log_format: must be auto, console or json, not 'jsn'; did you mean json?",
    ]


def test_a_long_wrong_value_is_cut(tmp_path: Path) -> None:
    """A line stays a line, whatever somebody pasted."""
    [line] = problems(tmp_path, flags=Flags(log_level="x" * 10_000))
    assert len(line) < 200


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"[server", "is not TOML: "),
        (b"a = 1\na = 2", "is not TOML: "),
        (b"\xff", "is not TOML: byte 0 is not UTF-8"),
        (b"a = " + b"[" * 100_000, "is "),
    ],
)
def test_a_file_that_is_no_toml_is_refused(tmp_path: Path, content: bytes, complaint: str) -> None:
    """One line that names the file and, where there is one, the place in it."""
    path = tmp_path / "amends.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError) as refused:
        load(path)
    [line] = str(refused.value).splitlines()
    assert line.startswith(f"{path}: {complaint}")


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    """A missing file and a folder each say what they are."""
    with pytest.raises(
        ConfigurationError, match=r"nope\.toml: there is no such file; check --config"
    ):
        load(tmp_path / "nope.toml")
    with pytest.raises(ConfigurationError, match="cannot be read: Is a directory"):
        load(tmp_path)
