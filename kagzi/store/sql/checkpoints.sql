-- What a worker writes of its runs, and what it recalls of them.
-- `{schema}` is the quoted schema; parameters are bound by name. "The fence" is the worker's row,
-- locked FOR SHARE: empty when the lease was ended.

-- part: fence
SELECT 1 FROM {schema}.workers WHERE id = %(worker_id)s AND status <> 'ended' FOR SHARE

-- part: step_columns
run_id, step_id, function, status, output, error, input,
        input_hash, attempts, parallel_group_id, parent_step_id, started_at, completed_at,
        call_number, completed_number, worker_id, process_id

-- part: step_arrays
unnest(%(s0)s, %(s1)s, %(s2)s, %(s3)s, %(s4)s, %(s5)s, %(s6)s, %(s7)s,
        %(s8)s, %(s9)s, %(s10)s, %(s11)s, %(s12)s, %(s13)s, %(s14)s, %(s15)s, %(s16)s)

-- part: group_columns
run_id, path, id, kind, size, strategy, group_limit,
        parent_step_id, decision, decided_index, cached, succeeded, failed, started_at,
        completed_at, wall_s, steps_s, longest_s, call_number, completed_number

-- part: release
-- Run `t`, let go of as `r` asks. A request made meanwhile holds unless the run has ended, and
        -- one that was taken back since its worker heard of it does not; news that the run did not
        -- know of when it was parked leaves it due.
        status = CASE
            WHEN r.status IN ('completed', 'failed') THEN r.status
            WHEN t.request = 'cancel' THEN 'cancelled'
            WHEN t.request = 'pause' THEN 'paused'
            WHEN r.status IN ('cancelled', 'paused') THEN 'pending'
            WHEN r.status = 'sleeping' AND t.news > r.news THEN 'pending'
            ELSE r.status END,
        output = r.output, error = r.error,
        wake_at = CASE WHEN r.status IN ('cancelled', 'paused')
            OR (r.status = 'sleeping' AND t.news > r.news) THEN {schema}.now_at()
            ELSE coalesce(r.wake_at, t.wake_at) END,
        worker_id = NULL, request = NULL, crash_count = 0,
        told = t.parent_run_id IS NULL AND t.request IS DISTINCT FROM 'cancel',
        completed_at = CASE WHEN r.status IN ('completed', 'failed')
            OR t.request = 'cancel' THEN {schema}.now_at() END

-- part: held_here
t.worker_id IS NOT DISTINCT FROM %(worker_id)s -- not `=`: no index of all that the worker holds

-- name: write_step
-- Inserts one step row without arrays, in three quarters of the time. Nothing is returned where the
-- fence is shut or the step is there; `write_steps` tells which.
-- Index: step_runs_pkey.
WITH fence AS MATERIALIZED ({fence})
INSERT INTO {schema}.step_runs ({step_columns})
SELECT %(s0)s, %(s1)s, %(s2)s, %(s3)s, %(s4)s, %(s5)s, %(s6)s, %(s7)s, %(s8)s, %(s9)s, %(s10)s,
    %(s11)s, %(s12)s, %(s13)s, %(s14)s, %(s15)s, %(s16)s FROM fence
ON CONFLICT DO NOTHING
RETURNING 1::int8;

-- name: write_run
-- Lets go of one run, when nothing else is to be written; nothing is returned where `write_rows`
-- has to tell why. Index: workflow_runs_pkey.
WITH fence AS MATERIALIZED ({fence})
UPDATE {schema}.workflow_runs t SET
        {release}
FROM fence, (SELECT %(r0)s AS id, %(r1)s AS epoch, %(r2)s AS status, %(r3)s AS output,
    %(r4)s AS error, %(r5)s AS wake_at, %(r6)s AS news) r
WHERE t.id = r.id AND t.epoch = r.epoch AND {held_here}
RETURNING 1::int8;

-- name: write_steps
-- Inserts step rows, one array per column; first commit wins. `relaxed`: the commit does not wait
-- for the disk. Index: step_runs_pkey.
WITH fence AS MATERIALIZED ({fence}), inserted AS (
    INSERT INTO {schema}.step_runs ({step_columns})
    SELECT s.* FROM fence, {step_arrays} AS s
    ON CONFLICT DO NOTHING
    RETURNING 1
), relaxed AS (
    SELECT pg_catalog.set_config('synchronous_commit', 'off', true) WHERE %(relaxed)s
)
SELECT (SELECT count(*) FROM fence), (SELECT count(*) FROM inserted),
    (SELECT count(*) FROM relaxed);

