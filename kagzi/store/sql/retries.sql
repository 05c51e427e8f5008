-- A person's retry of a run.
-- `{schema}` is the quoted schema; parameters are bound by name. "The fence" is the worker's row,
-- locked FOR SHARE: empty when the lease was ended.

-- name: lock_run
-- One run, locked for a client's change. Index: primary key.
SELECT status, error, worker_id FROM {schema}.workflow_runs WHERE id = %(id)s FOR UPDATE;

-- name: restart_run
-- Makes a finished run pending again.
UPDATE {schema}.workflow_runs SET status = 'pending', completed_at = NULL, output = NULL,
    error = NULL, request = NULL, crash_count = 0, wake_at = {schema}.now_at()
WHERE id = %(id)s AND status IN ('failed', 'cancelled');

-- name: load_calls
-- Names and call numbers of a run's checkpoints, for a retry. Index: step_runs_pkey.
SELECT step_id, status, parallel_group_id IS NOT NULL, call_number, visible_number
FROM {schema}.step_runs WHERE run_id = %(id)s;

-- name: load_group_calls
-- The same of its groups. Index: parallel_groups_pkey.
SELECT path, decision, failed, call_number, visible_number
FROM {schema}.parallel_groups WHERE run_id = %(id)s;

-- name: load_errors
-- Why steps failed. Index: step_runs_pkey.
SELECT error FROM {schema}.step_runs
WHERE run_id = %(id)s AND step_id = ANY(%(step_ids)s::text[]) AND status = 'failed';

-- name: delete_steps
-- Removes checkpoints that a retry runs again. Index: step_runs_pkey.
DELETE FROM {schema}.step_runs WHERE run_id = %(id)s AND step_id = ANY(%(step_ids)s::text[]);

-- name: delete_groups
-- Removes groups, and so their decisions, that a retry opens again. Index: parallel_groups_pkey.
DELETE FROM {schema}.parallel_groups WHERE run_id = %(id)s AND path = ANY(%(paths)s::text[]);

-- name: retire_attempts
-- Attempts before a retry stay on record and no longer count. Index: step_attempts_pkey.
UPDATE {schema}.step_attempts SET retired = true
WHERE run_id = %(id)s AND (step_id = ANY(%(step_ids)s::text[]) OR NOT EXISTS (
    SELECT 1 FROM {schema}.step_runs s
    WHERE s.run_id = step_attempts.run_id AND s.step_id = step_attempts.step_id));
