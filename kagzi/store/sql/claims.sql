-- Which runs a worker drives.
-- `{schema}` is the quoted schema; parameters are bound by name. "The fence" is the worker's row,
-- locked FOR SHARE: empty when the lease was ended.

-- name: claim_runs
-- Gives due runs to a worker, highest priority first, then earliest due; runs of other workflows
-- stay. Takes the fence first, then runs. Of the suspects, which two workers in a row have held
-- when they ended abruptly, it takes `suspects` at most (0 or 1).
-- Indexes: workflow_runs_due, workflow_runs_suspect.
WITH fence AS MATERIALIZED (
    SELECT 1 FROM {schema}.workers WHERE id = %(worker_id)s AND status = 'active' FOR SHARE
), due AS MATERIALIZED (
    SELECT id, priority, wake_at FROM {schema}.workflow_runs, fence
    WHERE status IN ('pending', 'sleeping') AND wake_at <= {schema}.now_at()
        AND (workflow, version) IN (SELECT * FROM unnest(%(names)s::text[], %(versions)s::text[]))
        AND crash_count < 2
    ORDER BY priority DESC, wake_at
    LIMIT %(most)s
    FOR UPDATE OF workflow_runs SKIP LOCKED
), suspect AS MATERIALIZED (
    SELECT id, priority, wake_at FROM {schema}.workflow_runs, fence
    WHERE status IN ('pending', 'sleeping') AND wake_at <= {schema}.now_at()
        AND (workflow, version) IN (SELECT * FROM unnest(%(names)s::text[], %(versions)s::text[]))
        AND crash_count >= 2
    ORDER BY priority DESC, wake_at
    LIMIT %(suspects)s
    FOR UPDATE OF workflow_runs SKIP LOCKED
), chosen AS (
    SELECT id FROM (TABLE due UNION ALL TABLE suspect) both_kinds
    ORDER BY priority DESC, wake_at LIMIT %(most)s
)
UPDATE {schema}.workflow_runs r SET status = 'running', worker_id = %(worker_id)s,
    epoch = r.epoch + 1, crash_count = r.crash_count + 1,
    started_at = coalesce(r.started_at, {schema}.now_at())
FROM chosen WHERE r.id = chosen.id
RETURNING r.id, r.external_id, r.workflow, r.version, r.priority, r.epoch, r.input, r.crash_count,
    r.created_at, r.scheduled_at;

-- name: free_strays
-- Frees runs that a worker holds without knowing it. Index: workflow_runs_held.
UPDATE {schema}.workflow_runs SET status = 'pending', worker_id = NULL,
    wake_at = {schema}.now_at(), crash_count = greatest(0, crash_count - 1)
WHERE worker_id = %(worker_id)s AND id <> ALL(%(run_ids)s::uuid[])
RETURNING id;

-- name: next_due
-- When the earliest sleeping run is due, in seconds from now. Index: workflow_runs_due.
SELECT extract(epoch FROM min(wake_at) - {schema}.now_at())::float8 FROM {schema}.workflow_runs
WHERE status = 'sleeping';
