"""The tests' event loops: what one of them leaves behind must not fail the next one."""

import asyncio
import socket
from typing import Any

import grpc
import grpc.aio


async def begin_call(port: int, timeout_s: float) -> grpc.aio.UnaryUnaryCall[bytes, bytes]:
    """Ask somebody who never answers, and go."""
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", [("grpc.enable_retries", 0)])
    ask: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/tests.Silent/Ask")
    call = ask(b"", timeout=timeout_s)
    await asyncio.sleep(0)  # the call begins in a task
    return call


def test_a_call_that_outlives_its_loop_is_no_error_of_the_next_loop() -> None:
    """All loops share gRPC's poller: whichever runs is handed the ends of all calls."""
    errors: list[dict[str, Any]] = []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
        left_behind = first.run_until_complete(begin_call(port, 0.2))
        first.close()
        second.set_exception_handler(lambda _, context: errors.append(context))
        for _ in range(2):  # the one left behind has ended by the time that the second has
            mine = second.run_until_complete(begin_call(port, 0.4))
            assert second.run_until_complete(mine.code()) is grpc.StatusCode.DEADLINE_EXCEEDED
        second.close()
    assert errors == []
    del left_behind
