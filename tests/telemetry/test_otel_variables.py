"""OpenTelemetry's variables: where they send, what is over them, and what a wrong one does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from amends_runtime.errors import ConfigurationError
from amends_runtime.telemetry.otel_variables import (
    Destination,
    Protocol,
    Signal,
    Variables,
    find_destination,
    find_exporters,
    find_ratio,
    find_resource_attributes,
)

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
OWN = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
HTTP = {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}


def destination(
    environment: Mapping[str, str],
    endpoint: str | None = None,
    protocol: Protocol | None = None,
    *,
    signal: Signal = "traces",
    asked: bool = True,
) -> Destination | None:
    """Where it goes, with nothing to remark on."""
    variables = Variables(environment)
    found = find_destination(variables, signal, endpoint=endpoint, protocol=protocol, asked=asked)
    variables.check()
    assert variables.remarks == []
    return found


def sent_to(
    environment: Mapping[str, str], endpoint: str | None = None, protocol: Protocol | None = None
) -> str:
    """The endpoint alone; empty: nowhere."""
    found = destination(environment, endpoint, protocol)
    return "" if found is None else found.endpoint


def fault(environment: Mapping[str, str], endpoint: str | None = None) -> str:
    """What keeps a runtime from starting."""
    variables = Variables(environment)
    find_destination(variables, "traces", endpoint=endpoint)
    with pytest.raises(ConfigurationError) as refused:
        variables.check()
    return str(refused.value)


# -- where to --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "where"),
    [
        ({}, ""),
        ({ENDPOINT: ""}, ""),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, ""),
        ({ENDPOINT: "http://c:4317"}, "http://c:4317"),
        ({ENDPOINT: "http://c:4317/ignored"}, "http://c:4317"),
        ({ENDPOINT: "c:4317"}, "http://c:4317"),
        ({ENDPOINT: "c:4317", "OTEL_EXPORTER_OTLP_INSECURE": "true"}, "http://c:4317"),
        ({ENDPOINT: "c:4317", "OTEL_EXPORTER_OTLP_INSECURE": "false"}, "https://c:4317"),
        ({ENDPOINT: "https://c", "OTEL_EXPORTER_OTLP_INSECURE": "true"}, "https://c:443"),
        ({ENDPOINT: "http://c"}, "http://c:80"),
        ({ENDPOINT: "http://[::1]:4317"}, "http://[::1]:4317"),
        ({ENDPOINT: "http://c:4318", **HTTP}, "http://c:4318/v1/traces"),
        ({ENDPOINT: "http://c:4318/", **HTTP}, "http://c:4318/v1/traces"),
        ({ENDPOINT: "http://c:4318/base/", **HTTP}, "http://c:4318/base/v1/traces"),
        ({ENDPOINT: "https://c", **HTTP}, "https://c/v1/traces"),
        ({OWN: "http://t:1/as/is", **HTTP}, "http://t:1/as/is"),
        ({OWN: "http://t:1", ENDPOINT: "http://c:2", **HTTP}, "http://t:1"),
        ({OWN: "http://t:1", ENDPOINT: "http://c:2"}, "http://t:1"),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, "http://localhost:4317"),
        ({"OTEL_TRACES_EXPORTER": "otlp", **HTTP}, "http://localhost:4318/v1/traces"),
        ({"OTEL_TRACES_EXPORTER": "none", ENDPOINT: "http://c:4317"}, ""),
        ({"OTEL_SDK_DISABLED": "TRUE", ENDPOINT: "http://c:4317"}, ""),
        ({"OTEL_SDK_DISABLED": "false", ENDPOINT: "http://c:4317"}, "http://c:4317"),
        (
            {
                "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
                "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
                ENDPOINT: "http://c:4318",
            },
            "http://c:4318/v1/traces",
        ),
    ],
    ids=str,
)
def test_variables_say_where_to_as_the_specification_has_it(
    environment: Mapping[str, str], where: str
) -> None:
    """A base endpoint gets the signal's path, a signal's own is taken as it is; gRPC has none."""
    assert sent_to(environment) == where


@pytest.mark.parametrize(
    ("endpoint", "protocol", "where"),
    [
        ("c:4317", None, "http://c:4317"),
        ("https://c:4317", "grpc", "https://c:4317"),
        ("c:4318", "http/protobuf", "http://c:4318/v1/traces"),
        ("http://c:4318/v1/traces", "http/protobuf", "http://c:4318/v1/traces"),
        ("http://c:4318/v1/traces/", "http/protobuf", "http://c:4318/v1/traces"),
        ("http://c:4318/base", "http/protobuf", "http://c:4318/base/v1/traces"),
    ],
)
def test_the_configuration_says_it_over_every_variable(
    endpoint: str, protocol: Protocol | None, where: str
) -> None:
    """And its endpoint may be written with a signal's path or without."""
    environment = {OWN: "http://t:1", ENDPOINT: "http://c:2"}
    assert sent_to(environment, endpoint, protocol) == where


