"""Types of the generated asyncio stubs, which exist only in the generated .pyi files."""

from typing import TYPE_CHECKING, Any, TypeAlias

from amends.v1 import operator_pb2_grpc, saga_pb2_grpc

if TYPE_CHECKING:
    Sagas: TypeAlias = saga_pb2_grpc.SagaServiceAsyncStub
    Operator: TypeAlias = operator_pb2_grpc.OperatorServiceAsyncStub
else:
    Sagas = Operator = Any
