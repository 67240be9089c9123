-- Who has how much. The opening balance is never changed, so that the movements can be added up.
CREATE TABLE IF NOT EXISTS accounts (
    account TEXT PRIMARY KEY,
    opening_cents INTEGER NOT NULL,
    balance_cents INTEGER NOT NULL CHECK (balance_cents >= 0)
);

-- What has moved, in the order in which it was committed.
CREATE TABLE IF NOT EXISTS movements (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    at_ms INTEGER NOT NULL,          -- UTC, for people
    clock_ns INTEGER NOT NULL,       -- the machine's monotonic clock
    saga_id TEXT NOT NULL,
    step TEXT NOT NULL,
    action TEXT NOT NULL,            -- debit, credit, collect
    key TEXT NOT NULL,               -- the idempotency key of the call that moved it
    account TEXT NOT NULL,
    amount_cents INTEGER NOT NULL    -- what is taken has a minus
);

-- A list that can be corrected proves nothing.
CREATE TRIGGER IF NOT EXISTS movements_are_not_changed BEFORE UPDATE ON movements
BEGIN SELECT RAISE(ABORT, 'the movements are append-only'); END;

CREATE TRIGGER IF NOT EXISTS movements_are_not_deleted BEFORE DELETE ON movements
BEGIN SELECT RAISE(ABORT, 'the movements are append-only'); END;