@pytest.mark.parametrize("name", ["OTEL_SDK_DISABLED=true", "OTEL_TRACES_EXPORTER=none"])
def test_the_configuration_is_also_over_what_switches_off(name: str) -> None:
    """Which is remarked on, since whoever set the variable may have meant it."""
    variables = Variables(dict([name.split("=")]))
    assert find_destination(variables, "traces", endpoint="c:4317") is not None
    assert variables.remarks == ["traces are sent: [telemetry] is over OpenTelemetry's variables"]


def test_metrics_go_by_otlp_only_if_they_are_asked_for() -> None:
    """The general endpoint is often Jaeger's, which takes none."""
    for environment, where in (
        ({ENDPOINT: "http://c:4317"}, None),
        ({ENDPOINT: "http://c:4317", "OTEL_METRICS_EXPORTER": "prometheus"}, None),
        ({ENDPOINT: "http://c:4317", "OTEL_METRICS_EXPORTER": "otlp"}, "http://c:4317"),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://m:4317"}, "http://m:4317"),
    ):
        found = destination(environment, signal="metrics", asked=False)
        assert (None if found is None else found.endpoint) == where
    assert destination({}, "c:4317", signal="metrics", asked=False) is None
    both = destination({"OTEL_METRICS_EXPORTER": "otlp"}, "c:1", signal="metrics", asked=False)
    assert both is not None
    assert find_exporters(Variables({"OTEL_METRICS_EXPORTER": "otlp, prometheus"}), "metrics") == [
        "otlp",
        "prometheus",
    ]


def test_how_it_is_sent(tmp_path: Path) -> None:
    """Time-outs are milliseconds; headers are percent-encoded; the signal's own are over others."""
    pem = tmp_path / "ca.pem"
    pem.write_text("-----BEGIN CERTIFICATE-----\n", encoding="utf-8")
    found = destination(
        {
            ENDPOINT: "c:4317",
            "OTEL_EXPORTER_OTLP_TIMEOUT": "2500",
            "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
            "OTEL_EXPORTER_OTLP_HEADERS": "ignored=1",
            "OTEL_EXPORTER_OTLP_TRACES_HEADERS": "Authorization=Basic%20YWJj, x-key = a%3Db ,",
            "OTEL_EXPORTER_OTLP_CERTIFICATE": str(pem),
        }
    )
    assert found == Destination(
        signal="traces",
        protocol="grpc",
        endpoint="https://c:4317",  # a certificate speaks of TLS where the endpoint does not
        timeout_s=2.5,
        gzip=True,
        headers={"authorization": "Basic YWJj", "x-key": "a=b"},
        certificate=str(pem),
    )


