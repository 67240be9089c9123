"""The command line: `amends serve`, and everything that a person asks of a running runtime.

One module per group of commands. A command reaches the runtime through the SDK's client only, as
any other program would; `serve` alone starts an engine. What is heavy (gRPC, pydantic, the engine)
is imported by the command that needs it, so that help comes at once.
"""
