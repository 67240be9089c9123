-- The barrier's statements for PostgreSQL. {schema} stands for the quoted schema in which the tables
-- were made: a handler may change the search path of its session. Values are cast, because drivers
-- say of them what they like.

-- name: lock-opening
-- CREATE TABLE IF NOT EXISTS of two sessions at once fails in one of them; so they take turns.
SELECT pg_catalog.pg_advisory_xact_lock(7015293350312447821)

-- name: wait-little
-- How long the statements of an opening wait for a lock.
SELECT pg_catalog.set_config('lock_timeout', $1::text, true)

-- name: current-schema
-- Where an unqualified CREATE TABLE puts its table; null if there is none.
SELECT pg_catalog.current_schema()

-- name: is-durable
-- Whether the server syncs what it commits.
SELECT pg_catalog.current_setting('fsync') = 'on'

-- name: current-role
-- By which name rights are granted to us.
SELECT current_user::text

-- name: has-tables
-- Whether all are there: then we need no right to make them.
SELECT pg_catalog.bool_and(pg_catalog.to_regclass(name) IS NOT NULL)
FROM pg_catalog.unnest($1::text[]) AS name

-- name: may-create
-- By which name rights are granted to us, and whether we may make tables in a schema.
SELECT current_user::text, pg_catalog.has_schema_privilege($1::text, 'CREATE')

-- name: may-use
-- Whether we may do with tables what calls do; a purge deletes, too, which may be another role's.
SELECT pg_catalog.bool_and(pg_catalog.has_table_privilege(name, privilege))
FROM pg_catalog.unnest($1::text[]) AS name,
    pg_catalog.unnest(ARRAY['SELECT', 'INSERT', 'UPDATE']) AS privilege

-- name: create-table
-- One row for each verb of a step's life. `seq` grows with time, so that a purge by age reads only
-- the oldest rows and needs no index; `state` is done, rejected or fenced; a fence has no hash and
-- no reply; `reply` is an amends.v1.Outcome; `written_at_ms` is UTC.
CREATE TABLE IF NOT EXISTS {schema}.amends_barrier (
    seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    store_id text NOT NULL,
    saga_id text NOT NULL,
    step text NOT NULL,
    round bigint NOT NULL,
    verb text NOT NULL,
    state text NOT NULL,
    request_hash bytea,
    reply bytea,
    written_at_ms bigint NOT NULL,
    UNIQUE (store_id, saga_id, step, round, verb)
)

-- name: check-table
-- Fails if a table of this name has other columns.
SELECT seq, store_id, saga_id, step, round, verb, state, request_hash, reply, written_at_ms
FROM {schema}.amends_barrier LIMIT 0

-- name: create-stores-table
-- One row for each store that has called: when the oldest of its sagas that were open was started,
-- UTC, by the last word that we have. What was started before has ended, whatever comes later.
CREATE TABLE IF NOT EXISTS {schema}.amends_barrier_stores (
    store_id text PRIMARY KEY,
    oldest_open_at_ms bigint NOT NULL
)

-- name: check-stores-table
-- Fails if a table of this name has other columns.
SELECT store_id, oldest_open_at_ms FROM {schema}.amends_barrier_stores LIMIT 0

-- name: enter
-- What holds for one transaction alone. The mark is gone when the transaction is, so it tells
-- whether a handler has ended it and begun another. The time-outs, in ms: of a statement, of a wait
-- for somebody else's lock, of a handler that does nothing.
SET LOCAL amends.transaction = 'open';
SET LOCAL statement_timeout = {statement_ms};
SET LOCAL lock_timeout = {lock_ms};
SET LOCAL idle_in_transaction_session_timeout = {idle_ms}

-- name: lock-life
-- Whether nobody else works on the life; the lock ends with the transaction. A statement of its own:
-- in READ COMMITTED the next one sees what was committed before the lock was free.
SELECT pg_catalog.pg_try_advisory_xact_lock($1::bigint)

-- name: read-rows
-- The rows of a life, at most three.
SELECT verb, state, request_hash, reply FROM {schema}.amends_barrier
WHERE store_id = $1::text AND saga_id = $2::text AND step = $3::text AND round = $4::bigint

-- name: read-mark
-- 'open' if the transaction is still the one that was entered.
SELECT pg_catalog.current_setting('amends.transaction', true)

