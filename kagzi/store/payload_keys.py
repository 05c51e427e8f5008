"""Which keys the payloads of a schema are sealed with: seen to on connecting, not on the way."""

from __future__ import annotations

from kagzi.errors import PayloadKeyError
from kagzi.store.store import Store


async def check_keys(store: Store) -> None:
    """Every key that was ever used here is in the client's codec, and its own is noted.

    Raises:
        PayloadKeyError: Says what is missing.

    Source: sql/payloads.sql, read_payload_keys, add_payload_key.
    """
    sealer = store.connector.sealer
    known = await _read(store)
    if sealer is None:
        if known:
            raise PayloadKeyError(
                f"payloads in schema {store.connector.schema!r} are encrypted (keys: "
                f"{', '.join(map(repr, known))}): connect with the payload_codec that has them, or "
                "name it in KAGZI_PAYLOAD_CODEC",
                next(iter(known)) if len(known) == 1 else "",
            )
        return
    key_id = sealer.codec.key_id
    if key_id not in known:
        sample = sealer.seal(key_id.encode()).hex()
        await store.ask("add_payload_key", key_id=key_id, sample=sample)
        known = await _read(store)
    for known_id, sample in known.items():
        if sealer.unseal(bytes.fromhex(sample)) != known_id.encode():
            raise PayloadKeyError(
                f"key {known_id!r} gives another text than was encrypted with it", known_id
            )


async def _read(store: Store) -> dict[str, str]:
    return dict(await store.ask("read_payload_keys"))
