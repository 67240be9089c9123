-- Recovery reads those of these that do not rest, those that compensate first; the rest is read when its time comes.
-- 1, 2, 3: RUNNING, COMPENSATING, STUCK. The last two columns are for questions that then need not look at the rows:
-- the first is never changed, the other only with the row, which is written when what leads here changes.
DROP INDEX sagas_open;
CREATE INDEX sagas_open ON sagas (wake_at_ms, state, saga_no, started_at_ms, updated_at_ms) WHERE state IN (1, 2, 3);
