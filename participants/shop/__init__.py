"""A shop in four services and a bank of three branches: the participants of the demo and the soak.

Both are written with the SDK alone: the shop with sagas, the bank with two-phase commits.

==================  ==============================================================================
`orders`            the services: business code, as any author would write it. `inventory`,
                    `payments` and `shipping` are its siblings
`definition`        the order saga: how the four belong together
`catalogue`         what is sold, for how much, and who has how much money when the shop opens
`ledger`            the append-only list of effects that every service keeps
`bank_east`         the branches: on PostgreSQL with prepared transactions, `bank_west` on SQLite
                    with reservations, `bank_fees` on SQLite by hand
`transfer`          the transfers: how the branches belong together
`bank`              accounts, and what a transfer is; `bank_books` what every branch keeps
`switches`          what is to go wrong, read from a file; `faults` makes it go wrong
`server`            one service or branch as one process: ``python -m shop payments --help``
`postgres`          a PostgreSQL server of one's own
`processes`         starts, kills and stops all of these and runtimes, for scripts and tests
`journal`           what a client asked for and was told
`audit`             compares the journal with the ledgers; `audit_transfers` does it for the bank,
                    whose databases `bank_witnesses` reads
==================  ==============================================================================

Not part of the wheel.
"""
