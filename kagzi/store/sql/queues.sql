-- Queues: their limits, and claims from those that stand apart.
-- `{schema}` is the quoted schema; parameters are bound by name. The claim itself is a function, in
-- migrations/0005_queues.sql.

-- name: claim_apart
-- Gives due runs of queues that stand apart to a worker, as their limits allow. A row with only its
-- last column says in how many seconds to look again. Takes the fence, then queues, then runs.
-- Indexes: workflow_runs_fresh, workflow_runs_parked, workflow_runs_keys, workflow_runs_busy.
SELECT (c.run).id, (c.run).external_id, (c.run).workflow, (c.run).version, (c.run).priority,
    (c.run).epoch, (c.run).input, (c.run).crash_count, (c.run).created_at,
    (c.run).scheduled_at, (c.run).news, (c.run).parent_run_id, c.again_s
FROM {schema}.claim_apart(%(worker_id)s, %(served)s::text[], %(names)s::text[],
    %(versions)s::text[], %(most)s, %(suspects)s) c;

-- name: any_queues
-- Whether there are queues with lines of their own for a worker to look at. A handful of rows.
SELECT EXISTS (SELECT FROM {schema}.queues
    WHERE %(served)s::text[] IS NULL OR name = ANY(%(served)s));

-- name: declare_queues
-- Gives queues lines of their own, without limits.
INSERT INTO {schema}.queues (name) SELECT * FROM unnest(%(names)s::text[]) AS n(name) ORDER BY name
ON CONFLICT DO NOTHING;

-- name: set_queue
-- Sets what `sets` names of a queue's limits, and leaves the others. Locks one row; a claim from
-- this queue that is under way is waited for. Index: queues_pkey.
INSERT INTO {schema}.queues AS q (name, concurrency, concurrency_per_key, rate_starts,
    rate_window_s, paused, changed_at)
VALUES (%(queue)s, %(concurrency)s, %(concurrency_per_key)s, %(rate_starts)s, %(rate_window_s)s,
    coalesce(%(paused)s, false), {schema}.now_at())
ON CONFLICT (name) DO UPDATE SET changed_at = excluded.changed_at, settled = false,
    concurrency = CASE WHEN 'concurrency' = ANY(%(sets)s) THEN excluded.concurrency
        ELSE q.concurrency END,
    concurrency_per_key = CASE WHEN 'concurrency_per_key' = ANY(%(sets)s)
        THEN excluded.concurrency_per_key ELSE q.concurrency_per_key END,
    rate_starts = CASE WHEN 'rate' = ANY(%(sets)s) THEN excluded.rate_starts
        ELSE q.rate_starts END,
    rate_window_s = CASE WHEN 'rate' = ANY(%(sets)s) THEN excluded.rate_window_s
        ELSE q.rate_window_s END,
    paused = CASE WHEN 'paused' = ANY(%(sets)s) THEN excluded.paused ELSE q.paused END;

-- name: list_queues
-- Every queue that has limits or runs that are not finished, with their counts.
-- Reads all unfinished runs. Indexes: those of the lines.
WITH counts AS (
    SELECT queue, count(*) FILTER (WHERE status <> 'running' AND wake_at <= {schema}.now_at()) due,
        count(*) FILTER (WHERE status <> 'running' AND wake_at > {schema}.now_at()) AS sleeping,
        count(*) FILTER (WHERE status = 'running') AS running
    FROM {schema}.workflow_runs
    WHERE status IN ('pending', 'sleeping', 'running')
        AND (%(queue)s::text IS NULL OR queue = %(queue)s)
    GROUP BY queue
)
SELECT coalesce(q.name, c.queue), q.concurrency, q.concurrency_per_key, q.rate_starts,
    q.rate_window_s, coalesce(q.paused, false), coalesce(c.due, 0), coalesce(c.sleeping, 0),
    coalesce(c.running, 0)
FROM (SELECT * FROM {schema}.queues WHERE %(queue)s::text IS NULL OR name = %(queue)s) q
FULL JOIN counts c ON c.queue = q.name
ORDER BY 1;
