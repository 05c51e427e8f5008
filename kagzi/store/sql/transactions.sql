-- Steps whose bodies write in the transaction of their own checkpoint.
-- `{schema}` is the quoted schema; parameters are bound by name.

-- name: write_transaction_step
-- The checkpoint, behind the fence, at the end of the body's transaction. Nothing is inserted when
-- the step has one already: then what the body did is taken back. Index: step_runs_pkey.
WITH fence AS MATERIALIZED (
    SELECT 1 FROM {schema}.workers WHERE id = %(worker_id)s AND status <> 'ended' FOR SHARE
), inserted AS (
    INSERT INTO {schema}.step_runs (run_id, step_id, function, status, output, input, input_hash,
        attempts, parallel_group_id, parent_step_id, started_at, completed_at, call_number,
        completed_number, worker_id, process_id)
    SELECT %(run_id)s, %(step_id)s, %(function)s, 'completed', %(output)s, %(input)s,
        %(input_hash)s, %(attempts)s, %(group_id)s::uuid, %(parent_id)s, %(started_at)s,
        %(completed_at)s, %(call_number)s, %(completed_number)s, %(worker_id)s, 0
    FROM fence
    ON CONFLICT DO NOTHING
    RETURNING 1
)
SELECT (SELECT count(*) FROM fence), (SELECT count(*) FROM inserted);

-- name: read_transaction_step
-- Whether the worker's lease holds, by the fence that its checkpoint will meet (not locked here, for
-- a body may take long), and what is stored of the step. Indexes: workers_pkey, step_runs_pkey.
SELECT EXISTS (SELECT FROM {schema}.workers WHERE id = %(worker_id)s AND status <> 'ended'),
    (SELECT output FROM {schema}.step_runs
    WHERE run_id = %(run_id)s AND step_id = %(step_id)s AND status = 'completed');
