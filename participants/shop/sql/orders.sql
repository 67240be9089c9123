-- The orders that were placed, and what became of them: placed, cancelled or confirmed.
CREATE TABLE IF NOT EXISTS orders (
    order_number INTEGER PRIMARY KEY AUTOINCREMENT,
    saga_id TEXT NOT NULL,
    customer TEXT NOT NULL,
    sku TEXT NOT NULL,
    quantity INTEGER NOT NULL,
    amount_cents INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('placed', 'cancelled', 'confirmed')),
    tracking_code TEXT
);

-- A saga's own orders. Not unique: a second order of one saga must show up in the audit.
CREATE INDEX IF NOT EXISTS orders_by_saga ON orders (saga_id);
