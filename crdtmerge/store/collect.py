"""Garbage collection: the blobs that nothing needs, in two phases, with a time of grace before each.

RULES
1. Needed are the blobs of every content with a live ADD (also a retracted one), of the base, and those under lease.
2. What is not needed and was not touched for the time of grace becomes trash; trash that nobody took back within
   another is removed. Needed trash is taken back.
3. Files are removed under the lock of the database, so nobody can be about to name a blob that goes.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass

from crdtmerge.store.blobs import Blobs
from crdtmerge.store.disk import failing
from crdtmerge.store.leases import end_those_of_the_dead
from crdtmerge.store.partials import collect_partials

GRACE_SECONDS = 24 * 3600.0
"""How long what nobody needs is kept, twice: a day to notice a mistake."""


@dataclass(frozen=True)
class Collected:
    """What a collection did: blobs and bytes marked as trash, removed for good; folders of the dead, stray files."""

    trashed: int
    trashed_bytes: int
    removed: int
    removed_bytes: int
    strays: int


def collect(blobs: Blobs, needed: Iterable[bytes], grace_seconds: float = GRACE_SECONDS) -> Collected:
    """Collect, within a transaction in which ``needed`` was computed. Raises StorageError."""
    database, now = blobs.database, time.time()
    living = end_those_of_the_dead(database)
    leased = {row[0] for row in database.rows("SELECT digest FROM leased")}
    keep = {*needed, *leased}
    trashed, removed = [], []
    for digest, nbytes, state, touched in database.rows("SELECT digest, bytes, state, touched FROM blobs"):
        old = touched <= now - grace_seconds
        if digest in keep:
            if state == "trash" and _is_here(blobs, digest):
                database.run("UPDATE blobs SET state = 'ready', touched = ? WHERE digest = ?", (now, digest))
        elif state == "ready" and old:
            database.run("UPDATE blobs SET state = 'trash', touched = ? WHERE digest = ?", (now, digest))
            trashed.append(nbytes)
        elif state == "trash" and old:
            database.run("DELETE FROM blobs WHERE digest = ?", (digest,))
            removed.append((digest, nbytes))
    with failing(blobs.folder):
        for digest, _ in removed:
            blobs.disk.remove(blobs.path(digest))
        strays = _remove_strays(blobs, now - grace_seconds, idle=not living)
        strays += collect_partials(blobs, keep, now - grace_seconds)
    return Collected(len(trashed), sum(trashed), len(removed), sum(nbytes for _, nbytes in removed), strays)


def _is_here(blobs: Blobs, digest: bytes) -> bool:
    row = blobs.database.one("SELECT inline IS NOT NULL FROM blobs WHERE digest = ?", (digest,))
    return bool(row and row[0]) or blobs.path(digest).exists()


def _remove_strays(blobs: Blobs, before: float, *, idle: bool) -> int:
    """Remove what crashes left: staged folders when nothing runs, blobs in no row; how many. Others' files stay."""
    strays = 0
    if idle:
        for staged in blobs.staged.iterdir():
            shutil.rmtree(staged, ignore_errors=True)
            strays += 1
    for path in sorted(blobs.folder.glob("[0-9a-f][0-9a-f]/*")):
        ours = re.fullmatch("[0-9a-f]{64}", path.name) and path.is_file() and not path.is_symlink()
        if ours and path.stat().st_mtime <= before and not _has_row(blobs, bytes.fromhex(path.name)):
            blobs.disk.remove(path)
            strays += 1
    return strays


def _has_row(blobs: Blobs, digest: bytes) -> bool:
    return blobs.database.one("SELECT 1 FROM blobs WHERE digest = ?", (digest,)) is not None