def test_http_knows_more_names_of_headers_than_grpc_does() -> None:
    """What is right for one is refused for the other, at start."""
    headers = {"OTEL_EXPORTER_OTLP_HEADERS": "api+key=1,x-bin=2"}
    found = destination({ENDPOINT: "http://c:4318", **HTTP, **headers})
    assert found is not None
    assert found.headers == {"api+key": "1", "x-bin": "2"}


def test_what_is_shown_of_a_destination_has_no_secrets() -> None:
    """Neither the headers nor a password in the URL."""
    found = destination({ENDPOINT: "http://ada:secret@c:4318", **HTTP})
    assert str(found) == "http://c:4318/v1/traces (http/protobuf)"


# -- what is wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (ENDPOINT, "ftp://c:4317"),
        (ENDPOINT, "http://"),
        (ENDPOINT, "http://c:port"),
        (ENDPOINT, "http://c:0"),
        (ENDPOINT, "http://[::1"),
        (ENDPOINT, "http://ada:secret@c:4317"),
        (OWN, "nonsense://"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "no equals sign"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "a=%0d%0ax"),
        ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "sp ace=secret"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "api-key=%20secret"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "api-key=secret%20"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "api-key=secret%09"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "api+key=secret"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "Api-Bin=secret"),
        ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/nowhere/ca.pem"),
        ("OTEL_EXPORTER_OTLP_CLIENT_KEY", __file__ + "\0"),
        ("OTEL_EXPORTER_OTLP_CERTIFICATE", __file__.replace(".py", ".cfg")),
    ],
)
def test_a_value_that_would_send_nothing_keeps_the_runtime_from_starting(
    name: str, value: str
) -> None:
    """The error names the variable, and of headers never the value."""
    environment = {ENDPOINT: "http://c:4317", name: value}
    said = fault(environment)
    assert said.startswith(name) or name in said
    assert "secret" not in said


def test_a_client_needs_its_key_and_its_certificate(tmp_path: Path) -> None:
    """One alone is half a configuration."""
    pem = tmp_path / "client.pem"
    pem.write_text("-----BEGIN CERTIFICATE-----\n", encoding="utf-8")
    said = fault({ENDPOINT: "c:1", "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE": str(pem)})
    assert "go together" in said


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "ten"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "-1"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "nan"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "brotli"),
        ("OTEL_TRACES_EXPORTER", "zipkin"),
    ],
)
def test_a_wrong_word_or_number_counts_as_not_set(name: str, value: str) -> None:
    """As the specification demands; with a warning that names it."""
    variables = Variables({ENDPOINT: "http://c:4317", name: value})
    found = find_destination(variables, "traces")
    variables.check()
    assert found == Destination(signal="traces", protocol="grpc", endpoint="http://c:4317")
    [remark] = variables.remarks
    assert remark.startswith(f"{name} is ignored")
    assert value in remark


def test_each_port_is_one_protocol_s() -> None:
    """A mix-up is remarked on in either direction; other ports may be anybody's."""

    def remarks(endpoint: str, protocol: Protocol) -> list[str]:
        variables = Variables({})
        assert find_destination(variables, "traces", endpoint=endpoint, protocol=protocol)
        variables.check()
        return variables.remarks

    [grpc] = remarks("c:4318", "grpc")
    assert "port 4318, where collectors expect http/protobuf, and the protocol is grpc" in grpc
    [http] = remarks("c:4317", "http/protobuf")
    assert "port 4317, where collectors expect grpc, and the protocol is http/protobuf" in http
    assert remarks("c:4317", "grpc") == remarks("c:4318", "http/protobuf") == []
    assert remarks("c:1", "grpc") == remarks("c:1", "http/protobuf") == []


def test_a_configured_path_is_not_dropped_where_grpc_has_none() -> None:
    """It is OTLP over HTTP that was meant; a variable's is ignored by its specification."""
    said = fault({}, "http://c:4318/v1/traces")
    assert said == (
        "the OTLP endpoint: gRPC knows no path such as '/v1/traces': leave it out, or choose the"
        " protocol http/protobuf"
    )
    assert sent_to({}, "http://c:4317/") == "http://c:4317"


