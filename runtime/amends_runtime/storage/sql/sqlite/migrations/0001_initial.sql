-- The first schema. A migration that has been released is never changed; the next one changes what it made.

-- Which store this is. `epoch` grows with every opening and is what every write compares.
-- The two floors keep numbers from being used again after the rows that had them were purged.
CREATE TABLE meta (
    only_row          INTEGER PRIMARY KEY CHECK (only_row = 1),
    store_id          TEXT    NOT NULL,
    incarnation       TEXT    NOT NULL,
    restored          INTEGER NOT NULL DEFAULT 0 CHECK (restored IN (0, 1)),
    epoch             INTEGER NOT NULL,
    saga_no_floor     INTEGER NOT NULL DEFAULT 0,
    seq_floor         INTEGER NOT NULL DEFAULT 0,
    created_at_ms     INTEGER NOT NULL
) STRICT;

-- Immutable contents, by hash. `activated` orders them by when they last became the one that new sagas get.
CREATE TABLE definitions (
    definition_no     INTEGER PRIMARY KEY,
    name              TEXT    NOT NULL,
    version           INTEGER NOT NULL CHECK (version > 0),
    content_hash      TEXT    NOT NULL UNIQUE,
    content           BLOB    NOT NULL,
    registered_at_ms  INTEGER NOT NULL,
    activated         INTEGER NOT NULL UNIQUE,
    UNIQUE (name, version)
) STRICT;

-- The truth: one row per saga and turn, appended and never changed. The unique index is the compare-and-set.
CREATE TABLE history (
    seq               INTEGER PRIMARY KEY,
    saga_no           INTEGER NOT NULL,
    version           INTEGER NOT NULL CHECK (version > 0),
    format            INTEGER NOT NULL,
    records           BLOB    NOT NULL,
    UNIQUE (saga_no, version)
) STRICT;

-- The other half of the compare-and-set: a turn follows the one before it.
CREATE TRIGGER history_has_no_gaps BEFORE INSERT ON history
WHEN NEW.version > 1
    AND NOT EXISTS (SELECT 1 FROM history WHERE saga_no = NEW.saga_no AND version = NEW.version - 1)
BEGIN
    SELECT RAISE (ABORT, 'a turn is missing before this one');
END;

CREATE TRIGGER history_is_append_only BEFORE UPDATE ON history
BEGIN
    SELECT RAISE (ABORT, 'history is append-only');
END;

-- The read model: what lists show. It can be rebuilt from the history.
CREATE TABLE sagas (
    saga_no           INTEGER PRIMARY KEY,
    saga_id           TEXT    NOT NULL UNIQUE,
    definition_no     INTEGER NOT NULL REFERENCES definitions (definition_no),
    state             INTEGER NOT NULL,
    version           INTEGER NOT NULL,
    started_at_ms     INTEGER NOT NULL,
    updated_at_ms     INTEGER NOT NULL,
    ended_at_ms       INTEGER NOT NULL,
    deadline_at_ms    INTEGER NOT NULL,
    wake_at_ms        INTEGER NOT NULL,
    past_no_return    INTEGER NOT NULL CHECK (past_no_return IN (0, 1)),
    labels            TEXT
) STRICT;

CREATE INDEX sagas_by_state ON sagas (state);

-- Recovery reads these, and they are few however many sagas have ended.
-- 1, 2, 3: RUNNING, COMPENSATING, STUCK.
CREATE INDEX sagas_open ON sagas (saga_no) WHERE state IN (1, 2, 3);

CREATE TABLE saga_labels (
    key               TEXT    NOT NULL,
    value             TEXT    NOT NULL,
    saga_no           INTEGER NOT NULL,
    PRIMARY KEY (key, value, saga_no)
) STRICT, WITHOUT ROWID;

-- What is left of purged sagas, so that their ids are never used again.
CREATE TABLE tombstones (
    saga_id           TEXT    PRIMARY KEY NOT NULL,
    content_hash      TEXT    NOT NULL,
    state             INTEGER NOT NULL,
    ended_at_ms       INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- Participants that an operator registered or re-pointed, over those of the configuration.
CREATE TABLE participants (
    name              TEXT    PRIMARY KEY NOT NULL,
    address           TEXT    NOT NULL,
    author            TEXT    NOT NULL,
    reason            TEXT    NOT NULL,
    at_ms             INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- Signals that were acknowledged, by the sender's own id, until their saga is purged.
CREATE TABLE signals (
    signal_no         INTEGER PRIMARY KEY,
    saga_id           TEXT    NOT NULL,
    signal_id         TEXT    NOT NULL,
    name              TEXT    NOT NULL,
    format            INTEGER NOT NULL,
    payload           BLOB    NOT NULL,
    at_ms             INTEGER NOT NULL,
    UNIQUE (saga_id, signal_id)
) STRICT;

-- What operators did that is no saga's history: to participants, breakers, the store.
CREATE TABLE audit (
    audit_no          INTEGER PRIMARY KEY,
    at_ms             INTEGER NOT NULL,
    author            TEXT    NOT NULL,
    verb              TEXT    NOT NULL,
    subject           TEXT    NOT NULL,
    reason            TEXT    NOT NULL,
    details           TEXT    NOT NULL
) STRICT;
