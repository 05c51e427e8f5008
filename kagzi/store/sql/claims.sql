-- Which runs a worker drives.
-- `{schema}` is the quoted schema; parameters are bound by name. "The fence" is the worker's row,
-- locked FOR SHARE: empty when the lease was ended.

-- name: claim_runs
-- Gives due runs of the common line to a worker, highest priority first, then earliest due; runs of
-- other workflows stay. Takes the fence first, then runs. Of the suspects, which two workers in a
-- row have held when they ended abruptly, it takes `suspects` at most (0 or 1).
-- Runs whose queue stands apart, or is not among the `served`, are not taken: they move to the line
-- of their own queue, and come back as `aside`. Runs of the default queue stay where they are.
-- The other columns are those of `claim_apart`.
-- Indexes: workflow_runs_due, workflow_runs_suspect.
WITH fence AS MATERIALIZED (
    SELECT 1 FROM {schema}.workers WHERE id = %(worker_id)s AND status = 'active' FOR SHARE
), due AS MATERIALIZED (
    SELECT id, queue, priority, wake_at FROM {schema}.workflow_runs, fence
    WHERE status IN ('pending', 'sleeping') AND NOT apart AND wake_at <= {schema}.now_at()
        AND (workflow, version) IN (SELECT * FROM unnest(%(names)s::text[], %(versions)s::text[]))
        AND (queue <> 'default' OR %(takes_default)s)
        AND crash_count < 2
    ORDER BY priority DESC, wake_at
    LIMIT %(most)s
    FOR UPDATE OF workflow_runs SKIP LOCKED
), suspect AS MATERIALIZED (
    SELECT id, queue, priority, wake_at FROM {schema}.workflow_runs, fence
    WHERE status IN ('pending', 'sleeping') AND NOT apart AND wake_at <= {schema}.now_at()
        AND (workflow, version) IN (SELECT * FROM unnest(%(names)s::text[], %(versions)s::text[]))
        AND (queue <> 'default' OR %(takes_default)s)
        AND crash_count >= 2
    ORDER BY priority DESC, wake_at
    LIMIT %(suspects)s
    FOR UPDATE OF workflow_runs SKIP LOCKED
), chosen AS (
    SELECT id, queue, queue = ANY(ARRAY(SELECT name FROM {schema}.queues WHERE apart))
        OR queue <> ALL(coalesce(%(served)s::text[], ARRAY[queue])) AS aside
    FROM (TABLE due UNION ALL TABLE suspect) both_kinds
    ORDER BY priority DESC, wake_at LIMIT %(most)s
), declared AS (
    INSERT INTO {schema}.queues (name) SELECT DISTINCT queue FROM chosen WHERE aside ORDER BY queue
    ON CONFLICT DO NOTHING
)
UPDATE {schema}.workflow_runs r SET apart = chosen.aside,
    status = CASE WHEN aside THEN status ELSE 'running' END,
    worker_id = CASE WHEN aside THEN NULL ELSE %(worker_id)s END,
    epoch = epoch + (NOT aside)::int, crash_count = crash_count + (NOT aside)::int,
    started_at = CASE WHEN aside THEN started_at ELSE coalesce(started_at, {schema}.now_at()) END
FROM chosen WHERE r.id = chosen.id
RETURNING r.id, r.external_id, r.workflow, r.version, r.priority, r.epoch, r.input, r.crash_count,
    r.created_at, r.scheduled_at, r.news, r.parent_run_id, aside;

-- name: free_strays
-- Frees runs that a worker holds without knowing it. Index: workflow_runs_held.
UPDATE {schema}.workflow_runs SET status = 'pending', worker_id = NULL,
    wake_at = {schema}.now_at(), crash_count = greatest(0, crash_count - 1)
WHERE worker_id = %(worker_id)s AND id <> ALL(%(run_ids)s::uuid[])
RETURNING id;
