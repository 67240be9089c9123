-- name: load
-- Histories and tombstones of the sagas whose ids are in the JSON array. An unknown id has neither.
SELECT
    wanted.value, s.saga_no, s.definition_no, s.wake_at_ms, h.seq, h.version, h.format, h.records,
    t.content_hash, t.state, t.ended_at_ms, t.decision, t.round
FROM json_each (:saga_ids) AS wanted
LEFT JOIN sagas AS s ON s.saga_id = wanted.value
LEFT JOIN history AS h ON h.saga_no = s.saga_no
LEFT JOIN tombstones AS t ON t.saga_id = wanted.value
ORDER BY wanted.id, h.version;

-- name: open_sagas
-- A page of those in one state that have not ended and do not rest, lowest number first. Without the hint SQLite takes
-- the index by state, which has those that rest among them.
SELECT s.saga_no, s.saga_id, s.definition_no
FROM sagas AS s INDEXED BY sagas_open
WHERE s.state IN (1, 2, 3) AND s.wake_at_ms = 0 AND s.state = :state AND s.saga_no > :after_no
ORDER BY s.saga_no
LIMIT :limit;

-- name: resting_sagas
-- A page of those that rest at most until an instant, earliest first. The first page begins after the instant 0, which
-- those have that do not rest; a condition of its own for that would be where SQLite begins to read, page by page.
SELECT s.wake_at_ms, s.state, s.saga_no, s.saga_id, s.definition_no
FROM sagas AS s INDEXED BY sagas_open
WHERE
    s.state IN (1, 2, 3) AND s.wake_at_ms <= :until_ms
    AND (s.wake_at_ms, s.state, s.saga_no) > (:after_ms, :after_state, :after_no)
    AND s.updated_at_ms > :updated_after_ms
ORDER BY s.wake_at_ms, s.state, s.saga_no
LIMIT :limit;

-- name: count_resting
-- How many rest, by state, and when the last row of them was written; from the index alone.
SELECT s.state, count(*), max(s.updated_at_ms)
FROM sagas AS s INDEXED BY sagas_open
WHERE s.state IN (1, 2, 3) AND s.wake_at_ms > 0
GROUP BY s.state;

-- name: oldest_open
-- When the oldest of those that have not ended was started; from the index alone.
SELECT min(s.started_at_ms)
FROM sagas AS s INDEXED BY sagas_open
WHERE s.state IN (1, 2, 3);

-- name: turns_of
-- Whole histories of the sagas whose numbers are in the JSON array.
SELECT h.saga_no, h.seq, h.version, h.format, h.records
FROM json_each (:saga_nos) AS wanted
CROSS JOIN history AS h ON h.saga_no = wanted.value
ORDER BY h.saga_no, h.version;

-- name: summary_columns
-- A row of the read model, in the order in which it is decoded.
s.saga_no, s.saga_id, s.definition_no, s.state, s.version, s.started_at_ms, s.updated_at_ms, s.ended_at_ms,
s.deadline_at_ms, s.wake_at_ms, s.past_no_return, s.labels

-- name: conditions
-- What every list can be narrowed by.
s.saga_no < :before_no
AND (
    :definition_name IS NULL
    OR s.definition_no IN (SELECT definition_no FROM definitions WHERE name = :definition_name)
)
AND s.started_at_ms >= :started_from_ms
AND s.started_at_ms < :started_before_ms

-- name: list_sagas
-- Newest first.
SELECT {summary_columns}
FROM sagas AS s
WHERE {conditions}
ORDER BY s.saga_no DESC
LIMIT :limit;

-- name: list_sagas_in_state
-- Those of one state, through its index.
SELECT {summary_columns}
FROM sagas AS s INDEXED BY sagas_by_state
WHERE s.state = :state AND {conditions}
ORDER BY s.saga_no DESC
LIMIT :limit;

-- name: list_sagas_with_label
-- Those with a label, through its index; :labels are all that are wanted, as JSON, the first one among them.
SELECT {summary_columns}
FROM saga_labels AS l
CROSS JOIN sagas AS s ON s.saga_no = l.saga_no
WHERE
    l.key = :label_key AND l.value = :label_value
    AND l.saga_no < :before_no
    AND (:states IS NULL OR s.state IN (SELECT value FROM json_each (:states)))
    AND NOT EXISTS (
        SELECT 1 FROM json_each (:labels) AS wanted
        WHERE NOT EXISTS (
            SELECT 1 FROM saga_labels AS other
            WHERE other.key = wanted.key AND other.value = wanted.value AND other.saga_no = l.saga_no
        )
    )
    AND {conditions}
ORDER BY l.saga_no DESC
LIMIT :limit;

-- name: count_by_state
-- How many there are of each state, from the index alone.
SELECT s.state, count(*) FROM sagas AS s GROUP BY s.state;
