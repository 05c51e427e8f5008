-- Many starts at once, and starts within a caller's transaction.
-- `{schema}` is the quoted schema; parameters are bound by name.

-- name: start_facts
-- What a COPY of new runs needs to know; the time in microseconds. Index: queues_pkey.
SELECT (extract(epoch FROM {schema}.now_at()) * 1000000)::int8,
    EXISTS (SELECT FROM {schema}.queues WHERE name = %(queue)s AND apart);

-- name: insert_runs
-- Adds runs whose ids are not taken, one array per column, in the order of their ids: two that add
-- the same ones wait for each other and do not deadlock. Due in the order of the arrays.
-- Index: workflow_runs (workflow, external_id).
WITH moment AS MATERIALIZED (
    SELECT {schema}.now_at() AS now,
        EXISTS (SELECT FROM {schema}.queues WHERE name = %(queue)s AND apart) AS apart
)
INSERT INTO {schema}.workflow_runs (id, external_id, workflow, version, priority, input, wake_at,
    created_at, queue, queue_key, apart)
SELECT n.id, n.external_id, %(workflow)s, %(version)s, %(priority)s, n.input, n.at, n.at,
    %(queue)s, n.queue_key, n.apart
FROM (
    SELECT u.*, moment.apart,
        moment.now - (count(*) OVER () - u.place) * interval '1 microsecond' AS at
    FROM moment, unnest(%(ids)s::uuid[], %(external_ids)s::text[], %(inputs)s::bytea[],
        %(queue_keys)s::text[]) WITH ORDINALITY AS u(id, external_id, input, queue_key, place)
) n ORDER BY n.external_id COLLATE "C"
ON CONFLICT (workflow, external_id) DO NOTHING
RETURNING id::text;

-- name: read_runs_by_keys
-- The runs that hold these ids already. Index: workflow_runs (workflow, external_id).
SELECT external_id, id::text, version, input FROM {schema}.workflow_runs
WHERE workflow = %(workflow)s AND external_id = ANY(%(external_ids)s::text[]);

-- name: identify_database
-- Tells one database from another, and a copy from its original.
SELECT d.oid::text, d.datname::text, pg_catalog.to_regclass(%(table)s)::oid::text
FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database();

-- name: identify_schema
-- The rest of it: when the schema was made.
SELECT extract(epoch FROM applied_at)::text FROM {schema}.schema_migrations ORDER BY version LIMIT 1;
