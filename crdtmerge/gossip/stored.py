"""A pool in a folder or bucket, as one sync sees it: what is listed, what was found wrong, and what the sync did."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from crdtmerge import limits
from crdtmerge.errors import FalsePeerError, InputError
from crdtmerge.gossip import objects
from crdtmerge.gossip.batches import Item, batches
from crdtmerge.gossip.objects import Listing, manifest_name
from crdtmerge.gossip.places import FLIGHT_BYTES_MAX, FLIGHT_MAX, Place
from crdtmerge.replica.contribution import Manifest

NAMED_MAX = 1000
"""Names of each kind in a report."""

NAME_CHARACTERS_MAX = 300
"""Of a name in a report; ours have at most 180."""


@dataclass
class BucketReport:
    """What a sync did.

    ``lacking`` blobs are in neither; ``waiting`` operations lack others, or a manifest. ``ignored`` are names that are
    nobody's, ``false`` what is other than its name says, ``failing`` what could not be read or put, and why. Only the
    first are named; ``ignored_count`` counts all.
    """

    ops_sent: int = 0
    ops_received: int = 0
    blobs_sent: int = 0
    bytes_sent: int = 0
    blobs_fetched: int = 0
    bytes_fetched: int = 0
    resumed_bytes: int = 0
    lacking: int = 0
    waiting: int = 0
    ignored: list[str] = field(default_factory=list)
    ignored_count: int = 0
    false: dict[str, str] = field(default_factory=dict)
    failing: dict[str, str] = field(default_factory=dict)
    root: bytes = b""


class Stored:
    """A pool in a place."""

    def __init__(self, place: Place, pool: bytes) -> None:
        self.place, self.pool = place, pool
        self._prefix = objects.pool_prefix(pool)
        self.listing = Listing()
        self.wrong: set[str] = set()
        """Names under which wrong bytes were found."""
        self.report = BucketReport()

    def path(self, name: str) -> str:
        """Where an object lies."""
        return f"{self._prefix}/{name}"

    async def list(self) -> None:
        """Find out what is there. Raises PeerError."""
        for name in await self.place.level(self._prefix):
            if name not in (*objects.KINDS, "genesis"):
                self._ignore(name)
        for kind in objects.KINDS:
            try:
                async for one in self.place.every(self.path(kind)):
                    if self.listing.count >= objects.LISTED_MAX:
                        self.found_wrong(kind, f"has more than {objects.LISTED_MAX} objects; the others are not seen.")
                        return
                    self._enter(one.name.removeprefix(f"{self._prefix}/"), one.nbytes)
            except FalsePeerError as fault:
                self.found_wrong(kind, str(fault))

    def _enter(self, name: str, nbytes: int | None) -> None:
        if nbytes is None and Listing().enter(name, 0):
            self.found_wrong(name, "is no plain file.")
        elif nbytes is None or not self.listing.enter(name, nbytes):
            self._ignore(name)

    def _ignore(self, name: str) -> None:
        self.report.ignored_count += 1
        if len(self.report.ignored) < NAMED_MAX:
            self.report.ignored.append(_shown(name))

    def found_wrong(self, name: str, why: str) -> None:
        """Remember that what a name holds is not what it says."""
        self.wrong.add(name)
        if len(self.report.false) < NAMED_MAX:
            self.report.false.setdefault(_shown(name), why)

    def failed(self, name: str, fault: Exception) -> None:
        """Remember what could not be done."""
        if len(self.report.failing) < NAMED_MAX:
            self.report.failing.setdefault(_shown(name), str(fault))

    async def read(self, name: str, bytes_max: int) -> bytes | None:
        """An object, None if it is not there or no object. Raises PeerError."""
        try:
            return await self.place.read(self.path(name), bytes_max)
        except FalsePeerError as fault:
            self.found_wrong(name, str(fault))
            return None

    async def manifest(self, content: bytes) -> Manifest | None:
        """A manifest that is there, checked. Raises PeerError."""
        name = manifest_name(content)
        if content not in self.listing.manifests or name in self.wrong:
            return None
        data = await self.read(name, limits.MANIFEST_BYTES_MAX)
        if data is None:
            return None
        try:
            manifest = await asyncio.to_thread(Manifest.from_bytes, data)
        except InputError as fault:
            self.found_wrong(name, str(fault))
            return None
        if manifest.id == content:
            return manifest
        self.found_wrong(name, "is the manifest of another content.")
        return None


def _shown(name: str) -> str:
    """A name as a report says it: anyone may have chosen it, and it may be printed."""
    return name.encode("unicode_escape").decode()[:NAME_CHARACTERS_MAX]


def groups(items: Iterable[Item], nbytes: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Items in groups that may be on their way at a time."""
    return batches(items, nbytes, bytes_max=FLIGHT_BYTES_MAX, count_max=FLIGHT_MAX)
