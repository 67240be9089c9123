"""A shop in four services, written with the SDK alone: the participants of the demo and the soak.

==================  ==============================================================================
`orders`            the services: business code, as any author would write it. `inventory`,
                    `payments` and `shipping` are its siblings
`definition`        the order saga: how the four belong together
`catalogue`         what is sold, for how much, and who has how much money when the shop opens
`ledger`            the append-only list of effects that every service keeps
`switches`          what is to go wrong, read from a file; `faults` makes it go wrong
`server`            one service as one process: ``python -m shop payments --help``
`processes`         starts, kills and stops services and runtimes, for scripts and tests
`journal`           what a client asked for and was told
`audit`             compares the journal with the ledgers
==================  ==============================================================================

Not part of the wheel.
"""
