-- Every statement of kagzi. `{schema}` is the quoted schema; parameters are bound by name.
-- "The fence" is the worker's row, locked FOR SHARE: empty when the lease was ended.

-- name: write_steps
-- Inserts step rows, one array per column; first commit wins. Index: step_runs_pkey.
WITH fence AS MATERIALIZED (
    SELECT 1 FROM {schema}.workers WHERE id = %(worker_id)s AND status <> 'ended' FOR SHARE
), inserted AS (
    INSERT INTO {schema}.step_runs (run_id, step_id, function, status, output, error, input,
        input_hash, attempts, parallel_group_id, parent_step_id, started_at, completed_at,
        call_number, completed_number, worker_id, process_id)
    SELECT s.* FROM fence, unnest(%(s0)s, %(s1)s, %(s2)s, %(s3)s, %(s4)s, %(s5)s, %(s6)s, %(s7)s,
        %(s8)s, %(s9)s, %(s10)s, %(s11)s, %(s12)s, %(s13)s, %(s14)s, %(s15)s, %(s16)s) AS s
    ON CONFLICT DO NOTHING
    RETURNING 1
)
SELECT (SELECT count(*) FROM fence), (SELECT count(*) FROM inserted), 0::bigint;

-- name: write_rows
-- Everything else that a batch holds besides steps, and the steps of a small batch. Group and run
-- rows carry absolute values, so sending them twice changes nothing. Indexes: primary keys.
WITH fence AS MATERIALIZED (
    SELECT 1 FROM {schema}.workers WHERE id = %(worker_id)s AND status <> 'ended' FOR SHARE
), inserted AS (
    INSERT INTO {schema}.step_runs (run_id, step_id, function, status, output, error, input,
        input_hash, attempts, parallel_group_id, parent_step_id, started_at, completed_at,
        call_number, completed_number, worker_id, process_id)
    SELECT s.* FROM fence, unnest(%(s0)s, %(s1)s, %(s2)s, %(s3)s, %(s4)s, %(s5)s, %(s6)s, %(s7)s,
        %(s8)s, %(s9)s, %(s10)s, %(s11)s, %(s12)s, %(s13)s, %(s14)s, %(s15)s, %(s16)s) AS s
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
    INSERT INTO {schema}.parallel_groups (run_id, path, id, kind, size, strategy, group_limit,
        parent_step_id, decision, decided_index, cached, succeeded, failed, started_at,
        completed_at, wall_s, steps_s, longest_s, call_number, completed_number)
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
    UPDATE {schema}.workflow_runs t SET status = r.status, output = r.output, error = r.error,
        wake_at = coalesce(r.wake_at, t.wake_at), worker_id = NULL, crash_count = 0,
        completed_at = CASE WHEN r.status IN ('completed', 'failed', 'cancelled')
            THEN {schema}.now_at() END
    FROM fence, unnest(%(r0)s::uuid[], %(r1)s::int[], %(r2)s::text[], %(r3)s::bytea[],
        %(r4)s::bytea[], %(r5)s::timestamptz[]) AS r(id, epoch, status, output, error, wake_at)
    WHERE t.id = r.id AND t.worker_id = %(worker_id)s AND t.epoch = r.epoch
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
    (extract(epoch FROM t.started_at) * 1000000)::int8,
    (extract(epoch FROM t.completed_at) * 1000000)::int8,
    t.call_number, t.completed_number, t.visible_number, t.parallel_group_id IS NOT NULL
FROM {schema}.step_runs t
JOIN unnest(%(run_ids)s::uuid[], %(step_ids)s::text[]) AS u(run_id, step_id)
    ON t.run_id = u.run_id AND t.step_id = u.step_id;

-- name: read_runs_back
-- Where runs stand whose release found no row: the same epoch means that it was done before.
SELECT id, epoch, status, worker_id FROM {schema}.workflow_runs WHERE id = ANY(%(run_ids)s::uuid[]);

-- name: insert_run
-- Adds a run unless its id is taken. Index: workflow_runs (workflow, external_id).
INSERT INTO {schema}.workflow_runs (id, external_id, workflow, version, priority, input,
    wake_at, created_at)
VALUES (%(id)s, %(external_id)s, %(workflow)s, %(version)s, %(priority)s, %(input)s,
    {schema}.now_at(), {schema}.now_at())
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
    wake_at, input, output, error
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
    wake_at, error
FROM {schema}.workflow_runs
WHERE (%(status)s::text IS NULL OR status = %(status)s)
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

-- name: claim_runs
-- Gives due runs to a worker, highest priority first, then earliest due; runs of other workflows
-- stay. Takes the fence first, then runs. Index: workflow_runs_due.
WITH fence AS MATERIALIZED (
    SELECT 1 FROM {schema}.workers WHERE id = %(worker_id)s AND status = 'active' FOR SHARE
), due AS MATERIALIZED (
    SELECT id FROM {schema}.workflow_runs, fence
    WHERE status IN ('pending', 'sleeping') AND wake_at <= {schema}.now_at()
        AND (workflow, version) IN (SELECT * FROM unnest(%(names)s::text[], %(versions)s::text[]))
    ORDER BY priority DESC, wake_at
    LIMIT %(most)s
    FOR UPDATE OF workflow_runs SKIP LOCKED
)
UPDATE {schema}.workflow_runs r SET status = 'running', worker_id = %(worker_id)s,
    epoch = r.epoch + 1, crash_count = r.crash_count + 1,
    started_at = coalesce(r.started_at, {schema}.now_at())
FROM due WHERE r.id = due.id
RETURNING r.id, r.external_id, r.workflow, r.version, r.priority, r.epoch, r.input, r.crash_count,
    r.created_at;

-- name: free_strays
-- Frees runs that a worker holds without knowing it. Index: workflow_runs_held.
UPDATE {schema}.workflow_runs SET status = 'pending', worker_id = NULL,
    wake_at = {schema}.now_at(), crash_count = greatest(0, crash_count - 1)
WHERE worker_id = %(worker_id)s AND id <> ALL(%(run_ids)s::uuid[])
RETURNING id;

-- name: load_steps
-- Checkpoints of claimed runs. Index: step_runs_pkey.
SELECT run_id, step_id, status, function, input_hash, output, error, attempts,
    (extract(epoch FROM started_at) * 1000000)::int8,
    (extract(epoch FROM completed_at) * 1000000)::int8,
    call_number, completed_number, visible_number, parallel_group_id IS NOT NULL
FROM {schema}.step_runs WHERE run_id = ANY(%(run_ids)s::uuid[]);

-- name: load_groups
-- Closed groups of claimed runs. Index: parallel_groups_pkey.
SELECT run_id, path, kind, size, decision, decided_index, completed_number, call_number,
    visible_number
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
SELECT key, output FROM {schema}.memos
WHERE key = ANY(%(keys)s::bytea[]) AND (expires_at IS NULL OR expires_at > {schema}.now_at());

-- name: register_worker
-- A new incarnation with its lease.
WITH worker AS (
    INSERT INTO {schema}.workers (id, host, boot_id, pid, process_started, config, started_at)
    VALUES (%(id)s, %(host)s, %(boot_id)s, %(pid)s, %(process_started)s, %(config)s,
        {schema}.now_at())
), event AS (
    INSERT INTO {schema}.worker_events (worker_id, event) VALUES (%(id)s, 'started')
)
INSERT INTO {schema}.worker_leases (worker_id, expires_at)
VALUES (%(id)s, {schema}.now_at() + make_interval(secs => %(lease_s)s))
RETURNING {schema}.now_at();

-- name: renew_lease
-- Moves one lease on; none when it was ended. Index: worker_leases_pkey.
UPDATE {schema}.worker_leases SET expires_at = {schema}.now_at() + make_interval(secs => %(lease_s)s)
WHERE worker_id = %(id)s
RETURNING {schema}.now_at();

-- name: find_expired
-- Workers whose lease has run out. A handful of rows.
SELECT l.worker_id FROM {schema}.worker_leases l WHERE l.expires_at <= {schema}.now_at();

-- name: find_incarnations
-- Workers of one host that are not ended. Index: workers_alive.
SELECT id, boot_id, pid, process_started FROM {schema}.workers
WHERE host = %(host)s AND status <> 'ended';

-- name: end_lease
-- Ends a worker's lease: from here on its fence is shut. `forced`: it is known to be gone, or says
-- so itself; else only if the lease has run out. First of the rescue's two statements.
WITH lease AS (
    SELECT worker_id FROM {schema}.worker_leases
    WHERE worker_id = %(id)s AND (%(forced)s OR expires_at <= {schema}.now_at())
    FOR UPDATE
), ended AS (
    UPDATE {schema}.workers w SET status = 'ended', ended_at = {schema}.now_at()
    FROM lease WHERE w.id = lease.worker_id AND w.status <> 'ended'
    RETURNING w.id
), event AS (
    INSERT INTO {schema}.worker_events (worker_id, event, detail)
    SELECT id, 'ended', %(reason)s FROM ended
)
DELETE FROM {schema}.worker_leases WHERE worker_id IN (SELECT worker_id FROM lease);

-- name: free_runs
-- Frees every run whose worker is ended, not only those ended just now: as part of the statement
-- above, its older snapshot would orphan runs. Index: workflow_runs_held.
WITH held AS MATERIALIZED (
    SELECT r.id FROM {schema}.workflow_runs r
    JOIN {schema}.workers w ON w.id = r.worker_id
    WHERE r.worker_id IS NOT NULL AND w.status = 'ended'
    ORDER BY r.id FOR UPDATE OF r SKIP LOCKED
)
UPDATE {schema}.workflow_runs r SET status = 'pending', worker_id = NULL,
    wake_at = {schema}.now_at()
FROM held WHERE r.id = held.id;

-- name: find_backends
-- Backends of a worker's fenced connections, which may hold its row while it is frozen.
SELECT pid FROM pg_catalog.pg_stat_activity
WHERE application_name = %(application_name)s AND pid <> pg_backend_pid();

-- name: terminate_backend
SELECT pg_catalog.pg_terminate_backend(%(pid)s);

-- name: next_due
-- When the earliest sleeping run is due, in seconds from now. Index: workflow_runs_due.
SELECT extract(epoch FROM min(wake_at) - {schema}.now_at())::float8 FROM {schema}.workflow_runs
WHERE status = 'sleeping';

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

-- name: notify
-- Wakes whoever listens on the channel. The payload is empty: listeners look for themselves.
SELECT pg_catalog.pg_notify(%(channel)s, '');
