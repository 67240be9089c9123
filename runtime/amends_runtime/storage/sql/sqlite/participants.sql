-- name: participants
-- Those that an operator registered, over those of the configuration.
SELECT name, address FROM participants ORDER BY name;

-- name: audit
-- What operators did that is no saga's history, newest first.
SELECT verb, subject, details, author, reason, at_ms
FROM audit
ORDER BY audit_no DESC
LIMIT :limit;

-- name: participant_view
-- What a change inserts into, as a commit does into its own view: the change and its audit entry are one statement
-- and its own transaction. An empty address removes.
CREATE TEMP VIEW participant_change (epoch, name, address, author, reason, at_ms) AS
SELECT NULL, NULL, NULL, NULL, NULL, NULL WHERE FALSE;

-- name: participant_trigger
-- The epoch is compared, the row written or removed, the audit entry appended.
CREATE TEMP TRIGGER change_participant INSTEAD OF INSERT ON participant_change
BEGIN
    SELECT RAISE (ABORT, 'the epoch has moved on') FROM meta WHERE epoch <> NEW.epoch;
    INSERT INTO audit (at_ms, author, verb, subject, reason, details)
    SELECT
        NEW.at_ms, NEW.author, iif (NEW.address = '', 'remove_participant', 'put_participant'), NEW.name, NEW.reason,
        iif (
            NEW.address = '',
            'was at ' || (SELECT address FROM participants WHERE name = NEW.name),
            'at ' || NEW.address
        );
    DELETE FROM participants WHERE name = NEW.name AND NEW.address = '';
    INSERT INTO participants (name, address, author, reason, at_ms)
    SELECT NEW.name, NEW.address, NEW.author, NEW.reason, NEW.at_ms
    WHERE NEW.address <> ''
    ON CONFLICT (name) DO UPDATE SET
        address = excluded.address, author = excluded.author, reason = excluded.reason, at_ms = excluded.at_ms;
END;

-- name: change_participant
-- Registers one, or with an empty address removes it.
INSERT INTO participant_change VALUES (:epoch, :name, :address, :author, :reason, :at_ms);
