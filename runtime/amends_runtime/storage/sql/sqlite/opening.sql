-- name: count_tables
-- Whether the file holds anything at all.
SELECT count(*) FROM sqlite_schema;

-- name: create_meta
-- The one row of a new store; one that has sagas is not new.
INSERT INTO meta (only_row, store_id, incarnation, epoch, created_at_ms)
SELECT 1, :store_id, :incarnation, 0, :now_ms
WHERE NOT EXISTS (SELECT 1 FROM history);

-- name: identity
-- Which store this is.
SELECT store_id, incarnation, restored, epoch FROM meta;

-- name: take_ownership
-- The next epoch: from this commit on every earlier owner's writes are refused.
UPDATE meta SET epoch = epoch + 1;

-- name: mark_restored
-- The same for a store that is not the one that was last open here; it says so until an operator confirms.
UPDATE meta SET epoch = max(epoch, :epoch_beside) + 1, incarnation = :incarnation, restored = 1;

-- name: highest_numbers
-- The numbers from which new ones are counted.
SELECT
    max(seq_floor, coalesce((SELECT max(seq) FROM history), 0)),
    max(saga_no_floor, coalesce((SELECT max(saga_no) FROM sagas), 0), coalesce((SELECT max(saga_no) FROM history), 0))
FROM meta;