-- name: write_group
-- The row of one group with its last steps: what most groups end with. Index: primary keys.
WITH fence AS MATERIALIZED ({fence}), inserted AS (
    INSERT INTO {schema}.step_runs ({step_columns})
    SELECT s.* FROM fence, {step_arrays} AS s
    ON CONFLICT DO NOTHING
    RETURNING 1
), grouped AS (
    INSERT INTO {schema}.parallel_groups ({group_columns})
    SELECT %(g0)s, %(g1)s, %(g2)s, %(g3)s, %(g4)s, %(g5)s, %(g6)s, %(g7)s, %(g8)s, %(g9)s, %(g10)s,
        %(g11)s, %(g12)s, %(g13)s, %(g14)s, %(g15)s, %(g16)s, %(g17)s, %(g18)s, %(g19)s FROM fence
    ON CONFLICT DO NOTHING
)
SELECT (SELECT count(*) FROM fence), (SELECT count(*) FROM inserted), 0::int8;

-- name: write_rows
-- Everything else that a batch holds besides steps, and the steps of a small batch. Group and run
-- rows carry absolute values, so sending them twice changes nothing. Indexes: primary keys.
WITH fence AS MATERIALIZED ({fence}), inserted AS (
    INSERT INTO {schema}.step_runs ({step_columns})
    SELECT s.* FROM fence, {step_arrays} AS s
    ON CONFLICT DO NOTHING
    RETURNING 1
), attempted AS (
    INSERT INTO {schema}.step_attempts (run_id, step_id, attempt, started_at, completed_at, error,
        process_id, retry_at, worker_id)
    SELECT a.*, %(worker_id)s FROM fence, unnest(%(a0)s::uuid[], %(a1)s::text[], %(a2)s::int[],
        %(a3)s::timestamptz[], %(a4)s::timestamptz[], %(a5)s::bytea[], %(a6)s::int[],
        %(a7)s::timestamptz[]) AS a
    ON CONFLICT DO NOTHING
), grouped AS (
    INSERT INTO {schema}.parallel_groups ({group_columns})
    SELECT g.* FROM fence, unnest(%(g0)s::uuid[], %(g1)s::text[], %(g2)s::uuid[], %(g3)s::text[],
        %(g4)s::int[], %(g5)s::text[], %(g6)s::int[], %(g7)s::text[], %(g8)s::text[],
        %(g9)s::int[], %(g10)s::int[], %(g11)s::int[], %(g12)s::int[], %(g13)s::timestamptz[],
        %(g14)s::timestamptz[], %(g15)s::float8[], %(g16)s::float8[], %(g17)s::float8[],
        %(g18)s::int[], %(g19)s::int[]) AS g
    ON CONFLICT DO NOTHING
), memoised AS (
    INSERT INTO {schema}.memos AS m (key, function, output, run_id, expires_at)
    SELECT n.key, n.function, n.output, n.run_id,
        {schema}.now_at() + make_interval(secs => n.lifetime_s)
    FROM fence, unnest(%(m0)s::bytea[], %(m1)s::text[], %(m2)s::bytea[], %(m3)s::uuid[],
        %(m4)s::float8[]) AS n(key, function, output, run_id, lifetime_s)
    ON CONFLICT (key) DO UPDATE SET output = excluded.output, run_id = excluded.run_id,
        created_at = {schema}.now_at(), expires_at = excluded.expires_at
    WHERE m.expires_at <= {schema}.now_at()
), seen_steps AS (
    UPDATE {schema}.step_runs t SET visible_number = v.number
    FROM fence, unnest(%(v0)s::uuid[], %(v1)s::text[], %(v2)s::int[]) AS v(run_id, path, number)
    WHERE t.run_id = v.run_id AND t.step_id = v.path
), seen_groups AS (
    UPDATE {schema}.parallel_groups t SET visible_number = v.number
    FROM fence, unnest(%(w0)s::uuid[], %(w1)s::text[], %(w2)s::int[]) AS v(run_id, path, number)
    WHERE t.run_id = v.run_id AND t.path = v.path
), released AS (
    UPDATE {schema}.workflow_runs t SET
        {release}
    FROM fence, unnest(%(r0)s::uuid[], %(r1)s::int[], %(r2)s::text[], %(r3)s::bytea[],
        %(r4)s::bytea[], %(r5)s::timestamptz[], %(r6)s::int[])
        AS r(id, epoch, status, output, error, wake_at, news)
    WHERE t.id = r.id AND t.epoch = r.epoch AND {held_here}
    RETURNING 1
)
SELECT (SELECT count(*) FROM fence), (SELECT count(*) FROM inserted),
    (SELECT count(*) FROM released);

-- name: clear_below
-- Removes the failed checkpoints and the decisions below steps whose attempt failed. A statement of
-- its own, so that it sees rows written earlier in its transaction. Index: primary keys, by range.
WITH below AS (
    SELECT * FROM unnest(%(run_ids)s::uuid[], %(step_ids)s::text[]) AS b(run_id, step_id)
), steps AS (
    DELETE FROM {schema}.step_runs t USING below b
    WHERE t.run_id = b.run_id AND t.status = 'failed'
        AND t.step_id > (b.step_id || '/') COLLATE "C"
        AND t.step_id < (b.step_id || '0') COLLATE "C"
)
DELETE FROM {schema}.parallel_groups t USING below b
WHERE t.run_id = b.run_id AND (t.failed > 0 OR t.decision IS NOT NULL)
    AND t.path > (b.step_id || '/') COLLATE "C" AND t.path < (b.step_id || '0') COLLATE "C";

