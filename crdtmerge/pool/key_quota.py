"""How many bytes of one key's contributions a replica takes: their tensors, statistics and carried files.

RULES
1. A content is its first author's. A statistic or file is that of the first author who speaks of it and has room.
2. What is here counts first; then come contents in the order of their first ADD, each whole or not at all.
3. How long a file is shows when it came: one that does not fit is not kept, and not asked for again while it does not.
4. What one's own key or the genesis record speaks of has no quota.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from crdtmerge.numerics.dtypes import DTYPES
from crdtmerge.pool.room import Room
from crdtmerge.replica.contribution import Manifest
from crdtmerge.replica.op import Add, Op


class KeyQuota:
    """What each key's contributions take, and what of them is over its quota; none where ``quota`` is None."""

    def __init__(self, room: Room, quota: int | None) -> None:
        self._room, self._quota = room, quota
        self._used: Counter[bytes] = Counter()
        self._speakers: Mapping[bytes, list[bytes]] = {}
        self._sizes: dict[bytes, int] = {}
        self.over: Counter[bytes] = Counter()
        """Keys of which not all is taken, and how many contents and files are not."""

    def contents(self, contents: Sequence[bytes]) -> list[bytes]:
        """Of contents those that are taken; begins anew with what is here."""
        self.over.clear()
        self._used.clear()
        if self._quota is None:
            return list(contents)
        adds = {content: sorted(self._room.opset.live(content), key=lambda op: op.order) for content in contents}
        for digest, authors in self._spoken(adds.values()).items():
            if (blob := self._room.blobs.get(digest)) is not None:
                self._used[self._payer(authors, blob.nbytes) or authors[0]] += blob.nbytes
        ready, taken = self._room.ready(), []
        for content in sorted(contents, key=lambda one: (one not in ready, adds[one][0].order)):
            author, manifest = adds[content][0].author, self._room.manifest(content)
            nbytes = _nbytes(manifest) if manifest else 0
            if content in ready or self._fits(author, nbytes):
                self._used[author] += nbytes
                taken.append(content)
            else:
                self.over[author] += 1
        self._speakers = self._spoken(adds[content] for content in taken)
        return taken

    def files(self) -> set[bytes]:
        """The statistics and files of the contents taken last that are here or may fit."""
        if self._quota is None:
            return self._room.opset.attached()
        return {one for one in self._speakers if self._room.blobs.get(one) is not None or self._may(one)}

    def takes(self, digest: bytes, nbytes: int) -> bool:
        """Whether a statistic or file that came is taken; it counts from now on."""
        authors = self._speakers.get(digest)
        if self._quota is None or authors is None or self._room.blobs.get(digest) is not None:
            return True
        payer = self._payer(authors, nbytes)
        if payer is None:
            self._sizes[digest] = nbytes
            self.over[authors[0]] += 1
            return False
        self._used[payer] += nbytes
        return True

    def _may(self, digest: bytes) -> bool:
        """Whether a file may fit, of which perhaps nobody knows how long it is."""
        authors = self._speakers[digest]
        if self._payer(authors, self._sizes.get(digest, 1)) is not None:
            return True
        self.over[authors[0]] += 1
        return False

    def _payer(self, authors: Sequence[bytes], nbytes: int) -> bytes | None:
        return next((author for author in authors if self._fits(author, nbytes)), None)

    def _fits(self, author: bytes, nbytes: int) -> bool:
        return self._quota is None or author == self._room.author or self._used[author] + nbytes <= self._quota

    def _spoken(self, adds: Iterable[Sequence[Op]]) -> dict[bytes, list[bytes]]:
        """Statistics and files, each with the authors who speak of it."""
        found: dict[bytes, list[bytes]] = {}
        for op in (op for ops in adds for op in ops):
            if isinstance(op.payload, Add):
                for digest in (*(op.payload.says.files or {}).values(), *op.payload.says.stats.values()):
                    found.setdefault(digest, []).append(op.author)
        for digest in self._room.genesis.files.values():
            found.pop(digest, None)
        return found


def _nbytes(manifest: Manifest) -> int:
    """Bytes of the tensors whose dtype this version knows."""
    return sum(DTYPES[row.dtype].nbytes(row.shape) for row in manifest.rows if row.dtype in DTYPES)
