-- What a saga was after each turn, for who watches: without it a saga that was stuck for a moment could be found only
-- by folding its history. State 0: the turn was written before this was kept.
ALTER TABLE history ADD COLUMN state INTEGER NOT NULL DEFAULT 0;
ALTER TABLE history ADD COLUMN past_no_return INTEGER NOT NULL DEFAULT 0;

-- Whether a participant was called with TLS when it was registered: it never is in plain text from then on, not even
-- when its files are gone from the configuration.
ALTER TABLE participants ADD COLUMN tls INTEGER NOT NULL DEFAULT 0 CHECK (tls IN (0, 1));

-- A client's own id of its request, so that a repeat after a lost answer does nothing.
ALTER TABLE audit ADD COLUMN request_id TEXT NOT NULL DEFAULT '';
CREATE UNIQUE INDEX audit_requests ON audit (request_id, verb, subject) WHERE request_id <> '';
