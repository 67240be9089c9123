DO $schema$
BEGIN
    -- Once, as a whole: even CREATE INDEX IF NOT EXISTS would wait for the locks of what is in doubt.
    IF to_regclass('movements') IS NOT NULL THEN
        RETURN;
    END IF;

    -- Who has how much. The opening balance is never changed, so that the movements can be added up.
    CREATE TABLE accounts (
        account text PRIMARY KEY,
        opening_cents bigint NOT NULL,
        balance_cents bigint NOT NULL CHECK (balance_cents >= 0)
    );

    -- What has moved. A movement that was rolled back leaves a gap in the numbers.
    CREATE TABLE movements (
        seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        at_ms bigint NOT NULL,           -- UTC, for people
        clock_ns bigint NOT NULL,        -- the machine's monotonic clock
        saga_id text NOT NULL,
        step text NOT NULL,
        action text NOT NULL,            -- debit, credit
        key text NOT NULL,               -- the idempotency key of the call that voted for it
        account text NOT NULL,
        amount_cents bigint NOT NULL     -- what is taken has a minus
    );

    -- A list that can be corrected proves nothing.
    CREATE FUNCTION movements_are_append_only() RETURNS trigger LANGUAGE plpgsql AS $body$
    BEGIN
        RAISE EXCEPTION 'the movements are append-only';
    END
    $body$;
    CREATE TRIGGER movements_are_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON movements
        FOR EACH STATEMENT EXECUTE FUNCTION movements_are_append_only();

    INSERT INTO accounts (account, opening_cents, balance_cents)
        SELECT key, value::bigint, value::bigint FROM json_each_text('{openings}');
END
$schema$;
