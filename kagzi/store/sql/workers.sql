-- Workers, their leases, and the rescue of runs whose worker is gone.
-- `{schema}` is the quoted schema; parameters are bound by name. "The fence" is the worker's row,
-- locked FOR SHARE: empty when the lease was ended.

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
-- Workers whose lease has run out, and those that are ended and hold runs still, which were locked
-- when they were rescued from. Indexes: workflow_runs_held, workers_pkey.
SELECT l.worker_id FROM {schema}.worker_leases l WHERE l.expires_at <= {schema}.now_at()
UNION
SELECT r.worker_id FROM {schema}.workflow_runs r
LEFT JOIN {schema}.workers w ON w.id = r.worker_id
WHERE r.worker_id IS NOT NULL AND w.status IS DISTINCT FROM 'active'
    AND w.status IS DISTINCT FROM 'draining';

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
-- above, its older snapshot would orphan runs. What was asked of the worker takes effect now.
-- Index: workflow_runs_held.
WITH held AS MATERIALIZED (
    SELECT r.id FROM {schema}.workflow_runs r
    LEFT JOIN {schema}.workers w ON w.id = r.worker_id
    WHERE r.worker_id IS NOT NULL AND coalesce(w.status, 'ended') = 'ended'
    ORDER BY r.id FOR UPDATE OF r SKIP LOCKED
)
UPDATE {schema}.workflow_runs r SET
    status = CASE r.request WHEN 'cancel' THEN 'cancelled' WHEN 'pause' THEN 'paused'
        ELSE 'pending' END,
    completed_at = CASE WHEN r.request = 'cancel' THEN {schema}.now_at() END,
    told = r.request IS DISTINCT FROM 'cancel', request = NULL, worker_id = NULL,
    wake_at = {schema}.now_at()
FROM held WHERE r.id = held.id;

-- name: begin_rescue
-- Settings of a rescuer's transaction, and which backend it is.
SELECT pg_catalog.pg_backend_pid(),
    pg_catalog.set_config('application_name', %(rescuer)s, true),
    pg_catalog.set_config('lock_timeout', %(lock_timeout)s, true);

-- name: terminate_blockers
-- Ends the backends that hold a row which the backend `pid` waits for, other rescuers excepted. Not
-- those that hold a table, as a migration does.
SELECT pg_catalog.pg_terminate_backend(a.pid) FROM pg_catalog.pg_stat_activity a
WHERE a.pid = ANY(pg_catalog.pg_blocking_pids(%(pid)s)) AND a.application_name <> %(rescuer)s
    AND EXISTS (SELECT FROM pg_catalog.pg_locks l
        WHERE l.pid = %(pid)s AND NOT l.granted AND l.locktype IN ('transactionid', 'tuple'));

-- name: add_worker_event
-- Something in a worker's life.
INSERT INTO {schema}.worker_events (worker_id, event, detail, at)
VALUES (%(id)s, %(event)s, %(detail)s, {schema}.now_at());

-- name: absolve_runs
-- Takes back the count of crashes for runs that a worker lost through no fault of theirs.
-- Index: primary key.
WITH lost AS MATERIALIZED (
    SELECT id FROM {schema}.workflow_runs
    WHERE id = ANY(%(run_ids)s::uuid[]) AND crash_count > 0
    ORDER BY id FOR UPDATE SKIP LOCKED
)
UPDATE {schema}.workflow_runs r SET crash_count = r.crash_count - 1 FROM lost WHERE r.id = lost.id;

-- name: start_draining
-- The worker claims nothing any more; it still writes. Index: primary key.
UPDATE {schema}.workers SET status = 'draining' WHERE id = %(id)s AND status = 'active';

-- name: list_workers
-- Workers with their leases, what they hold, and the last thing that happened to them.
-- Indexes: workers_alive, workflow_runs_held, worker_events_worker.
SELECT w.id, w.host, w.pid, w.status, w.config, w.started_at, w.ended_at,
    extract(epoch FROM l.expires_at - {schema}.now_at())::float8,
    (SELECT count(*) FROM {schema}.workflow_runs r WHERE r.worker_id = w.id),
    e.event, e.at, e.detail
FROM {schema}.workers w
LEFT JOIN {schema}.worker_leases l ON l.worker_id = w.id
LEFT JOIN LATERAL (
    SELECT event, at, detail FROM {schema}.worker_events v WHERE v.worker_id = w.id
    ORDER BY v.at DESC LIMIT 1
) e ON true
WHERE %(everyone)s OR w.status <> 'ended'
ORDER BY w.started_at DESC, w.id;

-- name: delete_old_workers
-- Forgets workers that ended long ago and hold nothing, with their events. Index: workers_ended.
WITH old AS MATERIALIZED (
    SELECT id FROM {schema}.workers w
    WHERE status = 'ended' AND ended_at < {schema}.now_at() - make_interval(secs => %(kept_s)s)
        AND NOT EXISTS (SELECT FROM {schema}.workflow_runs r WHERE r.worker_id = w.id)
    ORDER BY ended_at LIMIT %(most)s FOR UPDATE SKIP LOCKED
), events AS (
    DELETE FROM {schema}.worker_events WHERE worker_id IN (SELECT id FROM old)
), leases AS (
    DELETE FROM {schema}.worker_leases WHERE worker_id IN (SELECT id FROM old)
)
DELETE FROM {schema}.workers WHERE id IN (SELECT id FROM old) RETURNING id;
