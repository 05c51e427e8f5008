-- Versions of workflows: which one new runs get, and what there is of each.
-- `{schema}` is the quoted schema; parameters are bound by name.

-- name: read_default
-- The version that new runs of a workflow get. Index: workflow_versions_default.
SELECT version FROM {schema}.workflow_versions WHERE workflow = %(workflow)s AND is_default;

-- name: lock_versions
-- One change of a workflow's default at a time: two at once would meet in the unique index.
SELECT pg_catalog.pg_advisory_xact_lock(
    pg_catalog.hashtextextended(%(schema)s || ':kagzi:versions:' || %(workflow)s, 0));

-- name: drop_default
-- Takes the default away from whichever version has it. Index: workflow_versions_default.
UPDATE {schema}.workflow_versions SET is_default = false
WHERE workflow = %(workflow)s AND is_default;

-- name: put_default
-- Makes one version the default; behind `drop_default`. Index: workflow_versions_pkey.
INSERT INTO {schema}.workflow_versions (workflow, version, first_seen_at, is_default)
VALUES (%(workflow)s, %(version)s, {schema}.now_at(), true)
ON CONFLICT (workflow, version) DO UPDATE SET is_default = true;

-- name: list_versions
-- Versions with their runs counted, of one workflow (by its name or the end of it) or of all.
-- Reads every run of them: a person's question, not the engine's.
-- Index: workflow_runs (workflow, external_id) for a full name.
SELECT coalesce(v.workflow, r.workflow), coalesce(v.version, r.version),
    coalesce(v.is_default, false), coalesce(r.unfinished, 0), coalesce(r.finished, 0), r.latest
FROM (
    SELECT workflow, version, is_default FROM {schema}.workflow_versions
    WHERE %(workflow)s::text IS NULL OR workflow = %(workflow)s
        OR workflow LIKE '%%.' || %(workflow)s
) v
FULL JOIN (
    SELECT workflow, version, count(*) FILTER (WHERE completed_at IS NULL) AS unfinished,
        count(*) FILTER (WHERE completed_at IS NOT NULL) AS finished, max(created_at) AS latest
    FROM {schema}.workflow_runs
    WHERE %(workflow)s::text IS NULL OR workflow = %(workflow)s
        OR workflow LIKE '%%.' || %(workflow)s
    GROUP BY workflow, version
) r ON r.workflow = v.workflow AND r.version = v.version
ORDER BY 1, 2;
