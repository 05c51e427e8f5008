-- Named queues with limits over all workers.
--
-- Waiting runs stand in lines. The common line is workflow_runs_due: any number of workers claim
-- from it at once, and nobody counts. A run that is `apart` stands in the line of its own queue,
-- from which claim_apart takes runs under the lock of the queue's row where the queue has limits.
--
-- `apart` is written when a run is inserted, and may be out of date where limits were set meanwhile
-- (a transaction of long ago, a COPY). That is mended where it matters: claim_runs takes no run
-- whose queue stands apart, but moves it to its own line. The own line of a queue is served for
-- ever, with limits or without.

CREATE TABLE queues (
    name text COLLATE "C" PRIMARY KEY,
    concurrency integer CHECK (concurrency > 0),
    concurrency_per_key integer CHECK (concurrency_per_key > 0),
    rate_starts integer CHECK (rate_starts > 0),
    rate_window_s double precision CHECK (rate_window_s > 0),
    paused boolean NOT NULL DEFAULT false,
    changed_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    -- False until what ran before the last change is known to count: see claim_apart.
    settled boolean NOT NULL DEFAULT false,
    -- Whether its runs have a line of their own. A queue that is not listed here has none.
    apart boolean NOT NULL GENERATED ALWAYS AS (name <> 'default' OR paused
        OR coalesce(concurrency, concurrency_per_key, rate_starts) IS NOT NULL) STORED,
    CONSTRAINT a_rate_has_both CHECK ((rate_starts IS NULL) = (rate_window_s IS NULL))
);

-- First starts under a rate limit, within its window: what happened at one claim is one row.
CREATE TABLE queue_starts (
    queue text COLLATE "C" NOT NULL,
    at timestamptz NOT NULL,
    starts integer NOT NULL,
    PRIMARY KEY (queue, at)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);

ALTER TABLE workflow_runs
    ADD COLUMN queue text COLLATE "C" NOT NULL DEFAULT 'default',
    ADD COLUMN queue_key text COLLATE "C" NOT NULL DEFAULT '',  -- '': none, counts under no key
    ADD COLUMN apart boolean NOT NULL DEFAULT false;

DROP INDEX workflow_runs_due;
-- Serves claim_runs: highest priority first, then earliest due.
CREATE INDEX workflow_runs_due ON workflow_runs (priority DESC, wake_at)
    WHERE status IN ('pending', 'sleeping') AND NOT apart;
DROP INDEX workflow_runs_suspect;
CREATE INDEX workflow_runs_suspect ON workflow_runs (priority DESC, wake_at)
    WHERE status IN ('pending', 'sleeping') AND crash_count >= 2 AND NOT apart;
-- Serve claim_apart. Runs that never started are nearly all due, so their order comes first; of
-- those that sleep most are not.
CREATE INDEX workflow_runs_fresh ON workflow_runs (queue, priority DESC, wake_at)
    WHERE status IN ('pending', 'sleeping') AND apart AND started_at IS NULL;
CREATE INDEX workflow_runs_parked ON workflow_runs (queue, wake_at)
    WHERE status IN ('pending', 'sleeping') AND apart AND started_at IS NOT NULL;
CREATE INDEX workflow_runs_keys ON workflow_runs (queue, queue_key, priority DESC, wake_at)
    WHERE status IN ('pending', 'sleeping') AND apart;
CREATE INDEX workflow_runs_busy ON workflow_runs (queue, queue_key)
    WHERE status = 'running' AND apart;

-- Gives due runs of queues that stand apart to a worker; within a queue, highest priority first,
-- then earliest due. Locks the worker's row, then queues, then runs.
--
-- One function, so that it is one message: a worker that freezes between two messages would hold
-- the queue. And each of its statements sees what was committed before it: the runs that the
-- previous holder of the queue's lock claimed are counted.
--
-- Returns the runs. A row without a run says in how many seconds it is worth looking again.
CREATE FUNCTION claim_apart(
    in_worker uuid, in_served text[], in_workflows text[], in_versions text[],
    in_most integer, in_suspects integer
) RETURNS TABLE (run workflow_runs, again_s double precision) LANGUAGE plpgsql
-- Statistics of a queue are always out of date; these statements want their indexes.
SET enable_seqscan = off AS $$
DECLARE
    v_budget CONSTANT integer := 500;  -- of a line's head, before its keys are looked at one by one
    v_left integer := in_most;
    v_again double precision;
    v_wait double precision;
    v_name text;
    v_queue {schema}.queues;
    v_limited boolean;
    v_now timestamptz;
    v_busy jsonb;
    v_room integer;
    v_fresh_room integer;
    v_chosen uuid[];
    v_suspects integer;
    v_more boolean;
    v_count integer;
