
-- What was voted for and is not decided: a row for each vote, until it is told.
CREATE TABLE IF NOT EXISTS pending (
    pending_number INTEGER PRIMARY KEY AUTOINCREMENT,
    store_id TEXT NOT NULL,
    incarnation TEXT NOT NULL,
    saga_id TEXT NOT NULL,
    step TEXT NOT NULL,
    round INTEGER NOT NULL,
    account TEXT NOT NULL,
    amount_cents INTEGER NOT NULL,
    since_ms INTEGER NOT NULL,       -- UTC: a resolver asks about what is old
    UNIQUE (store_id, saga_id, step, round)
);
