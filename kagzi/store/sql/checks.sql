-- Recorded runs, for a check against today's code. Nothing here writes or locks.
-- `{schema}` is the quoted schema; parameters are bound by name.

-- name: begin_check
-- All of a batch from one moment: a run may go on while it is read.
SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY;

-- name: count_to_check
-- How many runs a check has before it. Reads all runs at worst: a person's question.
SELECT count(*) FROM {schema}.workflow_runs
WHERE (%(statuses)s::text[] IS NULL OR status = ANY(%(statuses)s::text[]))
    AND (%(workflow)s::text IS NULL OR workflow = %(workflow)s
        OR workflow LIKE '%%.' || %(workflow)s);

-- name: runs_to_check
-- The next runs, the newest first: ids rise with time. Index: workflow_runs_pkey.
SELECT id, external_id, workflow, version, priority, epoch, input, created_at, scheduled_at, status,
    output, error, {schema}.now_at()
FROM {schema}.workflow_runs
WHERE (%(before)s::uuid IS NULL OR id < %(before)s::uuid)
    AND (%(statuses)s::text[] IS NULL OR status = ANY(%(statuses)s::text[]))
    AND (%(workflow)s::text IS NULL OR workflow = %(workflow)s
        OR workflow LIKE '%%.' || %(workflow)s)
ORDER BY id DESC LIMIT %(most)s;

-- name: weigh_recorded
-- About how many bytes the checkpoints of runs take, without reading the large ones.
-- Index: step_runs_pkey.
SELECT run_id, sum(300 + coalesce(octet_length(output), 0) + coalesce(octet_length(error), 0))::int8
FROM {schema}.step_runs WHERE run_id = ANY(%(run_ids)s::uuid[]) GROUP BY run_id;
