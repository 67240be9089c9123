-- The statements of reservations, for SQLite and PostgreSQL. A ? is the place of a value, whatever
-- the driver's mark for it is. {table}, {key} and {quantity} are the author's, as quoted names, and
-- {place} is where the holds lie: in PostgreSQL the schema of the author's table, with a dot.

-- name: find-table
-- PostgreSQL: the table that the search path leads to, with its schema, as names to be written.
SELECT pg_catalog.quote_ident(s.nspname), pg_catalog.quote_ident(t.relname)
FROM pg_catalog.pg_class AS t JOIN pg_catalog.pg_namespace AS s ON s.oid = t.relnamespace
WHERE t.oid = pg_catalog.to_regclass('{table}')

-- name: open-sqlite
-- Looks whether the author's table is one that can be reserved from, and makes ours. Only a trigger
-- can say in words of ours what is wrong.
--
-- amends_reservations: one row for each vote that is not told yet whether to commit, and what the
-- vote promises. `participant` gave it; `pool` is the table and the column that it is about; `key`
-- the row there, as JSON; `direction` is takes or gives; `request` an amends.v1.Call with what phase
-- 2 may ask of the vote's request.
--
-- amends_reservations_pools: by which column the rows of a pool are known, the same for all who
-- reserve there; else one row, known by two keys, would be held twice.
CREATE TEMP TABLE amends_check (finding TEXT);
CREATE TEMP TRIGGER amends_check_finding BEFORE INSERT ON amends_check BEGIN
    SELECT CASE NEW.finding
        WHEN 'none' THEN RAISE(
            ABORT, '{table_name} is no table of this database: name the table itself, no view of it'
        )
        WHEN 'temp' THEN RAISE(
            ABORT, '{table_name} is hidden by a TEMP table of that name, which forgets: drop that'
        )
        WHEN 'virtual' THEN RAISE(
            ABORT, '{table_name} is a virtual table: reservations need an ordinary one'
        )
        WHEN 'generated' THEN RAISE(
            ABORT, '{key_name} or {quantity_name} of {table_name} is a generated column: reservations need ordinary ones'
        )
        WHEN 'kind' THEN RAISE(
            ABORT, '{key_name} of {table_name} is declared neither as a text nor as a whole number: the key of a reservation is one of these'
        )
        WHEN 'twins' THEN RAISE(
            ABORT, '{key_name} of {table_name} is not unique: the key of a reservation must be, by itself and for all rows (PRIMARY KEY or UNIQUE)'
        )
        WHEN 'version' THEN RAISE(
            ABORT, 'amends_reservations was made by another version of amends: when it is empty, drop it, and the next opening makes it anew'
        )
        WHEN 'key' THEN RAISE(
            ABORT, 'reservations of {quantity_name} of {table_name} know its rows by another key than {key_name} already (see amends_reservations_pools), and one row that is known by two keys would be held twice: use the same key everywhere. To change it, stop all that reserve there, see that amends_reservations is empty, and delete the row of amends_reservations_pools'
        )
    END;
END;
INSERT INTO amends_check SELECT 'temp' WHERE EXISTS (
    SELECT 1 FROM temp.sqlite_master WHERE lower(name) = lower('{table_name}')
);
SELECT {key}, {quantity} FROM {table} LIMIT 0;
INSERT INTO amends_check SELECT 'none' WHERE NOT EXISTS (
    SELECT 1 FROM main.sqlite_master WHERE type = 'table' AND lower(name) = lower('{table_name}')
);
INSERT INTO amends_check SELECT 'virtual' WHERE EXISTS (
    SELECT 1 FROM main.sqlite_master
    WHERE lower(name) = lower('{table_name}') AND lower(ltrim(sql)) LIKE 'create virtual%'
);
INSERT INTO amends_check SELECT 'generated' WHERE EXISTS (
    SELECT 1 FROM pragma_table_xinfo('{table_name}')
    WHERE lower(name) IN (lower('{key_name}'), lower('{quantity_name}')) AND hidden <> 0
);
INSERT INTO amends_check SELECT 'kind' FROM pragma_table_xinfo('{table_name}')
WHERE lower(name) = lower('{key_name}') AND upper(type) NOT LIKE '%INT%'
    AND upper(type) NOT LIKE '%CHAR%' AND upper(type) NOT LIKE '%CLOB%'
    AND upper(type) NOT LIKE '%TEXT%' AND upper(type) <> 'UUID';
