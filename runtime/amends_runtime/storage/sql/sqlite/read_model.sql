-- name: saga_numbers
-- A page of all sagas that have a history or a row of the read model, or wrongly only one of them.
SELECT saga_no FROM history WHERE version = 1 AND saga_no > :after_no
UNION
SELECT saga_no FROM sagas WHERE saga_no > :after_no
ORDER BY 1
LIMIT :limit;

-- name: summaries_of
-- Rows of the read model, by number.
SELECT {summary_columns}
FROM json_each (:saga_nos) AS wanted
CROSS JOIN sagas AS s ON s.saga_no = wanted.value
ORDER BY s.saga_no;

-- name: after_turns
-- What is kept beside the turns of these sagas, for its proof.
SELECT h.saga_no, h.version, h.state, h.past_no_return
FROM json_each (:saga_nos) AS wanted
CROSS JOIN history AS h ON h.saga_no = wanted.value
ORDER BY h.saga_no, h.version;

-- name: clear_sagas
-- The first of the four steps of a rebuild, all in one transaction.
DELETE FROM sagas;

-- name: clear_labels
-- The second step.
DELETE FROM saga_labels;

-- name: insert_summaries
-- The third step, page by page: :rows is a JSON array of rows in the order of the columns.
INSERT INTO sagas (
    saga_no, version, saga_id, definition_no, state, started_at_ms, updated_at_ms, ended_at_ms, deadline_at_ms,
    wake_at_ms, past_no_return, labels
)
SELECT
    row.value ->> 0, row.value ->> 1, row.value ->> 2, row.value ->> 3, row.value ->> 4, row.value ->> 5,
    row.value ->> 6, row.value ->> 7, row.value ->> 8, row.value ->> 9, row.value ->> 10, nullif (row.value ->> 11, '')
FROM json_each (:rows) AS row;

-- name: insert_labels
-- The last step: labels by key and value, from the rows.
INSERT INTO saga_labels (key, value, saga_no)
SELECT label.key, label.value, s.saga_no
FROM sagas AS s, json_each (s.labels) AS label
WHERE s.labels IS NOT NULL;
