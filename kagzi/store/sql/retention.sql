-- What is deleted when it has been kept for long enough.
-- `{schema}` is the quoted schema; parameters are bound by name.

-- name: lock_retention
-- One worker deletes at a time, until its transaction ends.
SELECT pg_catalog.pg_try_advisory_xact_lock(
    pg_catalog.hashtextextended(%(schema)s || ':kagzi:retention', 0));

-- name: find_expired_runs
-- Runs that ended long enough ago, from one on, the oldest first: whether each may go, and its
-- checkpoints counted. A child stays as long as its parent goes on, which may ask for its result
-- again. Indexes: workflow_runs_finished, step_runs_pkey.
SELECT r.completed_at, r.id, r.may_go,
    CASE WHEN r.may_go THEN (SELECT count(*) FROM {schema}.step_runs s WHERE s.run_id = r.id) END
FROM (
    SELECT id, completed_at, told AND (SELECT p.completed_at IS NULL FROM {schema}.workflow_runs p
        WHERE p.id = f.parent_run_id) IS NOT TRUE AS may_go
    FROM {schema}.workflow_runs f
    WHERE completed_at < {schema}.now_at() - make_interval(secs => %(retain_s)s)
        AND completed_at >= %(after_at)s::timestamptz
        AND (completed_at, id) > (%(after_at)s::timestamptz, %(after_id)s::uuid)
    ORDER BY completed_at, id LIMIT %(most)s
) r ORDER BY r.completed_at, r.id;

-- name: read_ties
-- Whether all have heard of a run's end, and whether the one that started it goes on.
-- Index: primary key.
SELECT r.told, EXISTS (SELECT FROM {schema}.workflow_runs p
    WHERE p.id = r.parent_run_id AND p.completed_at IS NULL)
FROM {schema}.workflow_runs r WHERE r.id = %(id)s;

-- name: delete_runs
-- Deletes those of the runs that are finished, with all that belongs to them: the one place that
-- lists it. Runs that somebody has locked, to retry them perhaps, stay. Indexes: primary keys.
WITH gone AS MATERIALIZED (
    SELECT id FROM {schema}.workflow_runs
    WHERE id = ANY(%(run_ids)s::uuid[]) AND completed_at IS NOT NULL
    ORDER BY id FOR UPDATE SKIP LOCKED
), steps AS (
    DELETE FROM {schema}.step_runs t USING gone WHERE t.run_id = gone.id
), attempts AS (
    DELETE FROM {schema}.step_attempts t USING gone WHERE t.run_id = gone.id
), groups AS (
    DELETE FROM {schema}.parallel_groups t USING gone WHERE t.run_id = gone.id
), events AS (
    DELETE FROM {schema}.run_events t USING gone WHERE t.run_id = gone.id
), published AS (
    DELETE FROM {schema}.run_values t USING gone WHERE t.run_id = gone.id
)
DELETE FROM {schema}.workflow_runs r USING gone WHERE r.id = gone.id RETURNING r.id;

-- name: delete_expired_memos
-- Deletes memos that hold no longer. Index: memos_expiry.
WITH gone AS MATERIALIZED (
    SELECT key FROM {schema}.memos WHERE expires_at <= {schema}.now_at()
    ORDER BY expires_at LIMIT %(most)s FOR UPDATE SKIP LOCKED
)
DELETE FROM {schema}.memos m USING gone WHERE m.key = gone.key RETURNING m.key;
