-- Runs that were held by two workers in a row which ended abruptly are claimed apart, one at a time:
-- the innocent among them finish, and the one that brings its worker down is counted alone.
--
-- Serves the claim of suspects: highest priority first, then earliest due.
CREATE INDEX workflow_runs_suspect ON workflow_runs (priority DESC, wake_at)
    WHERE status IN ('pending', 'sleeping') AND crash_count >= 2;
