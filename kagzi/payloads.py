"""What becomes of payloads on their way to the database: nothing, or a codec of the user's.

Payloads are what users' code gives: inputs, outputs, errors, events, published values. Names and
ids (of workflows, steps, runs, queues, keys, topics) are not; they are looked up by.
"""

from __future__ import annotations

import hmac
import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from kagzi.errors import InvalidInput, PayloadKeyError
from kagzi.model import check_name

ENVIRONMENT = "KAGZI_PAYLOAD_CODEC"

# No payload begins so: JSON has no zero bytes. What does not is from before there was a codec.
MARK = b"\0kz1"
NONCE_BYTES = 12
MOST_KEY_ID_BYTES = 100


@runtime_checkable
class PayloadCodec(Protocol):
    """Turns payloads into what the database holds, and back. Used from several threads.

    Attributes:
        key_id: Name of the key that new payloads are sealed with.
    """

    key_id: str

    def seal(self, data: bytes) -> bytes:
        """What the database holds for `data`; another value at each call, if it is to be secret."""

    def unseal(self, sealed: bytes, key_id: str) -> bytes:
        """What `seal` was given, when `key_id` was its key. Raises `PayloadKeyError`."""

    def digest(self, data: bytes) -> bytes:
        """32 bytes that stand for `data`, always the same; nobody without the key can guess it."""


class AesGcm:
    """Payloads encrypted with AES-GCM, by keys of the user's. Needs the extra `encryption`.

    Each payload has a nonce of its own and the id of its key. Its length is not hidden.

    Args:
        keys: By their ids; 16, 24 or 32 random bytes each. To rotate, add a key and make it the
            current one, in every program; keep the old one for as long as there are payloads of it.
        current: Id of the key for new payloads. Default: the last of `keys`.

    Source: NIST SP 800-38D; RFC 5116.
    """

    def __init__(self, keys: Mapping[str, bytes], current: str | None = None) -> None:
        try:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError as error:
            raise InvalidInput(
                "AesGcm needs the package cryptography: pip install 'kagzi[encryption]'"
            ) from error
        if not isinstance(keys, Mapping) or not keys:
            raise InvalidInput("keys must be a mapping of key ids to keys, with at least one")
        for key_id, key in keys.items():
            check_name("key id", key_id, MOST_KEY_ID_BYTES)
            if not isinstance(key, bytes) or len(key) not in (16, 24, 32):
                raise InvalidInput(f"key {key_id!r} must be 16, 24 or 32 bytes")
        self.key_id = list(keys)[-1] if current is None else current
        if self.key_id not in keys:
            raise InvalidInput(f"the current key {self.key_id!r} is not among {sorted(keys)}")
        self._ciphers = {key_id: AESGCM(key) for key_id, key in keys.items()}
        self._cipher = self._ciphers[self.key_id]
        # Not the key itself: it is for one purpose.
        self._digest_key = hmac.digest(keys[self.key_id], b"kagzi digests", "sha256")

    def seal(self, data: bytes) -> bytes:
        """Nonce, ciphertext and tag, under the current key."""
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, data, self.key_id.encode())

    def unseal(self, sealed: bytes, key_id: str) -> bytes:
        """What was sealed under that key. Raises `PayloadKeyError`."""
        from cryptography.exceptions import InvalidTag

        cipher = self._ciphers.get(key_id)
        if cipher is None:
            known = ", ".join(map(repr, self._ciphers))
            raise PayloadKeyError(
                f"a payload is encrypted with key {key_id!r}, which is not among those given "
                f"({known})",
                key_id,
            )
        try:
            nonce, data = sealed[:NONCE_BYTES], sealed[NONCE_BYTES:]
            return cipher.decrypt(nonce, data, key_id.encode())
        except (InvalidTag, ValueError):
            raise PayloadKeyError(
                f"a payload cannot be decrypted: key {key_id!r} is another one here, or the "
                "payload was changed",
                key_id,
            ) from None

    def digest(self, data: bytes) -> bytes:
        """HMAC-SHA256 under a key made of the current one."""
        return hmac.digest(self._digest_key, data, "sha256")

    def __repr__(self) -> str:
        return f"<AesGcm, keys {sorted(self._ciphers)}, current {self.key_id!r}>"


class Sealer:
    """A codec, with the mark and the key's id around what it makes."""

    def __init__(self, codec: PayloadCodec) -> None:
        self.codec = codec
        key_id = check_name("key id", codec.key_id, MOST_KEY_ID_BYTES).encode()
        self._head = MARK + bytes([len(key_id)]) + key_id

    def seal(self, data: bytes) -> bytes:
        return self._head + self.codec.seal(data)

    def unseal(self, stored: bytes) -> bytes:
        """What was sealed; what is not marked as it is."""
        if not stored.startswith(MARK):
            return stored
        start = len(MARK) + 1
        end = start + stored[start - 1]
        return self.codec.unseal(stored[end:], stored[start:end].decode())


def check_codec(codec: object) -> PayloadCodec | None:
    """The codec given, else that of the environment. Raises `InvalidInput`."""
    if codec is None:
        codec = _from_environment()
    if codec is not None and not isinstance(codec, PayloadCodec):
        raise InvalidInput(
            f"payload_codec must have key_id, seal, unseal and digest, as kagzi.AesGcm has; got "
            f"{type(codec).__qualname__}"
        )
    return codec


def _from_environment() -> Any:
    target = os.environ.get(ENVIRONMENT)
    if not target:
        return None
    module, _, name = target.partition(":")
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)  # as for the modules of a worker
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidInput(
            f"{ENVIRONMENT}={target!r} names no codec: {error}; write module:name, of a module in "
            f"{folder} or on Python's path"
        ) from error
    return found if isinstance(found, PayloadCodec) or not callable(found) else found()
