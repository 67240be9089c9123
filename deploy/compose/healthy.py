# ruff: noqa: INP001  # a program of the image, not a module
"""Ask a gRPC server by its health service: ``python healthy.py HOST:PORT``, exit code 0 or 1."""

from __future__ import annotations

import sys
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

TIMEOUT_S = 3.0

_STUB: Any = health_pb2_grpc.HealthStub  # whose types know only half of it


def main(address: str) -> int:
    """Give 0 if it says SERVING, else 1 with why."""
    with grpc.insecure_channel(address) as channel:
        try:
            answer = _STUB(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            sys.stderr.write(f"{address}: {error.code().name}\n")
            return 1
    return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
