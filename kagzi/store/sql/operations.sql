-- What people and other runs do to a run from outside. Each statement that changes a run changes
-- one, so that no two of them can wait for each other in a circle.
-- `{schema}` is the quoted schema; parameters are bound by name. "The fence" is the worker's row,
-- locked FOR SHARE: empty when the lease was ended.

-- name: cancel_run
-- Ends a run that nobody holds; asks the worker of one that is held. Index: primary key.
UPDATE {schema}.workflow_runs SET
    status = CASE WHEN status = 'running' THEN status ELSE 'cancelled' END,
    request = CASE WHEN status = 'running' THEN 'cancel' END,
    completed_at = CASE WHEN status <> 'running' THEN {schema}.now_at() END,
    told = status = 'running', news = news + 1
WHERE id = %(id)s AND status NOT IN ('completed', 'failed', 'cancelled')
RETURNING status;

-- name: pause_run
-- Stops a run that nobody holds from being claimed; asks the worker of one that is held, unless it
-- is to be cancelled. Index: primary key.
UPDATE {schema}.workflow_runs SET
    status = CASE WHEN status = 'running' THEN status ELSE 'paused' END,
    request = CASE WHEN status = 'running' THEN coalesce(request, 'pause') END,
    news = news + 1
WHERE id = %(id)s AND status NOT IN ('completed', 'failed', 'cancelled')
RETURNING CASE WHEN request = 'cancel' THEN request ELSE status END;

-- name: resume_run
-- Makes a paused run due; takes back a pause that its worker has not heard of. Index: primary key.
UPDATE {schema}.workflow_runs SET
    status = CASE WHEN status = 'paused' THEN 'pending' ELSE status END,
    wake_at = CASE WHEN status = 'paused' THEN {schema}.now_at() ELSE wake_at END,
    request = CASE WHEN request = 'pause' THEN NULL ELSE request END,
    news = news + 1
WHERE id = %(id)s AND (status = 'paused' OR request = 'pause')
RETURNING status;

-- name: read_news
-- Held runs that somebody wants something of. Index: workflow_runs_held.
SELECT id, request, news FROM {schema}.workflow_runs
WHERE worker_id = %(worker_id)s AND (request IS NOT NULL OR news > 0);

-- name: select_runs
-- Ids of runs for an operation on many, in pages by id. Index: primary key.
SELECT id FROM {schema}.workflow_runs
WHERE id > %(after)s AND status = ANY(%(statuses)s::text[])
    AND (%(workflow)s::text IS NULL OR workflow = %(workflow)s
        OR workflow LIKE '%%.' || %(workflow)s)
    AND (%(before)s::timestamptz IS NULL OR created_at < %(before)s)
ORDER BY id LIMIT %(most)s;

-- name: find_untold
-- Ended runs of whose end others are still to hear. Index: workflow_runs_untold.
SELECT id, parent_run_id, status, completed_at FROM {schema}.workflow_runs
WHERE NOT told AND status IN ('completed', 'failed', 'cancelled')
ORDER BY completed_at LIMIT 500;

-- name: tell_run
-- Something a run may wait for has happened. Index: primary key.
UPDATE {schema}.workflow_runs SET news = news + 1,
    wake_at = CASE WHEN status = 'sleeping' THEN {schema}.now_at() ELSE wake_at END
WHERE id = %(id)s AND status NOT IN ('completed', 'failed', 'cancelled');

-- name: open_children
-- Runs that end with the one that started them. Index: workflow_runs_children.
SELECT id FROM {schema}.workflow_runs
WHERE parent_run_id = %(id)s AND on_parent_cancel = 'cancel'
    AND status NOT IN ('completed', 'failed', 'cancelled');

-- name: set_told
-- Everybody who should has heard of these ends; one that a retry has taken back since, or that came
-- after it, does not count. Rows that somebody holds are left for the next time. Index: primary key.
WITH heard AS MATERIALIZED (
    SELECT r.id FROM {schema}.workflow_runs r
    JOIN unnest(%(ids)s::uuid[], %(at)s::timestamptz[]) AS e(id, at)
        ON r.id = e.id AND r.completed_at = e.at
    ORDER BY r.id FOR UPDATE OF r SKIP LOCKED
)
UPDATE {schema}.workflow_runs r SET told = true FROM heard WHERE r.id = heard.id;

