-- name: turn_view
-- What a commit inserts into: a view without rows, of which a trigger makes the rows of all tables. So a batch
-- of any kind is one statement and its own transaction: it cannot be left half-way, and beside a busy event loop
-- it waits for the interpreter lock once. Temporary, so that it changes with the program and needs no migration.
CREATE TEMP VIEW turn (
    epoch, format, seq, saga_no, version, records, state_after, past_after,
    saga_id, definition_no, state, started_at_ms, updated_at_ms, ended_at_ms, deadline_at_ms, wake_at_ms,
    past_no_return, labels
) AS
SELECT NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL
WHERE FALSE;

-- name: turn_trigger
-- One transition: the epoch is compared, the turn appended, the read model's row written if there is one.
CREATE TEMP TRIGGER commit_turn INSTEAD OF INSERT ON turn
BEGIN
    SELECT RAISE (ABORT, 'the epoch has moved on') FROM meta WHERE epoch <> NEW.epoch;
    SELECT RAISE (ABORT, 'the id is a purged saga''s')
    FROM tombstones WHERE NEW.version = 1 AND saga_id = NEW.saga_id;
    INSERT INTO history (seq, saga_no, version, format, records, state, past_no_return)
    VALUES (NEW.seq, NEW.saga_no, NEW.version, NEW.format, NEW.records, NEW.state_after, NEW.past_after);
    INSERT INTO sagas (
        saga_no, saga_id, definition_no, state, version, started_at_ms, updated_at_ms, ended_at_ms,
        deadline_at_ms, wake_at_ms, past_no_return, labels
    )
    SELECT
        NEW.saga_no, NEW.saga_id, NEW.definition_no, NEW.state, NEW.version, NEW.started_at_ms,
        NEW.updated_at_ms, NEW.ended_at_ms, NEW.deadline_at_ms, NEW.wake_at_ms, NEW.past_no_return,
        nullif (NEW.labels, '')
    WHERE NEW.state <> 0
    ON CONFLICT (saga_no) DO UPDATE SET
        state = excluded.state,
        version = excluded.version,
        updated_at_ms = excluded.updated_at_ms,
        ended_at_ms = excluded.ended_at_ms,
        deadline_at_ms = excluded.deadline_at_ms,
        wake_at_ms = excluded.wake_at_ms,
        past_no_return = excluded.past_no_return;
END;

-- name: turn_labels_trigger
-- Labels are fixed at the start, so only the first turn writes them.
CREATE TEMP TRIGGER commit_labels INSTEAD OF INSERT ON turn
WHEN NEW.version = 1 AND NEW.labels <> ''
BEGIN
    INSERT INTO saga_labels (key, value, saga_no)
    SELECT key, value, NEW.saga_no FROM json_each (NEW.labels);
END;

-- name: append
-- A batch of transitions. Rows of 0 fill it up to one of a few sizes, so that few statements are prepared; a row
-- whose state is 0 has no summary.
INSERT INTO turn
SELECT
    ?1, ?2, column1, column2, column3, column4, column5, column6, column7, column8, column9, column10, column11,
    column12, column13, column14, column15, column16
FROM (VALUES {rows})
WHERE column1 <> 0;

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
