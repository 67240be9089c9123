"""The pure heart: what a saga is, and what it does about everything that can happen to it.

Nothing in this package awaits, reads a clock, draws a random number, does I/O or knows protobuf.
Time and identity are arguments; the answer to the same question is always the same answer.

Read in this order: `definition`, `records`, `messages`, `effects`, `saga`, then `backoff` and
`breaker`.
"""