-- name: drop_paths
-- Removes checkpoints and groups that followed from a failure that `clear_below` removes.
-- Indexes: primary keys.
WITH dropped AS (
    SELECT * FROM unnest(%(run_ids)s::uuid[], %(paths)s::text[], %(of_groups)s::bool[])
        AS d(run_id, path, of_group)
), steps AS (
    DELETE FROM {schema}.step_runs t USING dropped d
    WHERE NOT d.of_group AND t.run_id = d.run_id AND t.step_id = d.path
)
DELETE FROM {schema}.parallel_groups t USING dropped d
WHERE d.of_group AND t.run_id = d.run_id AND t.path = d.path;

-- name: read_steps_back
-- What is stored of steps that were not inserted. Index: step_runs_pkey.
SELECT t.run_id, t.step_id, t.status, t.function, t.input_hash, t.output, t.error, t.attempts,
    t.call_number, t.completed_number, t.visible_number, t.parallel_group_id IS NOT NULL
FROM {schema}.step_runs t
JOIN unnest(%(run_ids)s::uuid[], %(step_ids)s::text[]) AS u(run_id, step_id)
    ON t.run_id = u.run_id AND t.step_id = u.step_id;

-- name: read_runs_back
-- Where runs stand whose release found no row: the same epoch means that it was done before.
SELECT id, epoch, status, worker_id FROM {schema}.workflow_runs WHERE id = ANY(%(run_ids)s::uuid[]);

-- name: load_steps
-- Checkpoints of claimed runs, each with the place of its run among `run_ids`. Unless `whole`,
-- without those of a map's complete parts, and without outputs above `most_bytes`: these are loaded
-- when they are asked for. An output's length is known without reading it. What the engine itself
-- records is short, or was sent, and comes always. Indexes: step_runs_pkey, parallel_groups_pkey.
SELECT array_position(%(run_ids)s::uuid[], s.run_id) - 1, s.step_id, s.status, s.function,
    s.input_hash, CASE WHEN %(whole)s OR octet_length(s.output) <= %(most_bytes)s
        OR starts_with(s.function, 'kagzi.') THEN s.output END,
    s.error, s.attempts, s.call_number, s.completed_number, s.visible_number,
    s.parallel_group_id IS NOT NULL, octet_length(s.output)
FROM {schema}.step_runs s
LEFT JOIN (
    SELECT run_id, id FROM {schema}.parallel_groups
    WHERE run_id = ANY(%(run_ids)s::uuid[]) AND NOT %(whole)s AND kind = 'stream' AND failed = 0
        AND decision IS NULL
) streamed ON streamed.run_id = s.run_id AND streamed.id = s.parallel_group_id
WHERE s.run_id = ANY(%(run_ids)s::uuid[]) AND streamed.id IS NULL;

-- name: load_outputs
-- Results of one part of a map, those above `most_bytes` without their bytes: their length is known
-- without reading them. Index: step_runs_pkey, by range.
SELECT step_id, CASE WHEN octet_length(output) <= %(most_bytes)s THEN output END,
    octet_length(output)
FROM {schema}.step_runs
WHERE run_id = %(run_id)s AND status = 'completed'
    AND step_id > (%(path)s || '/') COLLATE "C" AND step_id < (%(path)s || '0') COLLATE "C";

-- name: fetch_outputs
-- Results of some steps of a run. Index: step_runs_pkey.
SELECT step_id, output FROM {schema}.step_runs
WHERE run_id = %(run_id)s AND status = 'completed' AND step_id = ANY(%(ids)s::text[]);

-- name: load_groups
-- Closed groups of claimed runs. Index: parallel_groups_pkey.
SELECT run_id, path, kind, size, decision, decided_index, completed_number, call_number,
    visible_number, failed
FROM {schema}.parallel_groups WHERE run_id = ANY(%(run_ids)s::uuid[]);

-- name: load_attempts
-- Attempts that count against the retry policy of steps without a checkpoint, and the highest
-- number used. Index: step_attempts_pkey.
SELECT a.run_id, a.step_id, count(*) FILTER (WHERE NOT a.retired), max(a.attempt),
    max(a.retry_at) FILTER (WHERE NOT a.retired)
FROM {schema}.step_attempts a WHERE a.run_id = ANY(%(run_ids)s::uuid[])
GROUP BY a.run_id, a.step_id;

-- name: find_memos
-- Results of earlier runs that still hold. Index: memos_pkey.
SELECT encode(key, 'hex'), output FROM {schema}.memos
WHERE key = ANY(ARRAY(SELECT decode(k, 'hex') FROM unnest(%(keys)s::text[]) k))
    AND (expires_at IS NULL OR expires_at > {schema}.now_at());
