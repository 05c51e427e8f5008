-- kagzi, schema 1: runs, their checkpoints, and the workers that own them.
--
-- A run is a row of workflow_runs. Its step_runs rows are its checkpoints: written once, never
-- changed, removed only by a retry or with the run. Whoever holds the run (worker_id) writes them,
-- and every write looks at the worker's row first (the fence): FOR SHARE there, FOR UPDATE by
-- the rescuer that ends the lease.
--
-- No foreign keys and no second index on the rows of the hot path: COPY of 1,000 step rows takes
-- 5 ms plain, 9 with a second index, 11 with a foreign key.

-- The one clock of leases and timers. Tests move it by replacing the function.
CREATE FUNCTION now_at() RETURNS timestamptz
    LANGUAGE sql STABLE PARALLEL SAFE AS 'SELECT pg_catalog.clock_timestamp()';

CREATE TABLE workflow_versions (
    workflow text NOT NULL,
    version text NOT NULL,
    first_seen_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    is_default boolean NOT NULL DEFAULT true,
    PRIMARY KEY (workflow, version)
);

-- One row per incarnation of a worker: the fence. A heartbeat never touches it.
CREATE TABLE workers (
    id uuid PRIMARY KEY,
    host text NOT NULL,
    boot_id text NOT NULL,
    pid integer NOT NULL,
    process_started text NOT NULL,
    status text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'draining', 'ended')),
    config json NOT NULL DEFAULT '{}',
    started_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    ended_at timestamptz
);
CREATE INDEX workers_alive ON workers (host) WHERE status <> 'ended';

CREATE TABLE worker_leases (
    worker_id uuid PRIMARY KEY,
    expires_at timestamptz NOT NULL
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200);

CREATE TABLE worker_events (
    worker_id uuid NOT NULL,
    at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    event text NOT NULL,
    detail text
);

CREATE TABLE workflow_runs (
    id uuid PRIMARY KEY,
    external_id text COLLATE "C" NOT NULL,
    workflow text NOT NULL,
    version text NOT NULL,
    status text NOT NULL DEFAULT 'pending' CHECK (status IN
        ('pending', 'running', 'sleeping', 'paused', 'completed', 'failed', 'cancelled')),
    priority integer NOT NULL DEFAULT 0,
    wake_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    worker_id uuid,
    epoch integer NOT NULL DEFAULT 0,
    request text CHECK (request IN ('cancel', 'pause', 'retry')),
    crash_count integer NOT NULL DEFAULT 0,
    created_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    started_at timestamptz,
    completed_at timestamptz,
    input bytea NOT NULL,
    output bytea,
    error bytea,
    UNIQUE (workflow, external_id),
    CONSTRAINT a_held_run_is_running CHECK ((status = 'running') = (worker_id IS NOT NULL)),
    CONSTRAINT a_finished_run_says_when CHECK
        ((status IN ('completed', 'failed', 'cancelled')) = (completed_at IS NOT NULL))
) WITH (fillfactor = 70, toast_tuple_target = 256,
        autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 500,
        autovacuum_analyze_scale_factor = 0.05);
-- Serves claim_runs: highest priority first, then earliest due.
CREATE INDEX workflow_runs_due ON workflow_runs (priority DESC, wake_at)
    WHERE status IN ('pending', 'sleeping');
-- Serves free_runs: what an ended worker held.
CREATE INDEX workflow_runs_held ON workflow_runs (worker_id) WHERE worker_id IS NOT NULL;
-- Serves lookups by external id alone, and the listing.
CREATE INDEX workflow_runs_external ON workflow_runs (external_id);
CREATE INDEX workflow_runs_created ON workflow_runs (created_at DESC);

-- Checkpoints. step_id is a path; "C" makes everything below a step one range of the primary key.
CREATE TABLE step_runs (
    run_id uuid NOT NULL,
    step_id text COLLATE "C" NOT NULL,
    function text NOT NULL,
    status text NOT NULL,
    output bytea,
    error bytea,
    input bytea,
    input_hash bytea NOT NULL,
    attempts integer NOT NULL,
    parallel_group_id uuid,
    parent_step_id text COLLATE "C",
    started_at timestamptz NOT NULL,
    completed_at timestamptz NOT NULL,
    call_number integer NOT NULL,
    completed_number integer NOT NULL,
    worker_id uuid NOT NULL,
    process_id integer NOT NULL,
    visible_number integer,
    PRIMARY KEY (run_id, step_id)
) WITH (autovacuum_vacuum_insert_scale_factor = 0.4);

-- Failed attempts only; a step that succeeded at attempt n says so in its own row. The attempts
-- before a client's retry are retired: they no longer count against the retry policy.
CREATE TABLE step_attempts (
    run_id uuid NOT NULL,
    step_id text COLLATE "C" NOT NULL,
    attempt integer NOT NULL,
    started_at timestamptz NOT NULL,
    completed_at timestamptz NOT NULL,
    error bytea NOT NULL,
    worker_id uuid NOT NULL,
    process_id integer NOT NULL,
    retry_at timestamptz,
    retired boolean NOT NULL DEFAULT false,
    PRIMARY KEY (run_id, step_id, attempt)
);

-- One row per finished group. decision: what completion order decided, committed with its cause.
CREATE TABLE parallel_groups (
    run_id uuid NOT NULL,
    path text COLLATE "C" NOT NULL,
    id uuid NOT NULL,
    kind text NOT NULL,
    size integer NOT NULL,
    strategy text NOT NULL,
    group_limit integer,
    parent_step_id text COLLATE "C",
    decision text,
    decided_index integer,
    cached integer NOT NULL,
    succeeded integer NOT NULL,
    failed integer NOT NULL,
    started_at timestamptz NOT NULL,
    completed_at timestamptz NOT NULL,
    wall_s double precision NOT NULL,
    steps_s double precision NOT NULL,
    longest_s double precision NOT NULL,
    call_number integer NOT NULL,
    completed_number integer NOT NULL,
    visible_number integer,
    PRIMARY KEY (run_id, path)
);

-- Results shared between runs, for steps declared with memo=.
CREATE TABLE memos (
    key bytea PRIMARY KEY,
    function text NOT NULL,
    output bytea NOT NULL,
    run_id uuid NOT NULL,
    created_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    expires_at timestamptz
);
CREATE INDEX memos_expiry ON memos (expires_at) WHERE expires_at IS NOT NULL;

-- The fence as a statement: locks the worker's row against the rescuer until the transaction ends.
CREATE FUNCTION hold_fence(worker uuid) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM FROM {schema}.workers WHERE id = worker AND status <> 'ended' FOR SHARE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'the lease of worker % was ended', worker USING ERRCODE = 'KZ001';
    END IF;
END $$;
