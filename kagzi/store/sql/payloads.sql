-- Keys that payloads are encrypted with; never the keys themselves.
-- `{schema}` is the quoted schema; parameters are bound by name.

-- name: read_payload_keys
-- Ids of keys, each with a text encrypted by it. A handful of rows.
SELECT key_id, encode(sample, 'hex') FROM {schema}.payload_keys ORDER BY first_used_at, key_id;

-- name: add_payload_key
-- Notes a key that is used from now on. Index: payload_keys_pkey.
INSERT INTO {schema}.payload_keys (key_id, sample, first_used_at)
VALUES (%(key_id)s, decode(%(sample)s, 'hex'), {schema}.now_at())
ON CONFLICT DO NOTHING;
