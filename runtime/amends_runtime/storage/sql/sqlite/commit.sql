-- name: places
-- To count with: a batch's n-th turn and n-th summary stand at place n, from 0.
CREATE TEMP TABLE place (n INTEGER PRIMARY KEY);

-- name: fill_places
-- As many as one statement may have turns.
INSERT INTO place
WITH RECURSIVE counted (n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM counted WHERE n + 1 < :places)
SELECT n FROM counted;

-- name: batch_view
-- What a commit inserts into, one row a batch: a view without rows, of which triggers make the rows of all tables. So a
-- batch is one statement and its own transaction: it cannot be left half-way, and beside a busy event loop it waits for
-- the interpreter lock once. Temporary, so that it changes with the program and needs no migration.
CREATE TEMP VIEW batch (epoch, format, seq_before, turn_count, turns, summary_count, summaries, labelled, data) AS
SELECT NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL
WHERE FALSE;

-- name: packed_turns
-- The turns of NEW, taken apart as `batches.py` says: 18 digits behind a 1, from one number to the next 20 bytes.
SELECT
    n,
    cast(substr(NEW.turns, 3 + 120 * n, 18) AS INTEGER) AS saga_no,
    cast(substr(NEW.turns, 23 + 120 * n, 18) AS INTEGER) AS version,
    substr(
        NEW.data,
        cast(substr(NEW.turns, 43 + 120 * n, 18) AS INTEGER),
        cast(substr(NEW.turns, 63 + 120 * n, 18) AS INTEGER)
    ) AS records,
    cast(substr(NEW.turns, 83 + 120 * n, 18) AS INTEGER) AS state,
    cast(substr(NEW.turns, 103 + 120 * n, 18) AS INTEGER) AS past_no_return
FROM place
WHERE n < NEW.turn_count

-- name: packed_summaries
-- The summaries of NEW, likewise. The labels lie behind the id; without any nobody looks for them.
SELECT
    cast(substr(NEW.summaries, 3 + 260 * n, 18) AS INTEGER) AS saga_no,
    cast(substr(NEW.summaries, 23 + 260 * n, 18) AS INTEGER) AS version,
    cast(substr(
        NEW.data,
        cast(substr(NEW.summaries, 43 + 260 * n, 18) AS INTEGER),
        cast(substr(NEW.summaries, 63 + 260 * n, 18) AS INTEGER)
    ) AS TEXT) AS saga_id,
    iif(NEW.labelled, nullif(cast(substr(
        NEW.data,
        cast(substr(NEW.summaries, 43 + 260 * n, 18) AS INTEGER)
            + cast(substr(NEW.summaries, 63 + 260 * n, 18) AS INTEGER),
        cast(substr(NEW.summaries, 83 + 260 * n, 18) AS INTEGER)
    ) AS TEXT), ''), NULL) AS labels,
    cast(substr(NEW.summaries, 103 + 260 * n, 18) AS INTEGER) AS definition_no,
    cast(substr(NEW.summaries, 123 + 260 * n, 18) AS INTEGER) AS state,
    cast(substr(NEW.summaries, 143 + 260 * n, 18) AS INTEGER) AS started_at_ms,
    cast(substr(NEW.summaries, 163 + 260 * n, 18) AS INTEGER) AS updated_at_ms,
    cast(substr(NEW.summaries, 183 + 260 * n, 18) AS INTEGER) AS ended_at_ms,
    cast(substr(NEW.summaries, 203 + 260 * n, 18) AS INTEGER) AS deadline_at_ms,
    (cast(substr(NEW.summaries, 223 + 260 * n, 18) AS INTEGER) - 1) & 9223372036854775807 AS wake_at_ms,
    cast(substr(NEW.summaries, 243 + 260 * n, 18) AS INTEGER) AS past_no_return
FROM place
WHERE n < NEW.summary_count

-- name: batch_trigger
-- All of a batch: the epoch is compared, the turns are appended, no saga has a gap, the read model's rows are written.
-- Hardly any store has tombstones, and without any nobody's id is looked at.
CREATE TEMP TRIGGER commit_batch INSTEAD OF INSERT ON batch
BEGIN
    SELECT RAISE (ABORT, 'the epoch has moved on') FROM meta WHERE epoch <> NEW.epoch;

    INSERT INTO history (seq, saga_no, version, format, records, state, past_no_return)
    SELECT NEW.seq_before + 1 + n, saga_no, version, NEW.format, records, state, past_no_return
    FROM ({packed_turns});

    SELECT RAISE (ABORT, 'a turn is missing before this one')
    FROM history AS h
    WHERE
        h.seq > NEW.seq_before AND h.version > 1
        AND NOT EXISTS (SELECT 1 FROM history AS b WHERE b.saga_no = h.saga_no AND b.version = h.version - 1);

    SELECT RAISE (ABORT, 'the id is a purged saga''s')
    FROM ({packed_summaries}) AS s
    CROSS JOIN tombstones AS t ON t.saga_id = s.saga_id
    WHERE EXISTS (SELECT 1 FROM tombstones) AND s.version = 1;

    INSERT INTO sagas (
        saga_no, version, saga_id, labels, definition_no, state, started_at_ms, updated_at_ms, ended_at_ms,
        deadline_at_ms, wake_at_ms, past_no_return
    )
    SELECT
        saga_no, version, saga_id, labels, definition_no, state, started_at_ms, updated_at_ms, ended_at_ms,
        deadline_at_ms, wake_at_ms, past_no_return
    FROM ({packed_summaries})
    WHERE TRUE
    ON CONFLICT (saga_no) DO UPDATE SET
        state = excluded.state,
        version = excluded.version,
        updated_at_ms = excluded.updated_at_ms,
        ended_at_ms = excluded.ended_at_ms,
        deadline_at_ms = excluded.deadline_at_ms,
        wake_at_ms = excluded.wake_at_ms,
        past_no_return = excluded.past_no_return;
END;

-- name: batch_labels_trigger
-- Labels are fixed at the start, so only the first turn writes them.
CREATE TEMP TRIGGER commit_labels INSTEAD OF INSERT ON batch
WHEN NEW.labelled
BEGIN
    INSERT INTO saga_labels (key, value, saga_no)
    SELECT label.key, label.value, s.saga_no
    FROM ({packed_summaries}) AS s
    CROSS JOIN json_each (s.labels) AS label
    WHERE s.version = 1;
END;

-- name: append
-- A batch of transitions, packed.
INSERT INTO batch VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?);

-- name: conflicts
-- Which of the transitions cannot follow what is stored, and why: the version, the id, or a tombstone.
-- :wanted is a JSON array of [saga_no, version, saga_id or null], the lowest version of each saga.
SELECT wanted.value ->> 0
FROM json_each (:wanted) AS wanted
WHERE
    (wanted.value ->> 1) - 1
        <> coalesce((SELECT max(version) FROM history WHERE saga_no = wanted.value ->> 0), 0)
    OR EXISTS (
        SELECT 1 FROM sagas WHERE saga_id = wanted.value ->> 2 AND saga_no <> wanted.value ->> 0
    )
    OR (
        wanted.value ->> 1 = 1
        AND EXISTS (SELECT 1 FROM tombstones WHERE saga_id = wanted.value ->> 2)
    );

-- name: epoch
-- Whose store it is now.
SELECT epoch FROM meta;