-- name: send_event
-- Adds an event and makes a run that sleeps due, unless the run has ended. Both are one change: a
-- worker that parks the run either knows of the event or finds more news than it knew.
-- Indexes: primary keys, run_events_key.
WITH run AS (
    UPDATE {schema}.workflow_runs SET news = news + 1,
        wake_at = CASE WHEN status = 'sleeping' THEN {schema}.now_at() ELSE wake_at END
    WHERE id = %(id)s AND status NOT IN ('completed', 'failed', 'cancelled')
    RETURNING id
), event AS (
    INSERT INTO {schema}.run_events (run_id, topic, value, key, sent_at)
    SELECT id, %(topic)s, %(value)s, %(key)s, {schema}.now_at() FROM run
    ON CONFLICT DO NOTHING
    RETURNING 1
)
SELECT (SELECT count(*) FROM run), (SELECT count(*) FROM event);

-- name: load_events
-- Events of a run in the order of their numbers, and the news that they are part of.
-- Index: run_events_pkey.
SELECT r.news, e.id, e.topic, e.value FROM {schema}.workflow_runs r
LEFT JOIN {schema}.run_events e ON e.run_id = r.id
WHERE r.id = %(id)s ORDER BY e.id;

-- name: insert_child
-- Adds a run started by another, while its worker holds that one: locked, so that a parent that is
-- let go has no child that its end misses. Lock order: worker, then run.
-- Indexes: primary keys, workflow_runs (workflow, external_id).
WITH fence AS MATERIALIZED (
    SELECT 1 FROM {schema}.workers WHERE id = %(worker_id)s AND status <> 'ended' FOR SHARE
), parent AS MATERIALIZED (
    SELECT r.id, r.priority FROM fence, {schema}.workflow_runs r
    WHERE r.id = %(parent_run_id)s AND r.worker_id = %(worker_id)s AND r.epoch = %(epoch)s
    FOR SHARE OF r
), added AS (
    INSERT INTO {schema}.workflow_runs (id, external_id, workflow, version, priority, input,
        wake_at, created_at, queue, queue_key, apart, parent_run_id, parent_step_id,
        on_parent_cancel)
    SELECT %(id)s, %(external_id)s, %(workflow)s, %(version)s,
        coalesce(%(priority)s::int, parent.priority), %(input)s,
        {schema}.now_at(), {schema}.now_at(), %(queue)s::text, %(queue_key)s,
        EXISTS (SELECT FROM {schema}.queues WHERE name = %(queue)s::text AND apart), parent.id,
        %(parent_step_id)s, %(on_parent_cancel)s
    FROM parent
    ON CONFLICT DO NOTHING
    RETURNING 1
)
SELECT (SELECT count(*) FROM parent), (SELECT count(*) FROM added);

-- name: read_ends
-- What those of these runs that have ended gave; `everyone`: how the others stand, too. Index: primary
-- key.
SELECT id, status, output, error FROM {schema}.workflow_runs
WHERE id = ANY(%(ids)s::uuid[])
    AND (%(everyone)s OR status IN ('completed', 'failed', 'cancelled'));

-- name: failed_children
-- Children that a retry of their parent lets go on, too: all but those whose failure it handled, as
-- a checkpoint that the retry keeps says. Indexes: workflow_runs_children, step_runs_pkey.
SELECT c.id, c.error FROM {schema}.workflow_runs c
WHERE c.parent_run_id = %(id)s AND c.status IN ('failed', 'cancelled') AND NOT EXISTS (
    SELECT 1 FROM {schema}.step_runs s
    WHERE s.run_id = c.parent_run_id AND s.step_id = c.parent_step_id AND s.status = 'failed')
ORDER BY c.id FOR UPDATE OF c;

-- name: children_to_cancel
-- Children whose workers have not heard yet that their parent was cancelled.
-- Index: workflow_runs_children.
SELECT id FROM {schema}.workflow_runs WHERE parent_run_id = %(id)s AND request = 'cancel';

