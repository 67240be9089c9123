"""The runtime's TLS files: what is wrong with them is said before anybody needs them."""

import os
from pathlib import Path

import pytest
from cryptography import x509

from amends_runtime.tls import (
    ParticipantTls,
    ServerTls,
    TlsFault,
    read_participant_tls,
    read_server_tls,
)
from tests.certificates import DAY, HOUR, Authority, Issued, write_key


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """Somebody who signs."""
    return Authority(tmp_path)


@pytest.fixture
def issued(authority: Authority) -> Issued:
    """A certificate that is good."""
    return authority.issue("runtime")


def read(
    cert: Path | str = "", key: Path | str = "", client_ca: Path | str = "", listen: str = "h:1"
) -> tuple[ServerTls | None, list[TlsFault]]:
    """Read the server's files."""
    return read_server_tls(listen=listen, cert=str(cert), key=str(key), client_ca=str(client_ca))


def read_participant(
    ca: Path | str = "",
    cert: Path | str = "",
    key: Path | str = "",
    server_name: str = "",
    address: str = "h:1",
) -> tuple[ParticipantTls | None, list[TlsFault]]:
    """Read a participant's files."""
    return read_participant_tls(
        address=address, ca=str(ca), cert=str(cert), key=str(key), server_name=server_name
    )


# -- good files ------------------------------------------------------------------------------------


def test_without_files_there_is_no_tls() -> None:
    """Nothing configured is plain text, and no fault."""
    assert read() == (None, [])
    assert read_participant() == (None, [])


def test_a_server_has_a_certificate_and_perhaps_a_client_ca(
    authority: Authority, issued: Issued
) -> None:
    """The contents as they are, and no remark about dates that are good."""
    cert, key = issued.cert.read_bytes(), issued.key.read_bytes()
    assert read(issued.cert, issued.key) == (ServerTls(cert, key, None), [])
    tls, faults = read(issued.cert, issued.key, authority.cert)
    assert (tls, faults) == (ServerTls(cert, key, authority.cert.read_bytes()), [])


def test_a_participant_is_believed_by_an_authority(authority: Authority, issued: Issued) -> None:
    """With its certificate the runtime says who it is, where that is asked."""
    ca, cert, key = (path.read_bytes() for path in (authority.cert, *issued))
    assert read_participant(authority.cert) == (ParticipantTls(ca, None, None), [])
    assert read_participant(authority.cert, *issued, server_name="payments.example") == (
        ParticipantTls(ca, cert, key, "payments.example"),
        [],
    )


def test_a_chain_is_taken_as_a_whole(tmp_path: Path, authority: Authority) -> None:
    """The certificate first, then those between it and its authority."""
    issued = Authority(tmp_path, "between", issuer=authority).issue("runtime")
    tls, faults = read(*issued)
    assert faults == []
    assert tls is not None
    assert tls.cert.count(b"BEGIN CERTIFICATE") == 2


def test_no_key_is_ever_shown(authority: Authority, issued: Issued) -> None:
    """A `repr` ends up in tracebacks and logs."""
    server, _ = read(issued.cert, issued.key, authority.cert)
    participant, _ = read_participant(authority.cert, *issued)
    for shown in (repr(server), repr(participant)):
        assert "BEGIN" not in shown
        assert "key" not in shown


# -- what is wrong ---------------------------------------------------------------------------------


def test_what_belongs_together_is_given_together(authority: Authority, issued: Issued) -> None:
    """A part of it would be plain text, or a server that nobody can reach."""
    assert read(cert=issued.cert) == (
        None,
        [TlsFault("tls_cert", "is given without tls_key, its private key: give both")],
    )
    assert read(key=issued.key) == (
        None,
        [TlsFault("tls_key", "is given without tls_cert, its certificate: give both")],
    )
    assert read(client_ca=authority.cert) == (
        None,
        [TlsFault("tls_client_ca", "is given without tls_cert and tls_key: give all three")],
    )
    for key, participant in (
        ("tls_cert", read_participant(cert=issued.cert, key=issued.key)),
        ("tls_server_name", read_participant(server_name="payments.example")),
    ):
        tls, [fault] = participant
        assert tls is None
        assert fault.key == key
        assert "without tls_ca" in fault.what
        assert "plain text" in fault.what


def test_a_unix_socket_has_no_tls(authority: Authority, issued: Issued) -> None:
    """Its folder says who may use it, and it has no name that a certificate could prove."""
    server = read(issued.cert, issued.key, listen="unix:/run/amends.sock")
    participant = read_participant(authority.cert, address="unix:/run/payments.sock")
    for (tls, [fault]), key in ((server, "tls_cert"), (participant, "tls_ca")):
        assert tls is None
        assert fault.key == key
        assert "unix socket" in fault.what


def test_all_faults_are_found_at_once(tmp_path: Path) -> None:
    """Each file has its own line."""
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")
    tls, faults = read(tmp_path / "nope.pem", nonsense, tmp_path)
    assert tls is None
    assert faults == [
        TlsFault("tls_cert", f"{tmp_path}/nope.pem: there is no such file"),
        TlsFault(
            "tls_key",
            f"{nonsense} holds no private key: give a PEM file, in which one begins with"
            " -----BEGIN PRIVATE KEY-----",
        ),
        TlsFault("tls_client_ca", f"{tmp_path} is not a file: give the path of a PEM file"),
    ]