INSERT INTO amends_check SELECT 'twins' WHERE NOT (
    SELECT count(*) = 1 AND coalesce(max(lower(name)), '') = lower('{key_name}')
    FROM pragma_table_xinfo('{table_name}') WHERE pk > 0
) AND NOT EXISTS (
    SELECT 1 FROM pragma_index_list('{table_name}') AS i WHERE i."unique" AND NOT i.partial AND (
        SELECT count(*) = 1 AND max(lower(c.name)) = lower('{key_name}')
        FROM pragma_index_info(i.name) AS c
    )
);
CREATE TABLE IF NOT EXISTS amends_reservations (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    store_id TEXT NOT NULL,
    saga_id TEXT NOT NULL,
    step TEXT NOT NULL,
    round INTEGER NOT NULL,
    participant TEXT NOT NULL,
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
INSERT INTO amends_check SELECT 'version' WHERE 14 <> (
    SELECT count(*) FROM pragma_table_info('amends_reservations') WHERE name IN (
        'seq', 'store_id', 'saga_id', 'step', 'round', 'participant', 'action', 'pool', 'key',
        'direction', 'amount', 'incarnation', 'request', 'since_ms'
    )
);
CREATE INDEX IF NOT EXISTS amends_reservations_by_key ON amends_reservations (pool, key);
CREATE TABLE IF NOT EXISTS amends_reservations_pools (
    pool TEXT PRIMARY KEY,
    key_name TEXT NOT NULL
);
INSERT OR IGNORE INTO amends_reservations_pools VALUES ('{pool}', lower('{key_name}'));
INSERT INTO amends_check SELECT 'key' FROM amends_reservations_pools
WHERE pool = '{pool}' AND key_name <> lower('{key_name}');
DROP TABLE amends_check;

-- name: open-postgres
-- The same. What is there is left alone: to make it again would want the right to make tables, and
-- CREATE INDEX IF NOT EXISTS would wait for all transactions that write holds. In PostgreSQL the
-- quantity's column has a type, a table may have parts, and rows may be in a table that forgets.
SELECT {key}, {quantity} FROM {table} LIMIT 0;
DO $amends$
DECLARE
    owner OID := pg_catalog.to_regclass('{table}');
    place TEXT;
    known_by TEXT;
    own_pool TEXT;
    kind TEXT;
    shape TEXT;
    written TEXT;
    key_no SMALLINT;
BEGIN
    SELECT quote_ident(s.nspname), quote_ident(s.nspname) || '.' || quote_ident(t.relname)
        || '.{quantity_name}', t.relkind INTO place, own_pool, shape
    FROM pg_catalog.pg_class AS t JOIN pg_catalog.pg_namespace AS s ON s.oid = t.relnamespace
    WHERE t.oid = owner;
    IF shape NOT IN ('r', 'p') THEN
        RAISE EXCEPTION '{table_name} is no table: name the table itself, so that all holds on its '
            'rows see each other';
    END IF;
    IF EXISTS (SELECT FROM pg_catalog.pg_inherits WHERE inhrelid = owner) THEN
        RAISE EXCEPTION '{table_name} is a partition or a child of another table: name the topmost '
            'one, so that all holds on its rows see each other';
    END IF;
    -- The table with all of its parts.
    WITH RECURSIVE part (oid) AS (
        SELECT owner UNION SELECT i.inhrelid FROM pg_catalog.pg_inherits AS i JOIN part ON
        i.inhparent = part.oid
    )
    SELECT CASE
        WHEN t.relpersistence = 't' THEN 'a TEMP table, which forgets'
        WHEN t.relpersistence = 'u' THEN 'UNLOGGED, so that a crash empties it'
        ELSE 'a foreign table, which does not commit with its holds'
    END INTO kind
    FROM part JOIN pg_catalog.pg_class AS t ON t.oid = part.oid
    WHERE t.relpersistence <> 'p' OR t.relkind NOT IN ('r', 'p') LIMIT 1;
    IF kind IS NOT NULL THEN
        RAISE EXCEPTION '{table_name} (or a part of it) is %: a vote is a promise; make it an '
            'ordinary table', kind;
    END IF;
    SELECT pg_catalog.format_type(a.atttypid, NULL), CASE
        WHEN a.attgenerated <> '' THEN 'a generated column'
        WHEN a.attidentity = 'a' THEN 'GENERATED ALWAYS'
    END INTO kind, written FROM pg_catalog.pg_attribute AS a
    WHERE a.attrelid = owner AND a.attname = '{quantity_name}';
    IF kind NOT IN ('smallint', 'integer', 'bigint') THEN
        RAISE EXCEPTION 'reservations count in whole numbers, and {quantity_name} of {table_name} '
            'is %: make it a bigint of the smallest unit, for example cents', kind;
    END IF;
    IF written IS NOT NULL THEN
        RAISE EXCEPTION '{quantity_name} of {table_name} is %, which no reservation can change: '
            'make it an ordinary column', written;
    END IF;
    SELECT pg_catalog.format_type(COALESCE(NULLIF(t.typbasetype, 0), t.oid), NULL),
        a.attgenerated, a.attnum INTO kind, written, key_no
    FROM pg_catalog.pg_attribute AS a JOIN pg_catalog.pg_type AS t ON t.oid = a.atttypid
    WHERE a.attrelid = owner AND a.attname = '{key_name}';
    IF kind NOT IN
        ('text', 'character varying', 'character', 'smallint', 'integer', 'bigint', 'uuid')
    THEN
        RAISE EXCEPTION 'the key of a reservation is a text, a whole number or a uuid, and '
            '{key_name} of {table_name} is %', kind;
    END IF;
    IF written <> '' THEN
        RAISE EXCEPTION '{key_name} of {table_name} is a generated column: the key of a '
            'reservation is an ordinary one';
    END IF;
    IF NOT EXISTS (
        SELECT FROM pg_catalog.pg_index AS i
        WHERE i.indrelid = owner AND i.indisunique AND i.indisvalid AND i.indpred IS NULL
            AND i.indnkeyatts = 1 AND i.indkey[0] = key_no
    ) THEN
        RAISE EXCEPTION '{key_name} of {table_name} is not unique: the key of a reservation must '
            'be, by itself and for all rows (PRIMARY KEY or UNIQUE)';
    END IF;
    IF to_regclass(place || '.amends_reservations') IS NULL THEN
        EXECUTE 'CREATE TABLE ' || place || '.amends_reservations (
            seq BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            store_id TEXT NOT NULL,
            saga_id TEXT NOT NULL,
            step TEXT NOT NULL,
            round INTEGER NOT NULL,
            participant TEXT NOT NULL,
            action TEXT NOT NULL,
            pool TEXT NOT NULL,
            key TEXT NOT NULL,
            direction TEXT NOT NULL,
            amount BIGINT NOT NULL CHECK (amount > 0),
            incarnation TEXT NOT NULL,
            request BYTEA NOT NULL,
            since_ms BIGINT NOT NULL,
            UNIQUE (store_id, saga_id, step, round)
        )';
    END IF;
    IF 14 <> (
        SELECT count(*) FROM pg_catalog.pg_attribute
        WHERE attrelid = to_regclass(place || '.amends_reservations') AND NOT attisdropped
            AND attname IN ('seq', 'store_id', 'saga_id', 'step', 'round', 'participant', 'action',
            'pool', 'key', 'direction', 'amount', 'incarnation', 'request', 'since_ms')
    ) THEN
        RAISE EXCEPTION '%.amends_reservations was made by another version of amends: when it is '
            'empty, drop it, and the next opening makes it anew', place;
    END IF;
    IF to_regclass(place || '.amends_reservations_by_key') IS NULL THEN
        EXECUTE 'CREATE INDEX amends_reservations_by_key ON ' || place
            || '.amends_reservations (pool, key)';
    END IF;
    IF to_regclass(place || '.amends_reservations_pools') IS NULL THEN
        EXECUTE 'CREATE TABLE ' || place
            || '.amends_reservations_pools (pool TEXT PRIMARY KEY, key_name TEXT NOT NULL)';
    END IF;
    EXECUTE 'SELECT key_name FROM ' || place || '.amends_reservations_pools WHERE pool = $1'
        INTO known_by USING own_pool;
    IF known_by IS NULL THEN
        EXECUTE 'INSERT INTO ' || place || '.amends_reservations_pools VALUES ($1, $2)'
            USING own_pool, '{key_name}';
    ELSIF known_by <> '{key_name}' THEN
        RAISE EXCEPTION 'reservations of {quantity_name} of {table_name} know its rows by %, not '
            'by {key_name}, and one row that is known by two keys would be held twice: use the '
            'same key everywhere. To change it, stop all that reserve there, see that '
            '%.amends_reservations has none of it, and delete its row of '
            'amends_reservations_pools', known_by, place;
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
SELECT COALESCE(SUM(amount), 0) FROM {place}amends_reservations
WHERE pool = ? AND key = ? AND direction = ?

