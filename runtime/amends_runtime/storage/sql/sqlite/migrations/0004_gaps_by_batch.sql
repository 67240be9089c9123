-- A trigger that looked for the turn before each one cost a seventh of a commit; whoever commits now looks once for all
-- turns of a batch, in the same transaction (`commit.sql`). The unique index stays: no version is ever written twice.
DROP TRIGGER history_has_no_gaps;