-- name: take_back_cancel
-- A retry of the parent came before the worker heard. Index: primary key.
UPDATE {schema}.workflow_runs SET request = NULL WHERE id = %(id)s AND request = 'cancel';

-- name: publish_value
-- Sets what clients see under a key, while the worker holds the run. Numbers rise with each change,
-- so that a reader knows what is new. Indexes: primary keys.
WITH fence AS MATERIALIZED (
    SELECT 1 FROM {schema}.workers WHERE id = %(worker_id)s AND status <> 'ended' FOR SHARE
)
INSERT INTO {schema}.run_values AS v (run_id, key, value, number, published_at)
SELECT r.id, %(key)s, %(value)s, %(number)s, {schema}.now_at()
FROM fence, {schema}.workflow_runs r
WHERE r.id = %(run_id)s AND r.worker_id = %(worker_id)s AND r.epoch = %(epoch)s
ON CONFLICT (run_id, key) DO UPDATE SET value = excluded.value, number = excluded.number,
    published_at = excluded.published_at
WHERE v.number < excluded.number
RETURNING 1;

-- name: read_values
-- What a run has published since a number. Index: run_values_pkey.
SELECT key, value, number FROM {schema}.run_values
WHERE run_id = %(run_id)s AND number > %(after)s ORDER BY number;

-- name: fork_run
-- A new run with the input of another, and its tick. Index: primary key.
INSERT INTO {schema}.workflow_runs (id, external_id, workflow, version, status, priority, input,
    wake_at, created_at, forked_from, epoch, queue, queue_key, apart, scheduled_at)
SELECT %(new_id)s, %(external_id)s, workflow, coalesce(%(version)s::text, version), 'pending',
    priority, input, {schema}.now_at(), {schema}.now_at(), id, 1, queue, queue_key, apart,
    scheduled_at
FROM {schema}.workflow_runs WHERE id = %(id)s
ON CONFLICT (workflow, external_id) DO NOTHING
RETURNING workflow, version;

-- name: fork_steps
-- Copies checkpoints but for those that the new run makes anew. Index: step_runs_pkey.
INSERT INTO {schema}.step_runs (run_id, step_id, function, status, output, error, input, input_hash,
    attempts, parallel_group_id, parent_step_id, started_at, completed_at, call_number,
    completed_number, worker_id, process_id, visible_number)
SELECT %(new_id)s, step_id, function, status, output, error, input, input_hash, attempts,
    parallel_group_id, parent_step_id, started_at, completed_at, call_number, completed_number,
    worker_id, process_id, visible_number
FROM {schema}.step_runs
WHERE run_id = %(id)s AND call_number <= %(number)s AND step_id <> ALL(%(dropped)s::text[]);

-- name: fork_groups
-- The same of groups. Index: parallel_groups_pkey.
INSERT INTO {schema}.parallel_groups (run_id, path, id, kind, size, strategy, group_limit,
    parent_step_id, decision, decided_index, cached, succeeded, failed, started_at, completed_at,
    wall_s, steps_s, longest_s, call_number, completed_number, visible_number)
SELECT %(new_id)s, path, id, kind, size, strategy, group_limit, parent_step_id, decision,
    decided_index, cached, succeeded, failed, started_at, completed_at, wall_s, steps_s, longest_s,
    call_number, completed_number, visible_number
FROM {schema}.parallel_groups
WHERE run_id = %(id)s AND call_number <= %(number)s AND path <> ALL(%(dropped)s::text[]);

-- name: fork_values
-- What was published before the step, under each key whose latest value that is; the other keys get
-- theirs when the new run comes to it. Index: run_values_pkey.
INSERT INTO {schema}.run_values (run_id, key, value, number, published_at)
SELECT %(new_id)s, key, value, number, published_at FROM {schema}.run_values
WHERE run_id = %(id)s AND number < %(number)s;

-- name: fork_events
-- The new run gets what was sent to the old one; its checkpoints say which of it is used up.
-- Index: run_events_pkey.
INSERT INTO {schema}.run_events (run_id, id, topic, value, key, sent_at)
SELECT %(new_id)s, id, topic, value, key, sent_at FROM {schema}.run_events WHERE run_id = %(id)s;
