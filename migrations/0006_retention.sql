-- Finished runs and their rows are deleted after a time.
--
-- Serves find_expired_runs. One entry per finished run, each behind the last.
CREATE INDEX workflow_runs_finished ON workflow_runs (completed_at) WHERE completed_at IS NOT NULL;

-- Rows that were only ever inserted go in bulk now. With the server's defaults a fifth of a table
-- would be dead before it is cleaned, and as much of what it keeps out of line.
ALTER TABLE workflow_runs SET (toast.autovacuum_vacuum_scale_factor = 0.02,
    toast.autovacuum_vacuum_threshold = 500);
ALTER TABLE step_runs SET (autovacuum_vacuum_scale_factor = 0.05,
    autovacuum_vacuum_threshold = 5000, autovacuum_analyze_scale_factor = 0.1,
    toast.autovacuum_vacuum_scale_factor = 0.05, toast.autovacuum_vacuum_threshold = 5000);
ALTER TABLE step_attempts SET (autovacuum_vacuum_scale_factor = 0.05,
    autovacuum_vacuum_threshold = 1000);
ALTER TABLE parallel_groups SET (autovacuum_vacuum_scale_factor = 0.05,
    autovacuum_vacuum_threshold = 1000);
ALTER TABLE memos SET (autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 1000);
