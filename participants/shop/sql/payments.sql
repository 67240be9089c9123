-- Who has how much. The opening balance is never changed, so that the ledger can be added up.
CREATE TABLE IF NOT EXISTS accounts (
    account TEXT PRIMARY KEY,
    opening_cents INTEGER NOT NULL,
    balance_cents INTEGER NOT NULL CHECK (balance_cents >= 0)
);

-- The charges that were made, and whether each was refunded.
CREATE TABLE IF NOT EXISTS charges (
    charge_number INTEGER PRIMARY KEY AUTOINCREMENT,
    saga_id TEXT NOT NULL,
    order_id TEXT NOT NULL,
    account TEXT NOT NULL,
    amount_cents INTEGER NOT NULL,
    refunded INTEGER NOT NULL DEFAULT 0
);

-- A saga's own charges. Not unique: a second charge of one saga must show up in the audit.
CREATE INDEX IF NOT EXISTS charges_by_saga ON charges (saga_id);
