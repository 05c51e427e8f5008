-- kagzi, schema 4: workflows that start by the clock.
--
-- The tickers of all workers read what is due, work out the ticks, and send them as one statement
-- that looks at next_at and revision again: so each tick has one run, and nobody waits for a ticker
-- that froze.
CREATE TABLE schedules (
    id text COLLATE "C" PRIMARY KEY,
    workflow text NOT NULL,
    version text NOT NULL,
    pinned boolean NOT NULL,
    cron text NOT NULL,
    timezone text NOT NULL,
    catch_up text NOT NULL CHECK (catch_up IN ('last', 'all', 'none')),
    overlap text NOT NULL CHECK (overlap IN ('allow', 'skip', 'cancel')),
    priority integer NOT NULL DEFAULT 0,
    paused boolean NOT NULL DEFAULT false,
    revision integer NOT NULL DEFAULT 1,
    next_at timestamptz,
    last_at timestamptz,
    runs bigint NOT NULL DEFAULT 0,
    skipped bigint NOT NULL DEFAULT 0,
    created_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    input bytea NOT NULL
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200);
-- Serves find_due_schedules.
CREATE INDEX schedules_due ON schedules (next_at) WHERE NOT paused;

ALTER TABLE workflow_runs ADD COLUMN schedule_id text COLLATE "C", ADD COLUMN scheduled_at timestamptz;
-- Serves the overlap policies: what a schedule started that is not finished.
CREATE INDEX workflow_runs_of_schedule ON workflow_runs (schedule_id, scheduled_at)
    WHERE schedule_id IS NOT NULL AND completed_at IS NULL;
