-- What is asked of the server itself.
-- `{schema}` is the quoted schema; parameters are bound by name.

-- name: read_history
-- Which cluster this is, and on which timeline it writes. The name of a WAL file changes as soon as
-- a standby is promoted; the control file only at its next checkpoint.
SELECT (SELECT system_identifier::text FROM pg_catalog.pg_control_system()),
    CASE WHEN NOT pg_catalog.pg_is_in_recovery()
        THEN left(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 8) END;

-- name: read_timeline
-- The same where a role may not read the control file.
SELECT NULL::text, CASE WHEN NOT pg_catalog.pg_is_in_recovery()
    THEN left(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 8) END;