def test_what_is_hardly_meant_is_remarked_on() -> None:
    """GRPC at the port of HTTP, and a time-out in what other programs take for seconds."""
    variables = Variables({ENDPOINT: "http://c:4318", "OTEL_EXPORTER_OTLP_TIMEOUT": "10"})
    found = find_destination(variables, "traces")
    assert found is not None
    assert found.timeout_s == 0.01
    about_port, about_timeout = variables.remarks
    assert "4318" in about_port
    assert "milliseconds" in about_timeout


# -- who and how many ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampler", "argument", "ratio"),
    [
        ("", "", 1.0),
        ("always_on", "", 1.0),
        ("always_off", "", 0.0),
        ("traceidratio", "0.01", 0.01),
        ("traceidratio", "", 1.0),
        ("parentbased_always_on", "", 1.0),
        ("parentbased_always_off", "", 0.0),
        ("parentbased_traceidratio", "0.25", 0.25),
    ],
)
def test_samplers_are_shares(sampler: str, argument: str, ratio: float) -> None:
    """The argument counts for those that have one."""
    variables = Variables({"OTEL_TRACES_SAMPLER": sampler, "OTEL_TRACES_SAMPLER_ARG": argument})
    assert find_ratio(variables) == ratio
    assert variables.remarks == []
    assert find_ratio(variables, 0.75) == 0.75


@pytest.mark.parametrize("sampler", ["", "always_on", "parentbased_always_off"])
def test_an_argument_without_a_sampler_for_it_is_remarked_on(sampler: str) -> None:
    """Who sets it alone believes that a share is kept."""
    variables = Variables({"OTEL_TRACES_SAMPLER": sampler, "OTEL_TRACES_SAMPLER_ARG": "0.01"})
    ratio = 0.0 if sampler.endswith("off") else 1.0
    assert find_ratio(variables) == ratio
    [remark] = variables.remarks
    assert remark.startswith("OTEL_TRACES_SAMPLER_ARG is ignored: ")
    assert f"{ratio:g} of all traces are kept" in remark
    assert find_ratio(variables, 0.5) == 0.5
    assert len(variables.remarks) == 1


@pytest.mark.parametrize(
    ("sampler", "argument"), [("jaeger_remote", ""), ("traceidratio", "1.5"), ("traceidratio", "x")]
)
def test_a_sampler_that_is_not_known_keeps_all(sampler: str, argument: str) -> None:
    """With a warning."""
    variables = Variables({"OTEL_TRACES_SAMPLER": sampler, "OTEL_TRACES_SAMPLER_ARG": argument})
    assert find_ratio(variables) == 1.0
    assert len(variables.remarks) == 1


def test_who_sends() -> None:
    """The configuration's name is over the variable's, and that over the attributes'."""
    environment = {"OTEL_RESOURCE_ATTRIBUTES": "service.name=a, deployment.environment.name=x%20y"}
    there = {"deployment.environment.name": "x y"}
    assert find_resource_attributes(Variables({})) == {"service.name": "amends"}
    assert find_resource_attributes(Variables(environment)) == {"service.name": "a", **there}
    environment["OTEL_SERVICE_NAME"] = "b"
    assert find_resource_attributes(Variables(environment)) == {"service.name": "b", **there}
    assert find_resource_attributes(Variables(environment), "c") == {"service.name": "c", **there}


def test_resource_attributes_that_cannot_be_read_are_left_out_as_a_whole() -> None:
    """As the specification demands; half of them would be another sender."""
    for text in ("a=b,nonsense", "a=b,=c", "a=%ff"):
        variables = Variables({"OTEL_RESOURCE_ATTRIBUTES": text})
        assert find_resource_attributes(variables) == {"service.name": "amends"}
        assert len(variables.remarks) == 1
