"""The way in: the gRPC services of the runtime, and the server that they stand on."""
