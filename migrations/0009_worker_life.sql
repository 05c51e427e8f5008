-- Serves the life of one worker, and its deletion with the worker's row some time after its end.
CREATE INDEX worker_events_worker ON worker_events (worker_id, at);
-- Serves the deletion of workers that ended long ago.
CREATE INDEX workers_ended ON workers (ended_at) WHERE status = 'ended';
