-- Schedules, and the runs that they start.
-- `{schema}` is the quoted schema; parameters are bound by name.

-- name: lock_schedule
-- One schedule, locked for a client's change, and the store's time. Index: schedules_pkey.
SELECT workflow, version, pinned, cron, timezone, catch_up, overlap, queue, queue_key, priority,
    input, paused, last_at, {schema}.now_at()
FROM {schema}.schedules WHERE id = %(id)s FOR UPDATE;

-- name: read_now
SELECT {schema}.now_at();

-- name: add_schedule
-- A new schedule; nothing if its id is taken meanwhile. Index: schedules_pkey.
INSERT INTO {schema}.schedules (id, workflow, version, pinned, cron, timezone, catch_up, overlap,
    queue, queue_key, priority, input, next_at, created_at)
VALUES (%(id)s, %(workflow)s, %(version)s, %(pinned)s, %(cron)s, %(timezone)s, %(catch_up)s,
    %(overlap)s, %(queue)s, %(queue_key)s, %(priority)s, %(input)s, %(next_at)s, {schema}.now_at())
ON CONFLICT (id) DO NOTHING
RETURNING id;

-- name: change_schedule
-- Another definition under a known id; `next_at` stays if none is given. Index: schedules_pkey.
UPDATE {schema}.schedules SET workflow = %(workflow)s, version = %(version)s,
    pinned = %(pinned)s, cron = %(cron)s, timezone = %(timezone)s, catch_up = %(catch_up)s,
    overlap = %(overlap)s, queue = %(queue)s, queue_key = %(queue_key)s, priority = %(priority)s,
    input = %(input)s, revision = revision + 1, next_at = coalesce(%(next_at)s, next_at)
WHERE id = %(id)s;

-- name: pause_schedule
-- Stops its ticks. Index: schedules_pkey.
UPDATE {schema}.schedules SET paused = true, revision = revision + 1
WHERE id = %(id)s RETURNING id;

-- name: resume_schedule
-- Lets it tick again from `next_at` on. Index: schedules_pkey.
UPDATE {schema}.schedules SET paused = false, revision = revision + 1, next_at = %(next_at)s
WHERE id = %(id)s;

-- name: delete_schedule
-- Its runs stay. Index: schedules_pkey.
DELETE FROM {schema}.schedules WHERE id = %(id)s RETURNING id;

-- name: list_schedules
-- All of them, or one. Index: schedules_pkey.
SELECT id, workflow, version, cron, timezone, catch_up, overlap, queue, queue_key, priority, input,
    paused, next_at, last_at, runs, skipped, created_at
FROM {schema}.schedules WHERE %(id)s::text IS NULL OR id = %(id)s ORDER BY id;

-- name: find_due_schedules
-- Schedules whose next tick comes within some seconds. Locks nothing. Index: schedules_due.
SELECT id, revision, cron, timezone, catch_up, overlap, next_at, {schema}.now_at()
FROM {schema}.schedules
WHERE NOT paused AND next_at <= {schema}.now_at() + make_interval(secs => %(within_s)s)
    AND id <> ALL(%(except_ids)s::text[])
ORDER BY next_at LIMIT %(most)s;

-- name: start_ticks
-- Starts the runs of ticks and moves their schedules on, if these stand as they were read; a
-- schedule that another worker moves at the moment is left to it. A schedule whose runs must not
-- overlap has at most one tick here.
-- Indexes: schedules_pkey, workflow_versions_default, workflow_runs_of_schedule, queues_pkey.
WITH held AS MATERIALIZED (
    SELECT s.id, s.workflow, s.priority, s.input, s.overlap, s.queue, s.queue_key, a.later_at,
        CASE WHEN s.pinned THEN s.version ELSE coalesce((
            SELECT v.version FROM {schema}.workflow_versions v
            WHERE v.workflow = s.workflow AND v.is_default), s.version) END AS version
    FROM {schema}.schedules s
    JOIN unnest(%(ids)s::text[], %(revisions)s::int[], %(next_ats)s::timestamptz[],
            %(later_ats)s::timestamptz[]) AS a(id, revision, next_at, later_at)
        ON s.id = a.id AND s.revision = a.revision AND s.next_at = a.next_at AND NOT s.paused
    ORDER BY s.id FOR UPDATE OF s SKIP LOCKED
), wanted AS MATERIALIZED (
    SELECT held.*, t.run_id, t.external_id, t.tick, held.overlap = 'skip' AND EXISTS (
        SELECT FROM {schema}.workflow_runs r
        WHERE r.schedule_id = held.id AND r.completed_at IS NULL) AS skipped
    FROM held JOIN unnest(%(tick_ids)s::text[], %(run_ids)s::uuid[], %(external_ids)s::text[],
        %(ticks)s::timestamptz[]) AS t(id, run_id, external_id, tick) ON t.id = held.id
), started AS (
    INSERT INTO {schema}.workflow_runs (id, external_id, workflow, version, priority, input,
        wake_at, created_at, schedule_id, scheduled_at, queue, queue_key, apart)
    SELECT run_id, external_id, workflow, version, priority, input, tick, {schema}.now_at(), id,
        tick, queue, queue_key,
        EXISTS (SELECT FROM {schema}.queues q WHERE q.name = wanted.queue AND q.apart)
    FROM wanted WHERE NOT skipped ORDER BY external_id
    ON CONFLICT (workflow, external_id) DO NOTHING
    RETURNING schedule_id, scheduled_at
)
UPDATE {schema}.schedules s SET next_at = held.later_at,
    last_at = greatest(s.last_at, (SELECT max(scheduled_at) FROM started WHERE schedule_id = s.id)),
    runs = s.runs + (SELECT count(*) FROM started WHERE schedule_id = s.id),
    skipped = s.skipped + (SELECT count(*) FROM wanted w WHERE w.id = s.id AND w.skipped)
FROM held WHERE s.id = held.id
RETURNING s.id, (SELECT count(*) FROM started WHERE schedule_id = s.id);

-- name: find_overlapped
-- Unfinished runs of schedules whose newest run cancels the others, and that nobody has asked to
-- cancel yet. Index: workflow_runs_of_schedule.
SELECT r.id FROM {schema}.schedules s
JOIN {schema}.workflow_runs r ON r.schedule_id = s.id AND r.scheduled_at < s.last_at
WHERE s.overlap = 'cancel' AND r.completed_at IS NULL AND r.request IS DISTINCT FROM 'cancel'
LIMIT 100;
