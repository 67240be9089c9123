-- name: participants
-- Those that an operator registered, over those of the configuration.
SELECT name, address, tls FROM participants ORDER BY name;

-- name: audit
-- What operators did that is no saga's history, newest first.
SELECT verb, subject, details, author, reason, at_ms, request_id
FROM audit
ORDER BY audit_no DESC
LIMIT :limit;

-- name: find_request
-- Whether this request was carried out before: one row, or none. An empty id is nobody's.
SELECT 1 FROM audit
WHERE request_id = :request_id AND verb = :verb AND subject = :subject AND request_id <> '';

-- name: participant_view
-- What a change inserts into, as a commit does into its own view: the change and its audit entry are one statement
-- and its own transaction. An empty address removes.
CREATE TEMP VIEW participant_change (epoch, name, address, tls, author, reason, at_ms, request_id) AS
SELECT NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL WHERE FALSE;

-- name: participant_trigger
-- The epoch is compared, the row written or removed, the audit entry appended.
CREATE TEMP TRIGGER change_participant INSTEAD OF INSERT ON participant_change
BEGIN
    SELECT RAISE (ABORT, 'the epoch has moved on') FROM meta WHERE epoch <> NEW.epoch;
    INSERT INTO audit (at_ms, author, verb, subject, reason, request_id, details)
    SELECT
        NEW.at_ms, NEW.author, iif (NEW.address = '', 'remove_participant', 'put_participant'), NEW.name, NEW.reason,
        NEW.request_id,
        iif (
            NEW.address = '',
            'was at ' || (SELECT address FROM participants WHERE name = NEW.name),
            'at ' || NEW.address || iif (NEW.tls, ', with TLS', '')
        );
    DELETE FROM participants WHERE name = NEW.name AND NEW.address = '';
    INSERT INTO participants (name, address, tls, author, reason, at_ms)
    SELECT NEW.name, NEW.address, NEW.tls, NEW.author, NEW.reason, NEW.at_ms
    WHERE NEW.address <> ''
    ON CONFLICT (name) DO UPDATE SET
        address = excluded.address, tls = excluded.tls, author = excluded.author, reason = excluded.reason,
        at_ms = excluded.at_ms;
END;

-- name: change_participant
-- Registers one, or with an empty address removes it.
INSERT INTO participant_change VALUES (:epoch, :name, :address, :tls, :author, :reason, :at_ms, :request_id);
