-- The statements of reservations, for SQLite and PostgreSQL. A ? is the place of a value, whatever
-- the driver's mark for it is. {table}, {key} and {quantity} are the author's, as quoted names; {pool}
-- is an expression for the name of both, the same one however the author spells them.

-- name: pool-sqlite
-- Names of SQLite have no case.
'{folded}'

-- name: pool-postgres
-- The table that the search path leads to, with its schema.
(SELECT quote_ident(s.nspname) || '.' || quote_ident(t.relname) || '.{quantity_name}'
    FROM pg_catalog.pg_class AS t JOIN pg_catalog.pg_namespace AS s ON s.oid = t.relnamespace
    WHERE t.oid = '{table}'::pg_catalog.regclass)

-- name: create-table-sqlite
-- One row for each vote that is not told yet whether to commit, and what the vote promises. `pool`
-- is the table and the column that it is about; `key` the row there, as JSON; `direction` is takes
-- or gives; `request` an amends.v1.Call with what phase 2 may ask of the vote's request.
CREATE TABLE IF NOT EXISTS amends_reservations (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    store_id TEXT NOT NULL,
    saga_id TEXT NOT NULL,
    step TEXT NOT NULL,
    round INTEGER NOT NULL,
    action TEXT NOT NULL,
    pool TEXT NOT NULL,
    key TEXT NOT NULL,
    direction TEXT NOT NULL,
    amount INTEGER NOT NULL CHECK (amount > 0),
    incarnation TEXT NOT NULL,
    request BLOB NOT NULL,
    since_ms INTEGER NOT NULL,
    UNIQUE (store_id, saga_id, step, round)
);
CREATE INDEX IF NOT EXISTS amends_reservations_by_key ON amends_reservations (pool, key);

-- name: create-table-postgres
-- The same. What is there is left alone: to make it again would want the right to make tables, and
-- CREATE INDEX IF NOT EXISTS would wait for all transactions that write holds.
DO $amends$
DECLARE place TEXT := quote_ident(current_schema()) || '.';
BEGIN
    IF to_regclass(place || 'amends_reservations') IS NULL THEN
        CREATE TABLE amends_reservations (
            seq BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            store_id TEXT NOT NULL,
            saga_id TEXT NOT NULL,
            step TEXT NOT NULL,
            round INTEGER NOT NULL,
            action TEXT NOT NULL,
            pool TEXT NOT NULL,
            key TEXT NOT NULL,
            direction TEXT NOT NULL,
            amount BIGINT NOT NULL CHECK (amount > 0),
            incarnation TEXT NOT NULL,
            request BYTEA NOT NULL,
            since_ms BIGINT NOT NULL,
            UNIQUE (store_id, saga_id, step, round)
        );
    END IF;
    IF to_regclass(place || 'amends_reservations_by_key') IS NULL THEN
        CREATE INDEX amends_reservations_by_key ON amends_reservations (pool, key);
    END IF;
END
$amends$;

-- name: check-table-sqlite
-- Fails if the author has no such table or column, if it is a view of one, or if the holds were made
-- by another version. Only a trigger can say in words of ours what is wrong.
SELECT seq, store_id, saga_id, step, round, action, pool, key, direction, amount, incarnation,
    request, since_ms
FROM amends_reservations LIMIT 0;
SELECT {key}, {quantity} FROM {table} LIMIT 0;
CREATE TEMP TABLE amends_check (done);
CREATE TEMP TRIGGER amends_check_table BEFORE INSERT ON amends_check WHEN NOT EXISTS (
    SELECT 1 FROM main.sqlite_master WHERE type = 'table' AND lower(name) = lower('{table_name}')
) BEGIN
    SELECT RAISE(
        ABORT, '{table_name} is no table of this database: name the table itself, no view of it'
    );
END;
INSERT INTO amends_check VALUES (1);
DROP TABLE amends_check;

