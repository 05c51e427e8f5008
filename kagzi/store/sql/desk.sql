-- Single starts, those of one moment together.
-- `{schema}` is the quoted schema; parameters are bound by name. "The fence" is the worker's row,
-- locked FOR SHARE: empty when the lease was ended.

-- name: insert_starts
-- Adds runs whose ids are not taken and whose version is wanted; those that the worker asks for, and
-- whose queue has no limits, as its own at once: a claim less. What is not returned was not added.
-- In the order of their ids, so that two that add the same ones wait for each other without a circle.
-- Indexes: workflow_runs (workflow, external_id), workflow_versions_default.
WITH fence AS MATERIALIZED (
    SELECT 1 FROM {schema}.workers WHERE id = %(worker_id)s AND status = 'active' FOR SHARE
), moment AS MATERIALIZED (
    SELECT {schema}.now_at() AS now, EXISTS (SELECT FROM fence) AS held,
        ARRAY(SELECT name FROM {schema}.queues WHERE apart) AS apart
)
INSERT INTO {schema}.workflow_runs AS r (id, external_id, workflow, version, priority, input, wake_at,
    created_at, queue, queue_key, apart, status, worker_id, epoch, crash_count, started_at)
SELECT n.id, n.external_id, n.workflow, n.version, n.priority, n.input, n.at, n.at, n.queue,
    n.queue_key, n.apart, CASE WHEN n.mine THEN 'running' ELSE 'pending' END,
    CASE WHEN n.mine THEN %(worker_id)s::uuid END, n.mine::int, n.mine::int,
    CASE WHEN n.mine THEN n.at END
FROM (
    SELECT u.id, u.external_id, u.workflow, u.version, u.priority, u.input, u.queue, u.queue_key,
        u.queue = ANY(moment.apart) AS apart,
        u.wanted AND moment.held AND u.queue <> ALL(moment.apart) AS mine,
        moment.now - (count(*) OVER () - u.place) * interval '1 microsecond' AS at
    FROM moment, unnest(%(ids)s::uuid[], %(external_ids)s::text[], %(workflows)s::text[],
        %(versions)s::text[], %(priorities)s::int[], %(inputs)s::bytea[], %(queues)s::text[],
        %(queue_keys)s::text[], %(pinned)s::bool[], %(wanted)s::bool[]) WITH ORDINALITY
        AS u(id, external_id, workflow, version, priority, input, queue, queue_key, pinned, wanted,
            place)
    WHERE u.pinned OR NOT EXISTS (SELECT 1 FROM {schema}.workflow_versions v
        WHERE v.workflow = u.workflow AND v.is_default AND v.version <> u.version)
) n ORDER BY n.external_id COLLATE "C"
ON CONFLICT (workflow, external_id) DO NOTHING
RETURNING r.id, r.worker_id IS NOT NULL, r.created_at;

-- name: insert_start
-- The same for one run, with no arrays: their length is unknown to a plan, so the one above is
-- planned anew each time. Indexes: as above.
WITH fence AS MATERIALIZED (
    SELECT 1 FROM {schema}.workers WHERE id = %(worker_id)s AND status = 'active' FOR SHARE
), start AS MATERIALIZED (
    SELECT {schema}.now_at() AS at, q.apart,
        %(wanted)s AND NOT q.apart AND EXISTS (SELECT FROM fence) AS mine
    FROM (SELECT EXISTS (SELECT FROM {schema}.queues WHERE name = %(queue)s::text AND apart) AS apart) q
    WHERE %(pinned)s OR NOT EXISTS (SELECT 1 FROM {schema}.workflow_versions v
        WHERE v.workflow = %(workflow)s::text AND v.is_default AND v.version <> %(version)s::text)
)
INSERT INTO {schema}.workflow_runs AS r (id, external_id, workflow, version, priority, input, wake_at,
    created_at, queue, queue_key, apart, status, worker_id, epoch, crash_count, started_at)
SELECT %(id)s, %(external_id)s::text, %(workflow)s::text, %(version)s::text, %(priority)s, %(input)s,
    at, at, %(queue)s::text, %(queue_key)s::text, apart,
    CASE WHEN mine THEN 'running' ELSE 'pending' END,
    CASE WHEN mine THEN %(worker_id)s::uuid END, mine::int, mine::int, CASE WHEN mine THEN at END
FROM start
ON CONFLICT (workflow, external_id) DO NOTHING
RETURNING r.id, r.worker_id IS NOT NULL, r.created_at;
