-- Ids of the keys that payloads were ever encrypted with, and for each a text encrypted by it (its own
-- id), so that a client with a wrong or missing key learns it on connecting. Rows are never changed;
-- when no payload of a key is left, a person may delete its row.
CREATE TABLE payload_keys (
    key_id text COLLATE "C" PRIMARY KEY,
    sample bytea NOT NULL,
    first_used_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp()
);