-- name: check-table-postgres
-- The same; and if it is a part of another table, or if the quantity is not kept in whole numbers.
SELECT seq, store_id, saga_id, step, round, action, pool, key, direction, amount, incarnation,
    request, since_ms
FROM amends_reservations LIMIT 0;
SELECT {key}, {quantity} FROM {table} LIMIT 0;
DO $amends$
DECLARE kind TEXT;
BEGIN
    IF NOT EXISTS (
        SELECT FROM pg_class WHERE oid = to_regclass('{table}') AND relkind IN ('r', 'p')
    ) THEN
        RAISE EXCEPTION '{table_name} is no table: name the table itself, so that all holds on its '
            'rows see each other';
    END IF;
    IF EXISTS (SELECT FROM pg_inherits WHERE inhrelid = to_regclass('{table}')) THEN
        RAISE EXCEPTION '{table_name} is a partition or a child of another table: name the topmost '
            'one, so that all holds on its rows see each other';
    END IF;
    SELECT format_type(atttypid, NULL) INTO kind FROM pg_attribute
    WHERE attrelid = to_regclass('{table}') AND attname = '{quantity_name}';
    IF kind NOT IN ('smallint', 'integer', 'bigint') THEN
        RAISE EXCEPTION 'reservations count in whole numbers, and {quantity_name} of {table_name} '
            'is %: make it a bigint of the smallest unit, for example cents', kind;
    END IF;
END
$amends$;

-- name: read-row-sqlite
-- The author's row, what kind of number its quantity is, and how transactions are kept apart.
SELECT {key}, {quantity}, typeof({quantity}), 'serializable' FROM {table} WHERE {key} = ? LIMIT 2

-- name: read-row-postgres
-- The same; {lock} is FOR NO KEY UPDATE, so that nobody changes it and no hold on it is made
-- meanwhile; who refers to it by a foreign key may.
SELECT {key}, {quantity}, pg_typeof({quantity})::text, current_setting('transaction_isolation')
FROM {table} WHERE {key} = ? LIMIT 2 {lock}

-- name: set-lock-timeout
-- PostgreSQL: how long this transaction's statements wait for a lock.
SELECT set_config('lock_timeout', ?, true)

-- name: sum-held
-- What is held on one row.
SELECT COALESCE(SUM(amount), 0) FROM amends_reservations
WHERE pool = {pool} AND key = ? AND direction = ?

-- name: read-free
-- The quantity of a row less what is held of it, both at one moment.
SELECT {quantity} - (
    SELECT COALESCE(SUM(amount), 0) FROM amends_reservations
    WHERE pool = {pool} AND amends_reservations.key = ? AND direction = ?
)
FROM {table} WHERE {key} = ?

-- name: write-hold
-- One vote.
INSERT INTO amends_reservations
    (store_id, saga_id, step, round, action, pool, key, direction, amount, incarnation, request,
    since_ms)
VALUES (?, ?, ?, ?, ?, {pool}, ?, ?, ?, ?, ?, ?)

-- name: read-hold
-- What one vote has promised, and what is promised of now.
SELECT pool, {pool}, key, direction, amount FROM amends_reservations
WHERE store_id = ? AND saga_id = ? AND step = ? AND round = ?

-- name: delete-hold
-- The vote is told.
DELETE FROM amends_reservations WHERE store_id = ? AND saga_id = ? AND step = ? AND round = ?

-- name: move-quantity
-- What was promised happens; the first value is negative for what is taken, and may be wider than
-- the column, which holds the sum.
UPDATE {table} SET {quantity} = {quantity} + CAST(? AS bigint) WHERE {key} = ?

-- name: list-old
-- A page of the votes of one pool that are old and not told.
SELECT seq, store_id, incarnation, saga_id, step, round, since_ms, action, direction
FROM amends_reservations
WHERE pool = {pool} AND since_ms <= ? AND seq > ? ORDER BY seq LIMIT ?

-- name: read-request
-- What was asked in one vote.
SELECT request FROM amends_reservations
WHERE store_id = ? AND saga_id = ? AND step = ? AND round = ?
