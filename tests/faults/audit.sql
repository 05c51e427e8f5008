-- What a trial writes down of every change, beside the tables of the engine and without their help.
-- The writer is whoever the connection says it is, not whom the row names.
CREATE SCHEMA audit;

CREATE TABLE audit.writes (
    seq bigserial PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    xact xid8 NOT NULL DEFAULT pg_current_xact_id(),
    what text NOT NULL,
    op text NOT NULL,
    run uuid,
    step text,
    status text,
    owner uuid,
    epoch integer,
    output bytea,
    error bytea,
    was_output bytea,
    was_error bytea,
    was_status text,
    writer uuid
);
-- Writes of a worker whose lease had been ended when they were committed.
CREATE TABLE audit.late (seq bigserial PRIMARY KEY, what text, run uuid, step text, writer uuid);
-- Where bodies write in the transaction of their checkpoint.
CREATE TABLE audit.ledger (key text, step text, nonce text);

CREATE FUNCTION audit.writer() RETURNS uuid LANGUAGE sql STABLE AS $$
    SELECT substring(current_setting('application_name') FROM '^kagzi:([0-9a-f-]{36})$')::uuid
$$;

CREATE FUNCTION audit.note_step() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        INSERT INTO audit.writes (what, op, run, step, status, output, error, writer)
        VALUES ('step', TG_OP, NEW.run_id, NEW.step_id, NEW.status, NEW.output, NEW.error,
            audit.writer());
    ELSIF TG_OP = 'UPDATE' THEN
        INSERT INTO audit.writes (what, op, run, step, status, output, error, was_status,
            was_output, was_error, writer)
        VALUES ('step', TG_OP, NEW.run_id, NEW.step_id, NEW.status, NEW.output, NEW.error,
            OLD.status, OLD.output, OLD.error, audit.writer());
    ELSE
        INSERT INTO audit.writes (what, op, run, step, status, was_output, writer)
        VALUES ('step', TG_OP, OLD.run_id, OLD.step_id, OLD.status, OLD.output, audit.writer());
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON kagzi.step_runs
    FOR EACH ROW EXECUTE FUNCTION audit.note_step();

CREATE FUNCTION audit.note_run() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO audit.writes (what, op, run, status, owner, epoch, output, was_status, writer)
    VALUES ('run', TG_OP, NEW.id, NEW.status, NEW.worker_id, NEW.epoch, NEW.output,
        CASE WHEN TG_OP = 'UPDATE' THEN OLD.status END, audit.writer());
    RETURN NULL;
END $$;
CREATE TRIGGER audit AFTER INSERT OR UPDATE ON kagzi.workflow_runs
    FOR EACH ROW EXECUTE FUNCTION audit.note_run();

CREATE FUNCTION audit.note_other() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_TABLE_NAME = 'parallel_groups' THEN
        INSERT INTO audit.writes (what, op, run, step, status, epoch, writer)
        VALUES ('group', TG_OP, NEW.run_id, NEW.path, NEW.decision, NEW.decided_index,
            audit.writer());
    ELSIF TG_TABLE_NAME = 'step_attempts' THEN
        INSERT INTO audit.writes (what, op, run, step, epoch, writer)
        VALUES ('attempt', TG_OP, NEW.run_id, NEW.step_id, NEW.attempt, audit.writer());
    ELSIF TG_OP = 'INSERT' OR NEW.status IS DISTINCT FROM OLD.status THEN
        INSERT INTO audit.writes (what, op, owner, status) VALUES ('worker', TG_OP, NEW.id, NEW.status);
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER audit AFTER INSERT OR UPDATE ON kagzi.parallel_groups
    FOR EACH ROW EXECUTE FUNCTION audit.note_other();
CREATE TRIGGER audit AFTER INSERT OR UPDATE ON kagzi.step_attempts
    FOR EACH ROW EXECUTE FUNCTION audit.note_other();
CREATE TRIGGER audit AFTER INSERT OR UPDATE ON kagzi.workers
    FOR EACH ROW EXECUTE FUNCTION audit.note_other();

CREATE FUNCTION audit.look_at_commit() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM kagzi.workers WHERE id = audit.writer() AND status = 'ended') THEN
        INSERT INTO audit.late (what, run, step, writer)
        VALUES (TG_TABLE_NAME, (to_jsonb(NEW)->>'run_id')::uuid,
            coalesce(to_jsonb(NEW)->>'step_id', to_jsonb(NEW)->>'path'), audit.writer());
    END IF;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER late AFTER INSERT OR UPDATE ON kagzi.step_runs
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION audit.look_at_commit();
CREATE CONSTRAINT TRIGGER late AFTER INSERT OR UPDATE ON kagzi.parallel_groups
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION audit.look_at_commit();
CREATE CONSTRAINT TRIGGER late AFTER INSERT OR UPDATE ON kagzi.step_attempts
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION audit.look_at_commit();
