"""Ed25519 keys: make, load, sign, verify. PEM files as OpenSSL writes them; a key is named by its 32 public bytes.

RULES
1. A signature is judged by one verifier everywhere (OpenSSL's): others differ on the edges of the curve.
2. Public keys of small order are refused: every signature fits them.
3. A private key file is written for its owner alone.
"""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

from crdtmerge.errors import KeyFileError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

PEM_BYTES_MAX = 16 << 10
"""A private key in PEM takes some 120 bytes."""

_SMALL_ORDER = frozenset(
    bytes.fromhex(point)
    for point in (
        "00" * 32,
        "01" + "00" * 31,
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "ec" + "ff" * 30 + "7f",
        "ed" + "ff" * 30 + "7f",
        "ee" + "ff" * 30 + "7f",
    )
)
"""The y coordinates of points whose order divides 8, also in their second spellings; the sign bit is masked off."""


class Key:
    """A private key.

    >>> key = Key.generate()
    >>> verify(key.public, key.sign(b"message"), b"message")
    True
    """

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private

    @classmethod
    def generate(cls) -> Self:
        """A new key from the system's random numbers."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> Self:
        """The key of a seed of 32 bytes."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a PEM file without passphrase. Raises KeyFileError."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        try:
            with path.open("rb") as file:
                private = load_pem_private_key(file.read(PEM_BYTES_MAX), password=None)
        except OSError as fault:
            raise KeyFileError(f"{path}: cannot be read: {fault.strerror}.") from fault
        except (ValueError, TypeError) as fault:
            raise KeyFileError(
                f"{path}: not a private key in PEM without passphrase ({fault}). Make one with: "
                "openssl genpkey -algorithm ed25519 -out key.pem"
            ) from None
        if not isinstance(private, Ed25519PrivateKey):
            raise KeyFileError(f"{path}: is a key of another kind; Ed25519 is needed.")
        return cls(private)

    def save(self, path: Path) -> None:
        """Write a PEM file that only its owner may read, durably. Raises OSError, also where a file stands already."""
        from cryptography.hazmat.primitives import serialization

        pem = self._private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(descriptor)

    @cached_property
    def public(self) -> bytes:
        """The public key, 32 bytes."""
        return self._private.public_key().public_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        """A signature, 64 bytes."""
        return self._private.sign(message)


def verify(public: bytes, signature: bytes, message: bytes) -> bool:
    """Whether ``signature`` of ``message`` was made with the private half of ``public``."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if len(public) != 32 or len(signature) != 64 or is_small_order(public):
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def is_small_order(public: bytes) -> bool:
    """Whether a public key lies in the small subgroup, where one signature fits many messages."""
    return public[:31] + bytes([public[31] & 0x7F]) in _SMALL_ORDER
