-- Runs of a schedule may wait in a queue, under a key, as any other.
ALTER TABLE schedules
    ADD COLUMN queue text COLLATE "C" NOT NULL DEFAULT 'default',
    ADD COLUMN queue_key text COLLATE "C" NOT NULL DEFAULT '';
