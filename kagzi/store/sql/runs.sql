-- Runs as clients see them.
-- `{schema}` is the quoted schema; parameters are bound by name. "The fence" is the worker's row,
-- locked FOR SHARE: empty when the lease was ended.

-- name: insert_run
-- Adds a run unless its id is taken, or, where the version is not `pinned`, another is the default.
-- Indexes: workflow_runs (workflow, external_id), workflow_versions_default.
INSERT INTO {schema}.workflow_runs (id, external_id, workflow, version, priority, input,
    wake_at, created_at, queue, queue_key, apart)
SELECT %(id)s::uuid, %(external_id)s::text, %(workflow)s::text, %(version)s::text,
    %(priority)s::int, %(input)s::bytea, {schema}.now_at(), {schema}.now_at(),
    %(queue)s::text, %(queue_key)s::text,
    EXISTS (SELECT FROM {schema}.queues WHERE name = %(queue)s::text AND apart)
WHERE %(pinned)s::bool OR NOT EXISTS (
    SELECT 1 FROM {schema}.workflow_versions
    WHERE workflow = %(workflow)s::text AND is_default AND version <> %(version)s::text)
ON CONFLICT (workflow, external_id) DO NOTHING
RETURNING id;

-- name: read_run_by_key
-- The run that holds an id already. Index: workflow_runs (workflow, external_id).
SELECT id, external_id, workflow, version, input FROM {schema}.workflow_runs
WHERE workflow = %(workflow)s AND external_id = %(external_id)s;

-- name: find_runs
-- Runs by external id, of any workflow. Index: workflow_runs_external.
SELECT id, external_id, workflow, version FROM {schema}.workflow_runs
WHERE external_id = %(external_id)s ORDER BY workflow LIMIT 20;

-- name: read_run
-- One run, whole. Index: primary key.
SELECT id, external_id, workflow, version, status, priority, created_at, started_at, completed_at,
    wake_at, input, output, error, queue, queue_key
FROM {schema}.workflow_runs WHERE id = %(id)s;

-- name: read_status
-- How far a run is. Index: primary key.
SELECT status, output, error FROM {schema}.workflow_runs WHERE id = %(id)s;

-- name: count_steps
-- Checkpoints of a run so far. Index: step_runs_pkey.
SELECT count(*) FILTER (WHERE status = 'completed'), count(*) FILTER (WHERE status = 'failed')
FROM {schema}.step_runs WHERE run_id = %(id)s;

-- name: list_runs
-- The newest runs, filtered. Index: workflow_runs_created.
SELECT id, external_id, workflow, version, status, priority, created_at, started_at, completed_at,
    wake_at, error, queue, queue_key
FROM {schema}.workflow_runs
WHERE (%(status)s::text IS NULL OR status = %(status)s)
    AND (%(queue)s::text IS NULL OR queue = %(queue)s)
    AND (%(workflow)s::text IS NULL OR workflow = %(workflow)s
        OR workflow LIKE '%%.' || %(workflow)s)
ORDER BY created_at DESC LIMIT %(most)s;

-- name: describe_steps
-- Checkpoints of a run without their values, in order of time. Index: step_runs_pkey.
SELECT s.step_id, s.function, s.status, s.attempts, s.started_at, s.completed_at, g.path,
    s.parent_step_id, s.process_id, s.error, coalesce(octet_length(s.output), 0),
    s.parallel_group_id
FROM {schema}.step_runs s
LEFT JOIN {schema}.parallel_groups g ON g.run_id = s.run_id AND g.id = s.parallel_group_id
WHERE s.run_id = %(id)s ORDER BY s.started_at, s.completed_number;

-- name: describe_groups
-- Groups of a run. Index: parallel_groups_pkey.
SELECT path, kind, size, strategy, group_limit, decision, decided_index, cached, succeeded, failed,
    started_at, completed_at, wall_s, steps_s, longest_s
FROM {schema}.parallel_groups WHERE run_id = %(id)s ORDER BY started_at, path;

-- name: describe_attempts
-- Failed attempts of a run. Index: step_attempts_pkey.
SELECT step_id, attempt, started_at, completed_at, error, process_id, retry_at
FROM {schema}.step_attempts WHERE run_id = %(id)s ORDER BY started_at, step_id, attempt;

-- name: notify
-- Wakes whoever listens on the channel. The payload is empty: listeners look for themselves. The
-- server makes a commit of it, and nobody has to wait until that is on the disk.
SELECT pg_catalog.set_config('synchronous_commit', 'off', true),
    pg_catalog.pg_notify(%(channel)s, '');
