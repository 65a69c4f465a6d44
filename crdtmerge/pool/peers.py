"""The peers that a replica trusts: keys that may talk to it, where they listen, and invitations for new ones."""

from __future__ import annotations

import hashlib
import secrets
import time
from typing import NamedTuple

from crdtmerge.pool.room import Room

INVITE_SECONDS = 24 * 3600.0
"""How long an invitation stands."""

SECRET_BYTES = 16


class Peer(NamedTuple):
    """A trusted key, and the URL where it listens, if it does."""

    key: bytes
    url: str | None


class Peers:
    """The table of peers of a replica."""

    def __init__(self, room: Room) -> None:
        self._database = room.database

    def every(self) -> list[Peer]:
        """All of them, by key."""
        return [Peer(*row) for row in self._database.rows("SELECT key, url FROM peers ORDER BY key")]

    def key_at(self, url: str) -> bytes | None:
        """The key that listens at a URL."""
        row = self._database.one("SELECT key FROM peers WHERE url = ?", (url,))
        return None if row is None else bytes(row[0])

    def trust(self, key: bytes, url: str | None = None) -> None:
        """Let a key talk to this replica. Raises StorageError."""
        with self._database.transaction():
            known = self._database.one("SELECT url FROM peers WHERE key = ?", (key,))
            if url is not None:
                self._database.run("UPDATE peers SET url = NULL WHERE url = ?", (url,))
            self._database.run("INSERT OR REPLACE INTO peers VALUES (?, ?)", (key, url or (known and known[0])))

    def distrust(self, key: bytes) -> bool:
        """Let it no longer; whether it was trusted."""
        with self._database.transaction():
            known = self._database.one("SELECT 1 FROM peers WHERE key = ?", (key,)) is not None
            self._database.run("DELETE FROM peers WHERE key = ?", (key,))
        return known

    def invite(self, seconds: float = INVITE_SECONDS) -> bytes:
        """A secret that lets one key become a trusted one, once, for some time. Only its digest is kept."""
        secret = secrets.token_bytes(SECRET_BYTES)
        with self._database.transaction():
            self._database.run("DELETE FROM invites WHERE expires < ?", (time.time(),))
            row = (hashlib.sha256(secret).digest(), time.time() + seconds)
            self._database.run("INSERT INTO invites VALUES (?, ?)", row)
        return secret

    def redeem(self, secret: bytes, key: bytes) -> bool:
        """Trust a key that shows the secret of an invitation, which then is used up; whether it stood."""
        with self._database.transaction():
            digest = hashlib.sha256(secret).digest()
            row = self._database.one("SELECT expires FROM invites WHERE secret = ?", (digest,))
            self._database.run("DELETE FROM invites WHERE secret = ?", (digest,))
            if row is None or row[0] < time.time():
                return False
            self.trust(key)
        return True
