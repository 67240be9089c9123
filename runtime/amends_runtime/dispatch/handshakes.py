"""What a TLS handshake with a participant failed of, in words of whoever runs the runtime.

gRPC says it with UNAVAILABLE and in the words of its TLS library. The outcome is unknown and the
endpoint unwell, as with any participant that cannot be reached; here only the text gets better.
"""

from __future__ import annotations

from amends_runtime.tls import ParticipantTls

__all__ = ["explain_handshake"]

_CONNECTING = "failed to connect to all addresses"  # and not: a connection broke under a call
_OTHER_NAME = ("Hostname Verification", "is not in peer certificate")  # of newer and older gRPC


def explain_handshake(details: str, tls: ParticipantTls | None) -> str:
    """The text of an UNAVAILABLE, with what to do before it if it tells of a failed handshake."""
    what = _what(details, tls)
    return f"{what} (gRPC: {details})" if what else details


def _what(details: str, tls: ParticipantTls | None) -> str:
    is_hung_up = details.startswith(_CONNECTING) and (
        "Socket closed" in details or "Connection reset" in details
    )
    if tls is None:
        return _HUNG_UP_ON_PLAIN_TEXT if is_hung_up else ""
    if "WRONG_VERSION_NUMBER" in details:
        return (
            "the participant does not speak TLS, and tls_ca says that it must: serve it with a"
            " certificate, or take its tls_ca out of the configuration"
        )
    if "certificate has expired" in details:
        return "the participant's certificate, or one that it rests on, has expired: renew it"
    if "certificate is not yet valid" in details:
        return "the participant's certificate is not valid yet: compare this machine's clock"
    if "CERTIFICATE_VERIFY_FAILED" in details:
        return (
            "the participant's certificate is not signed by an authority in its tls_ca: is it the"
            " participant that listens there, and tls_ca its authority?"
        )
    if any(words in details for words in _OTHER_NAME):
        name = tls.server_name or "the host of its address"
        return (
            f"the participant's certificate is not for {name}: register an address that it names,"
            " or give one of its names as tls_server_name"
        )
    if is_hung_up:
        return _HUNG_UP_ON_NOBODY if tls.cert is None else _HUNG_UP_ON_CERTIFICATE
    return ""


_HUNG_UP_ON_PLAIN_TEXT = (
    "something listens there and hangs up: if the participant speaks TLS, give it a tls_ca in the"
    " configuration"
)
_HUNG_UP_ON_NOBODY = (
    "the participant hung up in the TLS handshake: if it asks for a certificate, give the runtime"
    " one (tls_cert and tls_key)"
)
_HUNG_UP_ON_CERTIFICATE = (
    "the participant hung up in the TLS handshake: it may not accept the runtime's certificate"
    " (tls_cert), because that expired, or is of an authority that it does not know"
)
