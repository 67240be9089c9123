-- What a saga was after each turn, for who watches: without it a saga that was stuck for a moment could be found only
-- by folding its history. State 0: the turn was written before this was kept.
ALTER TABLE history ADD COLUMN state INTEGER NOT NULL DEFAULT 0;
ALTER TABLE history ADD COLUMN past_no_return INTEGER NOT NULL DEFAULT 0;
