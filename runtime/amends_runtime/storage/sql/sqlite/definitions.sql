-- name: definitions
-- All of them, by name and version; the latest of a name is what new sagas get.
SELECT
    definition_no, version, content_hash, content, registered_at_ms, activated
FROM definitions
ORDER BY name, version;

-- name: insert_definition
-- A new content, which becomes the latest of its name.
INSERT INTO definitions (name, version, content_hash, content, registered_at_ms, activated)
SELECT
    :name,
    1 + coalesce((SELECT max(version) FROM definitions WHERE name = :name), 0),
    :content_hash,
    :content,
    :now_ms,
    1 + coalesce((SELECT max(activated) FROM definitions), 0)
FROM meta
WHERE epoch = :epoch
RETURNING definition_no;

-- name: activate_definition
-- A content that was there before becomes the latest of its name again.
UPDATE definitions
SET activated = 1 + (SELECT max(activated) FROM definitions)
WHERE content_hash = :content_hash AND (SELECT epoch FROM meta) = :epoch
RETURNING definition_no;