-- name: read-free
-- The quantity of a row less what is held of it, both at one moment.
SELECT {quantity} - (
    SELECT COALESCE(SUM(h.amount), 0) FROM {place}amends_reservations AS h
    WHERE h.pool = ? AND h.key = ? AND h.direction = ?
)
FROM {table} WHERE {key} = ?

-- name: write-hold
-- One vote.
INSERT INTO {place}amends_reservations
    (store_id, saga_id, step, round, participant, action, pool, key, direction, amount, incarnation,
    request, since_ms)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)

-- name: read-hold
-- What one vote has promised.
SELECT pool, key, direction, amount FROM {place}amends_reservations
WHERE store_id = ? AND saga_id = ? AND step = ? AND round = ?

-- name: delete-hold
-- The vote is told.
DELETE FROM {place}amends_reservations
WHERE store_id = ? AND saga_id = ? AND step = ? AND round = ?

-- name: move-quantity
-- What was promised happens; the first value is negative for what is taken, and may be wider than
-- the column, which holds the sum.
UPDATE {table} SET {quantity} = {quantity} + CAST(? AS bigint) WHERE {key} = ?

-- name: read-quantity
-- What there is now: a trigger or a rule of the author's may have made something else of an UPDATE.
SELECT {quantity} FROM {table} WHERE {key} = ?

-- name: list-old
-- A page of the votes of one pool that are old and not told; {names} are marks for the participant's
-- names.
SELECT seq, store_id, incarnation, saga_id, step, round, since_ms, action, direction
FROM {place}amends_reservations
WHERE pool = ? AND since_ms <= ? AND seq > ? AND participant IN ({names}) ORDER BY seq LIMIT ?

-- name: read-request
-- Who gave one vote, and what was asked in it.
SELECT participant, request FROM {place}amends_reservations
WHERE store_id = ? AND saga_id = ? AND step = ? AND round = ?
