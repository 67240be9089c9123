-- The statements of prepared.py, for PostgreSQL. {schema} stands for the quoted schema in which the
-- tables were made.

-- name: create-tables
-- One row for each vote. `state` is voting, yes, no, aborted or lost; a yes lies inside the prepared
-- transaction, so who sees it sees a committed vote; who sees a voting sees that a handler has ended
-- its transaction by itself. `reply` is an amends.v1.Outcome, of a no alone.
-- `amends_votes_stores`, as in sqlite.sql: when the oldest open saga of each store was started.
CREATE TABLE IF NOT EXISTS {schema}.amends_votes (
    store_id text NOT NULL,
    saga_id text NOT NULL,
    step text NOT NULL,
    round integer NOT NULL,
    state text NOT NULL,
    request_hash bytea,
    reply bytea,
    written_at_ms bigint NOT NULL,
    PRIMARY KEY (store_id, saga_id, step, round)
);
CREATE TABLE IF NOT EXISTS {schema}.amends_votes_stores (
    store_id text PRIMARY KEY,
    oldest_open_at_ms bigint NOT NULL
)

-- name: check-tables
-- Fails if tables of these names have other columns.
SELECT v.store_id, v.saga_id, v.step, v.round, v.state, v.request_hash, v.reply, v.written_at_ms,
    s.store_id, s.oldest_open_at_ms
FROM {schema}.amends_votes AS v, {schema}.amends_votes_stores AS s LIMIT 0

-- name: max-prepared
-- How many prepared transactions the server keeps; 0: it takes none.
SELECT pg_catalog.current_setting('max_prepared_transactions')::integer

-- name: finish-safely
-- Before COMMIT PREPARED and ROLLBACK PREPARED, which no SET LOCAL can precede: a sync, whatever the
-- database says, and no time-out; one that strikes while a standby is waited for would not fail the
-- command but make it succeed without the standby.
SELECT pg_catalog.set_config('synchronous_commit', CASE
        WHEN pg_catalog.current_setting('synchronous_commit') = 'remote_apply' THEN 'remote_apply'
        ELSE 'on' END, false),
    pg_catalog.set_config('statement_timeout', '0', false)

-- name: place
-- Decides a vote: takes the lock of its life, if it is free, and the life's row, if there is none.
-- Gives a row if it did both; otherwise nothing has been written.
INSERT INTO {schema}.amends_votes
    (store_id, saga_id, step, round, state, request_hash, reply, written_at_ms)
SELECT $1::text, $2::text, $3::text, $4::integer, $5::text, $6::bytea, $7::bytea, $8::bigint
WHERE pg_catalog.pg_try_advisory_xact_lock($9::bigint)
ON CONFLICT DO NOTHING
RETURNING true

-- name: vote-yes
-- Right before PREPARE TRANSACTION: makes a yes of the row, if it is still as it was placed, and sees
-- to it that what follows is durable, as make-commit-safe does.
UPDATE {schema}.amends_votes SET state = 'yes'
WHERE store_id = $1::text AND saga_id = $2::text AND step = $3::text AND round = $4::integer
    AND state = 'voting'
RETURNING pg_catalog.set_config('synchronous_commit', CASE
        WHEN pg_catalog.current_setting('synchronous_commit') = 'remote_apply' THEN 'remote_apply'
        ELSE 'on' END, true),
    pg_catalog.set_config('statement_timeout', '0', true)

-- name: read-vote
-- The row of a life, if it is committed.
SELECT state, request_hash, reply FROM {schema}.amends_votes
WHERE store_id = $1::text AND saga_id = $2::text AND step = $3::text AND round = $4::integer

-- name: listed
-- What is prepared of one life, in this database: the server lists those of all.
SELECT gid FROM pg_prepared_xacts
WHERE database = current_database() AND starts_with(gid, $1::text)

-- name: wait-for-standbys
-- A commit of our own, after which all that lies before it in the log is as safe as commits are.
SELECT pg_catalog.pg_logical_emit_message(true, 'amends', '')

-- name: in-doubt
-- What is prepared in this database under names like ours, for how long, and which tables it has
-- locked. A prepared transaction has no process; its locks are found by the virtual number that
-- they share with the lock of its own number. Each vote has locked the table of votes in which its
-- row lies: $4 names the one that is meant, or is empty for all.
WITH held AS MATERIALIZED (
    SELECT locktype, transactionid, virtualtransaction, relation
    FROM pg_locks WHERE pid IS NULL AND granted
), tables AS MATERIALIZED (
    SELECT own.transactionid::text AS number, string_agg(DISTINCT t.oid::regclass::text, ', ') AS names
    FROM held AS own
    JOIN held AS l ON l.virtualtransaction = own.virtualtransaction AND l.locktype = 'relation'
    JOIN pg_class AS t ON t.oid = l.relation AND t.relkind IN ('r', 'p', 'm')
    WHERE own.locktype = 'transactionid' AND t.relname <> 'amends_votes'
    GROUP BY number
), votes AS MATERIALIZED (
    SELECT own.transactionid::text AS number
    FROM held AS own
    JOIN held AS l ON l.virtualtransaction = own.virtualtransaction AND l.locktype = 'relation'
    WHERE own.locktype = 'transactionid' AND l.relation = to_regclass(nullif($4::text, ''))
)
SELECT p.gid, floor(extract(epoch FROM p.prepared) * 1000)::bigint, p.owner::text,
    p.owner = current_user, tables.names
FROM pg_prepared_xacts AS p LEFT JOIN tables ON tables.number = p.transaction::text
WHERE p.database = current_database()
    AND starts_with(p.gid, $1::text)
    AND p.gid COLLATE "C" > $2::text
    AND p.prepared <= clock_timestamp() - $3::float8 * interval '1 second'
    AND ($4::text = '' OR p.transaction::text IN (SELECT number FROM votes))
ORDER BY p.gid COLLATE "C"

-- name: write-oldest-open
-- What a store says; see the statement of this name in sqlite.sql.
INSERT INTO {schema}.amends_votes_stores AS s (store_id, oldest_open_at_ms)
VALUES ($1::text, $2::bigint)
ON CONFLICT (store_id) DO UPDATE SET oldest_open_at_ms = excluded.oldest_open_at_ms
WHERE abs(s.oldest_open_at_ms - excluded.oldest_open_at_ms) > $3::bigint

-- name: purge
-- Some of the rows that were written before $1, and before the oldest saga that their store still
-- has open was started, $2 milliseconds of clock skew taken off. Rows of stores that have never said
-- stay.
DELETE FROM {schema}.amends_votes AS v USING (
    SELECT o.ctid
    FROM {schema}.amends_votes AS o JOIN {schema}.amends_votes_stores AS s USING (store_id)
    WHERE o.written_at_ms < $1::bigint AND o.written_at_ms < s.oldest_open_at_ms - $2::bigint
    LIMIT $3::integer
) AS old
WHERE v.ctid = old.ctid
RETURNING 1
