-- name: count_tables
-- Whether the file holds anything at all.
SELECT count(*) FROM sqlite_schema;

-- name: create_meta
-- The one row of a new store; one that has sagas is not new.
INSERT INTO meta (only_row, store_id, incarnation, epoch, created_at_ms)
SELECT 1, :store_id, :incarnation, 0, :now_ms
WHERE NOT EXISTS (SELECT 1 FROM history);

-- name: identity
-- Which store this is. The last is the number of the last saga from before its last restore, confirmed or not.
SELECT store_id, incarnation, restored, epoch, restored_through_no FROM meta;

-- name: take_ownership
-- The next epoch: from this commit on every earlier owner's writes are refused.
UPDATE meta SET epoch = epoch + 1;

-- name: keep_incarnations
-- A store that is not the one that was last open here: what it was until now, and what was open here, if that was a
-- copy of it (:incarnation_beside, or null). In the same transaction as the next one.
INSERT INTO earlier_incarnations (incarnation)
SELECT incarnation FROM meta
UNION
SELECT :incarnation_beside WHERE :incarnation_beside IS NOT NULL
ON CONFLICT DO NOTHING;

-- name: mark_restored
-- And the next epoch, of a new incarnation; it says that it is restored until an operator confirms, and which sagas
-- are from before that.
UPDATE meta SET
    epoch = max(epoch, :epoch_beside) + 1, incarnation = :incarnation, restored = 1,
    restored_through_no = :saga_no;

-- name: earlier_incarnations
-- What this store was before it was restored.
SELECT incarnation FROM earlier_incarnations;

-- name: confirmation_view
-- What a confirmation inserts into, as a commit does into its own view: see `participant_view`.
CREATE TEMP VIEW confirmation (epoch, author, reason, at_ms, request_id) AS
SELECT NULL, NULL, NULL, NULL, NULL WHERE FALSE;

-- name: confirmation_trigger
-- The epoch is compared, the store is no longer marked, the audit entry appended.
CREATE TEMP TRIGGER confirm_restore INSTEAD OF INSERT ON confirmation
BEGIN
    SELECT RAISE (ABORT, 'the epoch has moved on') FROM meta WHERE epoch <> NEW.epoch;
    UPDATE meta SET restored = 0;
    INSERT INTO audit (at_ms, author, verb, subject, reason, request_id, details)
    SELECT
        NEW.at_ms, NEW.author, 'confirm_restore', incarnation, NEW.reason, NEW.request_id,
        'with what it knows of ' || coalesce(
            (
                SELECT group_concat (incarnation, ', ')
                FROM (SELECT incarnation FROM earlier_incarnations ORDER BY incarnation)
            ),
            'nothing'
        )
    FROM meta;
END;

-- name: confirm_restore
-- Takes a restored store for the truth.
INSERT INTO confirmation VALUES (:epoch, :author, :reason, :at_ms, :request_id);

-- name: highest_numbers
-- The numbers from which new ones are counted.
SELECT
    max(seq_floor, coalesce((SELECT max(seq) FROM history), 0)),
    max(saga_no_floor, coalesce((SELECT max(saga_no) FROM sagas), 0), coalesce((SELECT max(saga_no) FROM history), 0))
FROM meta;