def test_swapped_files_are_recognised(issued: Issued) -> None:
    """The line says what the file does hold."""
    _, faults = read(issued.key, issued.cert)
    assert [fault.key for fault in faults] == ["tls_cert", "tls_key"]
    assert "holds no certificate (it holds a private key)" in faults[0].what


def test_a_key_of_another_certificate_is_refused(authority: Authority, issued: Issued) -> None:
    """Both files are named."""
    other = authority.issue("other")
    _, [fault] = read(issued.cert, other.key)
    assert fault.key == "tls_key"
    assert fault.what.startswith(f"{other.key} is not the key of {issued.cert}")


def test_a_chain_in_the_wrong_order_is_refused(
    tmp_path: Path, authority: Authority, issued: Issued
) -> None:
    """The runtime's own certificate comes first, which the line says."""
    backwards = tmp_path / "backwards.pem"
    backwards.write_bytes(authority.cert.read_bytes() + issued.cert.read_bytes())
    _, [fault] = read(backwards, issued.key)
    assert "whose first certificate must be the runtime's own" in fault.what


def test_damaged_files_are_refused(tmp_path: Path, issued: Issued) -> None:
    """What looks like PEM and is none."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_bytes(issued.cert.read_bytes()[:-100])
    key.write_text("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
    _, faults = read(cert, key)
    assert [fault.key for fault in faults] == ["tls_cert", "tls_key"]
    assert all("damaged, or cut short" in fault.what for fault in faults)


def test_an_encrypted_key_is_refused(tmp_path: Path, issued: Issued) -> None:
    """Nobody is there to type a password, and gRPC takes none."""
    encrypted = tmp_path / "encrypted.key"
    write_key(encrypted, password=b"secret")
    _, [fault] = read(issued.cert, encrypted)
    assert fault.key == "tls_key"
    assert "is encrypted" in fault.what


def test_a_kind_of_key_that_grpc_does_not_speak_is_refused(authority: Authority) -> None:
    """Every handshake would fail, and neither side would say why."""
    _, [fault] = read(*authority.issue("runtime", ed25519_key=True))
    assert fault.key == "tls_key"
    assert "RSA, P-256 or P-384" in fault.what


def test_what_is_no_plain_file_is_refused(tmp_path: Path, issued: Issued) -> None:
    """Some never end, and some are empty when they are read again."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero")):
        _, [fault] = read(issued.cert, path)
        assert fault == TlsFault("tls_key", f"{path} is not a file: give the path of a PEM file")


def test_a_huge_file_is_not_read_to_its_end(tmp_path: Path, issued: Issued) -> None:
    """A path that was mistaken for another must not fill the memory."""
    huge = tmp_path / "huge"
    with huge.open("wb") as file:
        file.truncate(1 << 40)
    _, [fault] = read(issued.cert, huge)
    assert "has more than 4,194,304 bytes" in fault.what


def test_a_file_that_cannot_be_read_is_refused(issued: Issued) -> None:
    """With the system's reason. This file is one that not even root reads from its beginning."""
    _, [fault] = read(issued.cert, "/proc/self/mem")
    assert fault.what == "/proc/self/mem cannot be read: Input/output error"


# -- dates -----------------------------------------------------------------------------------------


def test_a_certificate_that_is_out_of_date_is_a_remark(authority: Authority) -> None:
    """The runtime starts all the same: its sagas go on without clients."""
    for starts, ends, said in (
        (-2 * DAY, -DAY, "expired on {until}"),
        (DAY, 2 * DAY, "is not valid before {since}"),
        (-DAY, 13 * DAY, "expires on {until}"),
    ):
        issued = authority.issue("runtime", starts=starts, ends=ends)
        tls, faults = read(*issued)
        assert faults == []
        assert tls is not None
        [remark] = tls.remarks
        dates = x509.load_pem_x509_certificate(issued.cert.read_bytes())
        date = said.format(
            since=f"{dates.not_valid_before_utc:%Y-%m-%d %H:%M UTC}",
            until=f"{dates.not_valid_after_utc:%Y-%m-%d %H:%M UTC}",
        )
        assert remark.startswith(f"tls_cert {issued.cert} {date}: ")


def test_an_authority_that_is_being_replaced_is_no_remark(
    tmp_path: Path, authority: Authority
) -> None:
    """The old one stands in the file beside the new one for a while."""
    old = authority.issue("old", ends=-HOUR)
    both = tmp_path / "both.pem"
    both.write_bytes(old.cert.read_bytes() + authority.cert.read_bytes())
    tls, _ = read_participant(both)
    assert tls is not None
    assert tls.remarks == ()
    tls, _ = read_participant(old.cert)
    assert tls is not None
    [remark] = tls.remarks
    assert remark.startswith(f"tls_ca {old.cert} expired on ")