BEGIN
    PERFORM FROM {schema}.workers w WHERE w.id = in_worker AND w.status = 'active' FOR SHARE;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    FOR v_name IN
        SELECT q.name FROM {schema}.queues q
        WHERE NOT q.paused AND (in_served IS NULL OR q.name = ANY(in_served))
        ORDER BY pg_catalog.random()  -- the first of a fixed order would starve the others
    LOOP
        EXIT WHEN v_left <= 0;
        CONTINUE WHEN NOT EXISTS (
            SELECT FROM {schema}.workflow_runs r
            WHERE r.queue = v_name AND r.status IN ('pending', 'sleeping') AND r.apart
                AND r.started_at IS NULL AND r.wake_at <= {schema}.now_at()
        ) AND NOT EXISTS (
            SELECT FROM {schema}.workflow_runs r
            WHERE r.queue = v_name AND r.status IN ('pending', 'sleeping') AND r.apart
                AND r.started_at IS NOT NULL AND r.wake_at <= {schema}.now_at()
        );

        SELECT q.* INTO v_queue FROM {schema}.queues q WHERE q.name = v_name;
        v_limited := coalesce(v_queue.concurrency, v_queue.concurrency_per_key,
            v_queue.rate_starts) IS NOT NULL;
        IF v_limited THEN
            SELECT q.* INTO v_queue FROM {schema}.queues q WHERE q.name = v_name
            FOR NO KEY UPDATE SKIP LOCKED;
            IF NOT FOUND THEN  -- another worker claims from it just now, perhaps less than there is
                v_again := 0.02;
                CONTINUE;
            END IF;
        END IF;
        CONTINUE WHEN v_queue.paused;
        v_now := {schema}.now_at();

        -- What is running. A claim from the common line may still be under way while limits are
        -- set; for a minute from then on all held runs are looked through, and marked.
        v_busy := '{}';
        v_limited := coalesce(v_queue.concurrency, v_queue.concurrency_per_key) IS NOT NULL;
        IF v_limited AND v_queue.settled THEN
            SELECT coalesce(jsonb_object_agg(b.queue_key, b.busy), '{}') INTO v_busy FROM (
                SELECT r.queue_key, count(*) AS busy FROM {schema}.workflow_runs r
                WHERE r.queue = v_name AND r.status = 'running' AND r.apart GROUP BY r.queue_key
            ) b;
        ELSIF v_limited THEN
            WITH unmarked AS MATERIALIZED (
                SELECT r.id FROM {schema}.workflow_runs r
                WHERE r.worker_id IS NOT NULL AND r.queue = v_name AND NOT r.apart
                FOR UPDATE SKIP LOCKED
            )
            UPDATE {schema}.workflow_runs r SET apart = true FROM unmarked u WHERE r.id = u.id;
            SELECT coalesce(jsonb_object_agg(b.queue_key, b.busy), '{}') INTO v_busy FROM (
                SELECT r.queue_key, count(*) AS busy FROM {schema}.workflow_runs r
                WHERE r.worker_id IS NOT NULL AND r.queue = v_name GROUP BY r.queue_key
            ) b;
            IF v_now >= v_queue.changed_at + interval '1 minute' AND NOT EXISTS (
                SELECT FROM {schema}.workflow_runs r
                WHERE r.worker_id IS NOT NULL AND r.queue = v_name AND NOT r.apart
            ) THEN
                UPDATE {schema}.queues q SET settled = true WHERE q.name = v_name;
            END IF;
        END IF;

        v_room := v_left;
        IF v_queue.concurrency IS NOT NULL THEN
            SELECT least(v_left, v_queue.concurrency - coalesce(sum(b.value::integer), 0)) INTO v_room
            FROM jsonb_each_text(v_busy) b;
        END IF;
        CONTINUE WHEN v_room <= 0;
        v_fresh_room := v_room;
        IF v_queue.rate_starts IS NOT NULL THEN
            DELETE FROM {schema}.queue_starts s WHERE s.queue = v_name
                AND s.at <= v_now - make_interval(secs => v_queue.rate_window_s);
            SELECT least(v_room, v_queue.rate_starts - coalesce(sum(s.starts), 0)) INTO v_fresh_room
            FROM {schema}.queue_starts s WHERE s.queue = v_name;
        END IF;

        IF v_queue.concurrency_per_key IS NULL THEN
            WITH fresh AS MATERIALIZED (
                SELECT r.id, r.priority, r.wake_at FROM {schema}.workflow_runs r
                WHERE r.queue = v_name AND r.status IN ('pending', 'sleeping') AND r.apart
                    AND r.started_at IS NULL AND r.wake_at <= v_now AND r.crash_count < 2
                    AND (r.workflow, r.version) IN (SELECT * FROM unnest(in_workflows, in_versions))
                ORDER BY r.priority DESC, r.wake_at LIMIT greatest(0, v_fresh_room)
                FOR UPDATE OF r SKIP LOCKED
            ), parked AS MATERIALIZED (
                SELECT r.id, r.priority, r.wake_at FROM {schema}.workflow_runs r
                WHERE r.queue = v_name AND r.status IN ('pending', 'sleeping') AND r.apart
                    AND r.started_at IS NOT NULL AND r.wake_at <= v_now AND r.crash_count < 2
                    AND (r.workflow, r.version) IN (SELECT * FROM unnest(in_workflows, in_versions))
                ORDER BY r.priority DESC, r.wake_at LIMIT v_room
                FOR UPDATE OF r SKIP LOCKED
            ), suspect AS MATERIALIZED (
                SELECT r.id, r.priority, r.wake_at FROM {schema}.workflow_runs r
                WHERE r.queue = v_name AND r.status IN ('pending', 'sleeping') AND r.apart
                    AND r.started_at IS NOT NULL AND r.wake_at <= v_now AND r.crash_count >= 2
                    AND (r.workflow, r.version) IN (SELECT * FROM unnest(in_workflows, in_versions))
                ORDER BY r.priority DESC, r.wake_at LIMIT in_suspects
                FOR UPDATE OF r SKIP LOCKED
            ), chosen AS (
                SELECT c.* FROM (
                    SELECT *, 0 AS suspects FROM fresh UNION ALL SELECT *, 0 FROM parked
                    UNION ALL SELECT *, 1 FROM suspect
                ) c ORDER BY c.priority DESC, c.wake_at LIMIT v_room
            )
            SELECT coalesce(array_agg(c.id), '{}'), coalesce(sum(c.suspects), 0)
            INTO v_chosen, v_suspects FROM chosen c;
        ELSE
            -- First the head of the line. Where that is full of keys that have no room, each key
            -- in turn: by skipping from one to the next, however many runs wait under it.
            FOR v_deep IN 0..1 LOOP
                WITH RECURSIVE fresh AS MATERIALIZED (
                    SELECT r.id, r.queue_key, r.priority, r.wake_at, false AS suspect, true AS fresh
                    FROM {schema}.workflow_runs r
                    WHERE v_deep = 0 AND v_fresh_room > 0
                        AND r.queue = v_name AND r.status IN ('pending', 'sleeping') AND r.apart
                        AND r.started_at IS NULL AND r.wake_at <= v_now
                        AND (r.workflow, r.version) IN
                            (SELECT * FROM unnest(in_workflows, in_versions))
                    ORDER BY r.priority DESC, r.wake_at LIMIT v_budget
                ), parked AS MATERIALIZED (
                    SELECT r.id, r.queue_key, r.priority, r.wake_at, r.crash_count >= 2, false
                    FROM {schema}.workflow_runs r
                    WHERE v_deep = 0
                        AND r.queue = v_name AND r.status IN ('pending', 'sleeping') AND r.apart
                        AND r.started_at IS NOT NULL AND r.wake_at <= v_now
                        AND (r.crash_count < 2 OR in_suspects > 0)
                        AND (r.workflow, r.version) IN
                            (SELECT * FROM unnest(in_workflows, in_versions))
                    ORDER BY r.priority DESC, r.wake_at LIMIT v_budget
                ), keys(queue_key) AS (
                    (SELECT r.queue_key FROM {schema}.workflow_runs r
                    WHERE v_deep = 1
                        AND r.queue = v_name AND r.status IN ('pending', 'sleeping') AND r.apart
                    ORDER BY r.queue_key LIMIT 1)
                    UNION ALL
                    SELECT (SELECT r.queue_key FROM {schema}.workflow_runs r
                        WHERE r.queue = v_name AND r.status IN ('pending', 'sleeping') AND r.apart
                            AND r.queue_key > k.queue_key
                        ORDER BY r.queue_key LIMIT 1)
                    FROM keys k WHERE k.queue_key IS NOT NULL
                ), of_keys AS MATERIALIZED (
                    SELECT c.* FROM keys k CROSS JOIN LATERAL (
                        SELECT r.id, r.queue_key, r.priority, r.wake_at, r.crash_count >= 2,
                            r.started_at IS NULL
                        FROM {schema}.workflow_runs r
                        WHERE r.queue = v_name AND r.queue_key = k.queue_key
                            AND r.status IN ('pending', 'sleeping') AND r.apart
                            AND r.wake_at <= v_now
                            AND (r.started_at IS NOT NULL OR v_fresh_room > 0)
                            AND (r.crash_count < 2 OR in_suspects > 0)
                            AND (r.workflow, r.version) IN
                                (SELECT * FROM unnest(in_workflows, in_versions))
                        ORDER BY r.priority DESC, r.wake_at
                        LIMIT CASE WHEN k.queue_key = '' THEN v_room ELSE least(v_room, greatest(0,
                            v_queue.concurrency_per_key
                            - coalesce((v_busy ->> k.queue_key)::integer, 0))) END
                    ) c WHERE k.queue_key IS NOT NULL
                ), ranked AS (
                    SELECT c.*, row_number() OVER (
                        PARTITION BY c.queue_key ORDER BY c.priority DESC, c.wake_at, c.id
                    ) + coalesce((v_busy ->> c.queue_key)::integer, 0) AS of_key
                    FROM (TABLE fresh UNION ALL TABLE parked UNION ALL TABLE of_keys) c
                ), counted AS (
                    SELECT c.*, count(*) FILTER (WHERE c.fresh) OVER before AS fresh_number,
                        count(*) FILTER (WHERE c.suspect) OVER before AS suspect_number
                    FROM ranked c
                    WHERE c.queue_key = '' OR c.of_key <= v_queue.concurrency_per_key
                    WINDOW before AS (ORDER BY c.priority DESC, c.wake_at, c.id)
                ), chosen AS (
                    SELECT c.* FROM counted c
                    WHERE (NOT c.fresh OR c.fresh_number <= v_fresh_room)
                        AND (NOT c.suspect OR c.suspect_number <= in_suspects)
                    ORDER BY c.priority DESC, c.wake_at, c.id LIMIT v_room
                )
                SELECT coalesce((SELECT array_agg(c.id) FROM chosen c), '{}'),
                    (SELECT count(*) FROM chosen c WHERE c.suspect),
                    v_budget IN ((SELECT count(*) FROM fresh), (SELECT count(*) FROM parked))
                INTO v_chosen, v_suspects, v_more;
                EXIT WHEN NOT v_more OR cardinality(v_chosen) >= v_room;
            END LOOP;
        END IF;

        RETURN QUERY
        WITH due AS MATERIALIZED (
            SELECT r.id, r.started_at IS NULL AS fresh FROM {schema}.workflow_runs r
            WHERE r.id = ANY(v_chosen) AND r.status IN ('pending', 'sleeping')
            FOR UPDATE OF r SKIP LOCKED
        ), claimed AS (
            UPDATE {schema}.workflow_runs r SET status = 'running', worker_id = in_worker,
                epoch = r.epoch + 1, crash_count = r.crash_count + 1, apart = true,
                started_at = coalesce(r.started_at, v_now)
            FROM due d WHERE r.id = d.id
            RETURNING r AS whole, d.fresh
        ), noted AS (
            INSERT INTO {schema}.queue_starts AS s (queue, at, starts)
            SELECT v_name, v_now, count(*) FROM claimed c
            WHERE c.fresh AND v_queue.rate_starts IS NOT NULL HAVING count(*) > 0
            ON CONFLICT ON CONSTRAINT queue_starts_pkey
            DO UPDATE SET starts = s.starts + excluded.starts
        )
        SELECT c.whole, NULL::double precision FROM claimed c;
        GET DIAGNOSTICS v_count = ROW_COUNT;
        v_left := v_left - v_count;
        in_suspects := in_suspects - v_suspects;

        IF v_queue.rate_starts IS NOT NULL THEN
            -- There is room again when the earliest start leaves the window.
            SELECT extract(epoch FROM min(s.at) - v_now) + v_queue.rate_window_s INTO v_wait
            FROM {schema}.queue_starts s WHERE s.queue = v_name
            HAVING sum(s.starts) >= v_queue.rate_starts;
            v_again := least(v_again, v_wait);
        END IF;
    END LOOP;
    IF v_again IS NOT NULL THEN
        run := NULL;
        again_s := v_again;
        RETURN NEXT;
    END IF;
END $$;
