-- What is on the shelves. The opening stock is never changed, so that the ledger can be added up.
CREATE TABLE IF NOT EXISTS stock (
    sku TEXT PRIMARY KEY,
    opening INTEGER NOT NULL,
    on_hand INTEGER NOT NULL CHECK (on_hand >= 0)
);

-- What was put aside for an order, and whether it was put back.
CREATE TABLE IF NOT EXISTS reservations (
    reservation_number INTEGER PRIMARY KEY AUTOINCREMENT,
    saga_id TEXT NOT NULL,
    order_id TEXT NOT NULL,
    sku TEXT NOT NULL,
    quantity INTEGER NOT NULL,
    released INTEGER NOT NULL DEFAULT 0
);

-- A saga's own reservations. Not unique: a second one must show up in the audit.
CREATE INDEX IF NOT EXISTS reservations_by_saga ON reservations (saga_id);
