"""The contract as Python code: messages, stubs and servicers of the proto package ``amends.v1``.

The ``*_pb2*`` modules beside this file are generated from ``protos/amends/v1`` by ``make protos``.
Import the module that you need: ``from amends.v1 import saga_pb2, saga_pb2_grpc``.
"""
