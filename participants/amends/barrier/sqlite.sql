-- The barrier's statements for SQLite. The marks /* amends */ keep the texts apart from those of
-- authors: Python caches prepared statements by their text, and a cached COMMIT of ours would pass
-- the guard that refuses theirs.

-- name: create-table
-- One row for each verb of a step's life. `seq` grows with time, so that a purge by age reads only
-- the oldest rows and needs no index; `state` is done, rejected or fenced; a fence has no hash and
-- no reply; `reply` is an amends.v1.Outcome; `written_at_ms` is UTC.
CREATE TABLE IF NOT EXISTS amends_barrier (
    seq INTEGER PRIMARY KEY,
    store_id TEXT NOT NULL,
    saga_id TEXT NOT NULL,
    step TEXT NOT NULL,
    round INTEGER NOT NULL,
    verb TEXT NOT NULL,
    state TEXT NOT NULL,
    request_hash BLOB,
    reply BLOB,
    written_at_ms INTEGER NOT NULL,
    UNIQUE (store_id, saga_id, step, round, verb)
)

-- name: check-table
-- Fails if a table of this name has other columns.
SELECT seq, store_id, saga_id, step, round, verb, state, request_hash, reply, written_at_ms
FROM amends_barrier LIMIT 0

-- name: create-stores-table
-- One row for each store that has called: when the oldest of its sagas that were open was started,
-- UTC, by the last word that we have. What was started before has ended, whatever comes later.
CREATE TABLE IF NOT EXISTS amends_barrier_stores (
    store_id TEXT PRIMARY KEY,
    oldest_open_at_ms INTEGER NOT NULL
)

-- name: check-stores-table
-- Fails if a table of this name has other columns.
SELECT store_id, oldest_open_at_ms FROM amends_barrier_stores LIMIT 0

-- name: begin
-- Takes the write lock at once: BEGIN, read, write would fail with SQLITE_BUSY_SNAPSHOT.
BEGIN IMMEDIATE /* amends */

-- name: set-savepoint
-- Where a refusal rolls back to: what other calls of the transaction wrote before it stays.
SAVEPOINT amends_effect /* amends */

-- name: keep-effect
-- Ends a handler's savepoint, and those that it has left open in it, before the next one's.
RELEASE amends_effect /* amends */

-- name: roll-back-effect
-- Undoes what the handler wrote and keeps the lock.
ROLLBACK TO amends_effect /* amends */

-- name: commit
-- Effects, rows and replies together; releases the savepoint, too.
COMMIT /* amends */

-- name: roll-back
-- Nothing stays.
ROLLBACK /* amends */

-- name: read-rows
-- The rows of some lives, at most three of each; {lives} stands for one (?, ?, ?, ?) per life.
-- CROSS JOIN begins with the lives and looks each up in the index; with `IN (VALUES ...)` SQLite
-- reads the whole table.
WITH life (store_id, saga_id, step, round) AS (VALUES {lives})
SELECT b.store_id, b.saga_id, b.step, b.round, b.verb, b.state, b.request_hash, b.reply
FROM life CROSS JOIN amends_barrier AS b
ON b.store_id = life.store_id AND b.saga_id = life.saga_id
AND b.step = life.step AND b.round = life.round

-- name: write-rows
-- {rows} stands for one (?, ?, ?, ?, ?, ?, ?, ?, ?) per row. The unique index is the claim: whoever
-- inserts first has decided.
INSERT INTO amends_barrier
    (store_id, saga_id, step, round, verb, state, request_hash, reply, written_at_ms)
VALUES {rows}

-- name: read-oldest
-- A page of the oldest rows behind a position, for a purge.
SELECT seq, store_id, written_at_ms FROM amends_barrier WHERE seq > ? ORDER BY seq LIMIT ?

-- name: has-holds
-- Whether there are reservations.
SELECT 1 FROM main.sqlite_master WHERE type = 'table' AND name = 'amends_reservations'

-- name: read-held
-- The rows of lives that hold something: a vote is not forgotten before it is told.
SELECT b.seq FROM amends_reservations AS h CROSS JOIN amends_barrier AS b
ON b.store_id = h.store_id AND b.saga_id = h.saga_id AND b.step = h.step AND b.round = h.round

-- name: delete-row
-- One row that a purge has judged.
DELETE FROM amends_barrier WHERE seq = ?

-- name: write-oldest-open
-- What a store says, unless what it has said is about the same. Also if it is older: a runtime whose
-- store was restored has sagas open that had ended.
INSERT INTO amends_barrier_stores (store_id, oldest_open_at_ms) VALUES (?1, ?2)
ON CONFLICT (store_id) DO UPDATE SET oldest_open_at_ms = ?2
WHERE abs(oldest_open_at_ms - ?2) > ?3

-- name: read-oldest-open
-- What each store has said.
SELECT store_id, oldest_open_at_ms FROM amends_barrier_stores