-- name: write-rows
-- The rows of a verdict, and what its store says, unless what it has said is about the same; that
-- row is not even locked then, or all calls of a store would wait for each other. Also if it is
-- older: a runtime whose store was restored has sagas open that had ended. Then what the COMMIT
-- needs: a sync, whatever the handler or the database says; and no time-out, for one that strikes
-- while a standby is waited for does not fail the COMMIT but makes it succeed without the standby.
WITH written AS (
    INSERT INTO {schema}.amends_barrier
        (store_id, saga_id, step, round, verb, state, request_hash, reply, written_at_ms)
    SELECT $1::text, $2::text, $3::text, $4::bigint, v.verb, v.state, v.request_hash, v.reply,
        $5::bigint
    FROM unnest($6::text[], $7::text[], $8::bytea[], $9::bytea[])
        AS v (verb, state, request_hash, reply)
    RETURNING seq
), said AS (
    INSERT INTO {schema}.amends_barrier_stores (store_id, oldest_open_at_ms)
    SELECT $1::text, $10::bigint
    WHERE $10::bigint > 0 AND NOT EXISTS (
        SELECT FROM {schema}.amends_barrier_stores AS s
        WHERE s.store_id = $1::text AND abs(s.oldest_open_at_ms - $10::bigint) <= $11::bigint
    )
    ON CONFLICT (store_id) DO UPDATE SET oldest_open_at_ms = excluded.oldest_open_at_ms
)
SELECT (SELECT count(*) FROM written),
    pg_catalog.set_config('synchronous_commit', CASE
        WHEN pg_catalog.current_setting('synchronous_commit') = 'remote_apply' THEN 'remote_apply'
        ELSE 'on' END, true),
    pg_catalog.set_config('statement_timeout', '0', true)

-- name: make-commit-safe
-- The same for a transaction without rows.
SELECT pg_catalog.set_config('synchronous_commit', CASE
        WHEN pg_catalog.current_setting('synchronous_commit') = 'remote_apply' THEN 'remote_apply'
        ELSE 'on' END, true),
    pg_catalog.set_config('statement_timeout', '0', true)

-- name: make-seen-safe
-- The same for one that only reads: with something to commit, which waits for the standbys, and all
-- that lies before it in the log with it.
SELECT pg_catalog.set_config('synchronous_commit', CASE
        WHEN pg_catalog.current_setting('synchronous_commit') = 'remote_apply' THEN 'remote_apply'
        ELSE 'on' END, true),
    pg_catalog.set_config('statement_timeout', '0', true),
    pg_catalog.pg_logical_emit_message(true, 'amends', '')

-- name: find-holds
-- The tables of reservations in this database that we may read, as names to be written: each lies
-- beside an author's table.
SELECT pg_catalog.quote_ident(s.nspname) || '.' || pg_catalog.quote_ident(t.relname)
FROM pg_catalog.pg_class AS t JOIN pg_catalog.pg_namespace AS s ON s.oid = t.relnamespace
WHERE t.relname = 'amends_reservations' AND t.relkind = 'r' AND t.relpersistence = 'p'
    AND pg_catalog.has_schema_privilege(s.oid, 'USAGE')
    AND pg_catalog.has_table_privilege(t.oid, 'SELECT')

-- name: is-not-held
-- One condition of purge-page for each of them: a vote is not forgotten before it is told.
AND NOT EXISTS (
    SELECT FROM {holds} AS h WHERE h.store_id = b.store_id AND h.saga_id = b.saga_id
        AND h.step = b.step AND h.round = b.round
)

-- name: purge-page
-- Deletes among a page of the oldest rows behind a position those that are old enough and whose
-- sagas have ended; gives how many, how long the page was, how many of it were old, and its end.
-- {is_not_held} are conditions.
WITH page AS (
    SELECT seq, store_id, written_at_ms FROM {schema}.amends_barrier
    WHERE seq > $1::bigint ORDER BY seq LIMIT $2::bigint
), gone AS (
    DELETE FROM {schema}.amends_barrier AS b
    USING page AS p, {schema}.amends_barrier_stores AS s
    WHERE b.seq = p.seq AND p.written_at_ms < $3::bigint
        AND s.store_id = p.store_id AND p.written_at_ms < s.oldest_open_at_ms - $4::bigint
        {is_not_held}
    RETURNING b.seq
)
SELECT (SELECT count(*) FROM gone),
    (SELECT count(*) FROM page),
    (SELECT count(*) FROM page WHERE written_at_ms < $3::bigint),
    (SELECT max(seq) FROM page)
