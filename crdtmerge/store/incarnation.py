"""The incarnation under which a replica signs: never that of another folder or of an earlier state of this one.

An actor is a key and a random incarnation; two different operations in one place of an actor's chain are evidence
against the key. A folder that was copied, or put back from a backup, holds the key and the chain as they were. So,
before it writes, a replica looks whether it is what it was, and if in doubt goes on under a new incarnation.

RULES
1. Another machine, folder or database file than the last writer saw: this is a copy. New incarnation, new name.
2. A second place outside the folder remembers the last sequence number that was written. It is gone, speaks of another
   incarnation, or has seen more than the database knows: this was put back. New incarnation.
3. The second place is written before the operation is committed, so it is never behind.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from pathlib import Path

from crdtmerge.replica.op import INCARNATION_BYTES
from crdtmerge.store.database import Database


class Incarnation:
    """Which incarnation a replica writes under. All methods are called within a transaction."""

    def __init__(self, database: Database, author: bytes) -> None:
        self._database, self._author = database, author

    def for_next(self) -> bytes:
        """The incarnation for the next operation. That it comes is remembered in the second place first.

        Where that cannot be written, it must not speak of an incarnation that goes on: a new one is drawn, every time.
        """
        known: bytes | None = self._database.meta("incarnation")
        if known is None or self._database.meta("place") != _place(self._database.path) or not self._name():
            return self._renewed(new_name=True)
        tip = self._tip(known)
        remembered = self._remembered()
        fits = remembered is not None and remembered[0] == known and remembered[1] <= tip
        return known if fits and self._remember(known, tip + 1) else self._renewed(new_name=False)

    def _renewed(self, *, new_name: bool) -> bytes:
        incarnation = secrets.token_bytes(INCARNATION_BYTES)
        self._database.keep("incarnation", incarnation)
        self._database.keep("place", _place(self._database.path))
        if new_name:
            self._database.keep("name", secrets.token_hex(16))
        self._remember(incarnation, 1)
        return incarnation

    def _remember(self, incarnation: bytes, seq: int) -> bool:
        """Write the second place; whether that worked."""
        path = self._second_place()
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
            temporary.write_text(f"{incarnation.hex()} {seq}\n")
            temporary.replace(path)
        except OSError:
            return False
        return True

    def _tip(self, incarnation: bytes) -> int:
        row = self._database.one(
            "SELECT max(key) FROM set_dots WHERE key BETWEEN ? AND ?",
            (self._author + incarnation, self._author + incarnation + b"\xff" * 8),
        )
        return int.from_bytes(row[0][-8:], "big") if row and row[0] is not None else 0

    def _remembered(self) -> tuple[bytes, int] | None:
        try:
            incarnation, seq = self._second_place().read_text().split()
            return bytes.fromhex(incarnation), int(seq)
        except (OSError, ValueError):
            return None

    def _second_place(self) -> Path:
        return state_folder() / "replicas" / self._name()

    def _name(self) -> str:
        """What the second place calls this replica; empty before it has a name, or where that is damaged."""
        name = self._database.meta("name")
        return name if isinstance(name, str) and re.fullmatch("[0-9a-f]{32}", name) else ""


def state_folder() -> Path:
    """Where programs keep what is true of this machine for this user: ``$XDG_STATE_HOME`` or ``~/.local/state``."""
    named = os.environ.get("XDG_STATE_HOME")
    return (Path(named) if named else Path(os.path.expanduser("~")) / ".local" / "state") / "crdtmerge"  # noqa: PTH111


def _place(database: Path) -> str:
    """This machine, this folder, this file."""
    folder, file = database.parent.stat(), database.stat()
    return f"{_machine()} {folder.st_dev}:{folder.st_ino} {file.st_ino}"


def _machine() -> str:
    for path in (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id")):
        with contextlib.suppress(OSError):
            return path.read_text().strip()
    import platform

    return platform.node()
