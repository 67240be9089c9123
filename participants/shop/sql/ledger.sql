-- The ledger, the same in all four services: every effect and every undoing, in the order in which
-- they were committed. Appended to in the transaction of the business tables and of the barrier.
CREATE TABLE IF NOT EXISTS effects (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    at_ms INTEGER NOT NULL,          -- UTC, for people
    clock_ns INTEGER NOT NULL,       -- the machine's monotonic clock: orders the effects of all services
    saga_id TEXT NOT NULL,
    step TEXT NOT NULL,
    effect TEXT NOT NULL,            -- place, cancel, charge, refund, reserve, release, ship, confirm
    key TEXT NOT NULL,               -- the call's idempotency key
    order_id TEXT NOT NULL,
    subject TEXT NOT NULL,           -- whose account, which product, which address
    quantity INTEGER NOT NULL,       -- pieces; 0 where the effect has none
    amount_cents INTEGER NOT NULL    -- money; 0 where the effect has none
);

-- A ledger that can be corrected proves nothing.
CREATE TRIGGER IF NOT EXISTS effects_are_not_changed BEFORE UPDATE ON effects
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;

CREATE TRIGGER IF NOT EXISTS effects_are_not_deleted BEFORE DELETE ON effects
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
