-- name: turns_after
-- A stretch of the history of all sagas: the matching turns with their sagas, and last a row that says how far the
-- stretch goes (seq), how many turns it has (nth) and how many of them match (matches). What is looked at, told and
-- carried is bounded, each by its own limit; `nth` is a turn's place in the stretch, from which gaps can be told.
WITH looked_at AS MATERIALIZED (
    SELECT seq, saga_no, state, size, row_number() OVER (ORDER BY seq) AS nth
    FROM (
        SELECT seq, saga_no, state, length(records) AS size
        FROM history
        WHERE seq > :after_seq AND seq <= :head_seq
        ORDER BY seq
        LIMIT :looked_at
    )
),
matching AS MATERIALIZED (
    SELECT
        t.seq, t.nth,
        sum(t.size) OVER (ORDER BY t.seq) - t.size AS size_before
    FROM looked_at AS t
    CROSS JOIN sagas AS s ON s.saga_no = t.saga_no
    WHERE
        (:states IS NULL OR coalesce(nullif(t.state, 0), s.state) IN (SELECT value FROM json_each (:states)))
        AND (
            :labels IS NULL
            OR NOT EXISTS (
                SELECT 1 FROM json_each (:labels) AS wanted
                WHERE NOT EXISTS (
                    SELECT 1 FROM saga_labels AS l
                    WHERE l.key = wanted.key AND l.value = wanted.value AND l.saga_no = s.saga_no
                )
            )
        )
        AND {conditions}
)
SELECT
    m.seq, m.nth, NULL AS matches, h.state AS state_after, h.past_no_return AS past_after, h.version AS turn_version,
    h.format, h.records, {summary_columns}
FROM (SELECT * FROM matching WHERE size_before < :size ORDER BY seq LIMIT :turns) AS m
CROSS JOIN history AS h ON h.seq = m.seq
CROSS JOIN sagas AS s ON s.saga_no = h.saga_no
UNION ALL
SELECT
    max(seq), count(*), (SELECT count(*) FROM matching), NULL, NULL, NULL, NULL, NULL,
    NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL
FROM looked_at;
