"""Two participants that have secrets, for the canary test: as a process of its own.

    python canary_program.py FOLDER OTLP_ADDRESS

prints the addresses of `vault`, written with the SDK, and of `foreign`, written without it, as one
line of JSON; logs to standard error from INFO on; sends its spans to OTLP_ADDRESS; ends when its
standard input does. The secrets come with each call's input, as `payload`, `exception`, `message`.
"""

import asyncio
import json
import logging
import sys
from pathlib import Path

import grpc.aio
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

import amends
from amends.v1 import participant_pb2


def vault(folder: Path) -> amends.Participant:
    """A participant whose every action has secrets, and does something else with them."""
    found = amends.Participant("vault", barrier=amends.SqliteBarrier(str(folder / "vault.db")))

    @found.execute("keep")
    def keep(call: amends.Call, tx: amends.Transaction) -> dict[str, str]:
        tx.execute("CREATE TABLE IF NOT EXISTS kept (secret TEXT)")
        tx.execute("INSERT INTO kept VALUES (?)", (call.json()["payload"],))
        return {"kept": call.json()["payload"]}

    @found.compensate("keep")
    def forget(call: amends.Call, tx: amends.Transaction) -> None:
        assert call.own_result is not None
        tx.execute("DELETE FROM kept WHERE secret = ?", (call.json()["payload"],))

    @found.execute("burst")
    def burst(call: amends.Call, tx: amends.Transaction) -> None:
        secrets = call.json()
        try:
            raise KeyError(secrets["payload"])
        except KeyError as cause:
            raise ValueError(secrets["exception"], secrets) from cause

    @found.compensate("burst")
    def nothing(call: amends.Call, tx: amends.Transaction) -> None:
        """Nothing took effect."""

    @found.execute("refuse", compensatable=False)
    def refuse(call: amends.Call, tx: amends.Transaction) -> None:
        raise amends.Rejected("declined", call.json()["message"])

    @found.execute("break", compensatable=False)
    def break_(call: amends.Call, tx: amends.Transaction) -> None:
        raise amends.Broken("ledger_lost", "it cannot be read")

    @found.execute("hide")
    def hide(call: amends.Call, tx: amends.Transaction) -> str:
        return str(call.json()["payload"])

    @found.compensate("hide")
    def fail_to_show(call: amends.Call, tx: amends.Transaction) -> None:
        raise RuntimeError(call.json()["exception"])

    return found


async def refuse_loudly(body: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
    """Answer a call with an error of gRPC that quotes it."""
    call = participant_pb2.ExecuteRequest.FromString(body).call
    words = json.loads(call.input.data)["message"]
    await context.abort(grpc.StatusCode.UNAVAILABLE, words)


async def main(folder: Path, otlp: str) -> None:
    """Serve both until standard input ends."""
    provider = TracerProvider(resource=Resource({"service.name": "vault"}))
    provider.add_span_processor(
        SimpleSpanProcessor(OTLPSpanExporter(endpoint=f"http://{otlp}", insecure=True))
    )
    trace.set_tracer_provider(provider)
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    verbs = ("Prepare", "Execute", "Compensate")
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        verb: grpc.unary_unary_rpc_method_handler(refuse_loudly) for verb in verbs
    }
    service = grpc.method_handlers_generic_handler("amends.v1.ParticipantService", handlers)
    server.add_generic_rpc_handlers((service,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with amends.serve(vault(folder)) as served:
        addresses = {"vault": served.address, "foreign": f"127.0.0.1:{port}"}
        sys.stdout.write(json.dumps(addresses) + "\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)
    provider.shutdown()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
