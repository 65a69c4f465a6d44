"""Fetching the blobs that a replica lacks, from several sources at once.

Every source takes the next stretch of the first blob that it may have, so that fast ones do more and slow ones hold
nothing up. What one source fails to bring goes back into the queue, and the others wait for that until nothing is
underway any more. Pieces are checked when they are written: a source that serves wrong bytes is dropped and reported.
What is on disk is never fetched again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from crdtmerge import limits
from crdtmerge.errors import FalsePeerError, PeerError
from crdtmerge.gossip.batches import batches
from crdtmerge.gossip.talk import Call
from crdtmerge.pool.room import Progress, silent
from crdtmerge.pool.transfer import Lacking, Receiving, Want
from crdtmerge.store.partials import Partial, runs

STRETCH_PIECES = 16
"""Pieces of one request: long enough to keep a link busy, short enough to share a blob between sources."""

STRETCHES_A_SOURCE = 2
"""Requests to one source at a time."""

OPEN_MAX = 8
"""Blobs that are fetched at a time."""

SMALL_BYTES_MAX = 4 * limits.MIB
"""Bytes of small tensors that are asked for together."""

SMALL_MAX = 1024
"""Blobs that are asked for together."""

FAILURES_MAX = 3
"""After so many failures a source is left alone until the next fetch."""

COMMIT_SECONDS = 2.0


class Source(Protocol):
    """Where blobs come from: a peer, a folder, a bucket. Every method raises PeerError where it cannot be reached."""

    @property
    def name(self) -> str:
        """What messages call it."""
        ...

    async def manifest(self, content: bytes) -> bytes | None:
        """A manifest."""
        ...

    async def whole(self, digests: Sequence[bytes]) -> dict[bytes, bytes]:
        """Those of some files and tensors of one piece that it has."""
        ...

    async def tree(self, digest: bytes) -> bytes | None:
        """The tree of a tensor, None if it is not there."""
        ...

    def stretch(self, digest: bytes, begin: int, end: int) -> AsyncIterator[bytes]:
        """Bytes of a tensor; none where it is not there."""
        ...


@dataclass
class Fetched:
    """What a fetch did; ``false`` are the sources that served wrong bytes, and what was wrong."""

    blobs: int = 0
    nbytes: int = 0
    resumed_bytes: int = 0
    lacking: int = 0
    false: dict[str, str] = field(default_factory=dict)
    failing: dict[str, str] = field(default_factory=dict)


@dataclass(eq=False)
class Transfer:
    """A blob on its way."""

    want: Want
    partial: Partial | None = None
    stretches: deque[tuple[int, int]] = field(default_factory=deque)
    underway: int = 0
    closed: bool = False
    absent: set[str] = field(default_factory=set)
    sources: set[str] = field(default_factory=set)

    @property
    def done_bytes(self) -> int:
        """Bytes that are here."""
        return self.want.nbytes if self.closed else self.partial.done_bytes if self.partial else 0


class Fetch:
    """One fetch of all that is lacking."""

    def __init__(
        self,
        receiving: Receiving,
        sources: Iterable[Source],
        *,
        call: Call = asyncio.to_thread,
        progress: Progress = silent,
    ) -> None:
        self._receiving, self._call, self._progress = receiving, call, progress
        self._sources = {source.name: source for source in sources}
        self._waiting: dict[bytes, Transfer] = {}
        self._begun: dict[bytes, Transfer] = {}
        self._elsewhere = 0
        self._moved = asyncio.Event()
        self._done, self._total = 0, 0
        self.fetched = Fetched()

    @property
    def underway(self) -> list[Transfer]:
        """The blobs that are being fetched."""
        return [one for one in self._begun.values() if one.partial is not None]

    async def run(self) -> Fetched:
        """Fetch what can be had. Raises StorageError; sources that fail are named in the result."""
        lacking = await self._lacking()
        self._total = lacking.nbytes
        for source in list(self._sources.values()):
            lacking = await self._fetch_small(source, lacking)
        self._waiting = {want.digest: Transfer(want) for want in lacking.tensors if not want.whole}
        committing = asyncio.create_task(self._commit_now_and_then())
        try:
            async with asyncio.TaskGroup() as group:
                for source in list(self._sources.values()):
                    for _ in range(STRETCHES_A_SOURCE):
                        group.create_task(self._work(source))
        except BaseExceptionGroup as faults:
            raise _first(faults) from None
        finally:
            committing.cancel()
            await self._call(self._receiving.commit)
        large = len(self._waiting) + len(self._begun) + self._elsewhere
        small = sum(want.whole for want in lacking.tensors) + len(lacking.files) + (lacking.base is not None)
        self.fetched.lacking = large + small
        return self.fetched

    async def _lacking(self) -> Lacking:
        """What is lacking, with the base of a pool that one has just joined."""
        lacking: Lacking = await self._call(self._receiving.lacking)
        for source in list(self._sources.values()):
            if lacking.base is None:
                break
            try:
                found = await source.manifest(lacking.base)
                if found is not None:
                    await self._call(self._receiving.keep_base, found)
                    lacking = await self._call(self._receiving.lacking)
            except PeerError as fault:
                self._leave(source, fault)
        return lacking

    # ---- blobs that travel whole

    async def _fetch_small(self, source: Source, lacking: Lacking) -> Lacking:
        """What is lacking after one source brought what it has."""
        here: set[bytes] = set()
        try:
            small = (want for want in lacking.tensors if want.whole)
            for batch in batches(small, lambda want: want.nbytes, bytes_max=SMALL_BYTES_MAX, count_max=SMALL_MAX):
                found = await source.whole([want.digest for want in batch])
                came = [(want, found[want.digest]) for want in batch if want.digest in found]
                if came:
                    await self._call(self._receiving.keep, came)
                    here |= self._got(((want.digest, data) for want, data in came), of_tensors=True)
            for digest in lacking.files:
                found = await source.whole([digest])
                if digest in found:
                    await self._call(self._receiving.keep_file, digest, found[digest])
                    here |= self._got([(digest, found[digest])], of_tensors=False)
        except PeerError as fault:
            self._leave(source, fault)
        tensors = [want for want in lacking.tensors if want.digest not in here]
        return Lacking(tensors, [one for one in lacking.files if one not in here], lacking.base)

    def _got(self, found: Iterable[tuple[bytes, bytes]], *, of_tensors: bool) -> set[bytes]:
        digests = set()
        for digest, data in found:
            digests.add(digest)
            self.fetched.blobs += 1
            self.fetched.nbytes += len(data)
            self._advance(len(data) if of_tensors else 0)
        return digests

    # ---- blobs that travel in pieces

    async def _work(self, source: Source) -> None:
        """Take one stretch after another until there is none for this source, and none can come back."""
        failures = 0
        while source.name in self._sources:
            one = self._next(source)
            if one is None:
                if not self._may_come_back(source):
                    return
                await self._moved.wait()
                continue
            try:
                if one.partial is None:
                    await self._open(one, source)
                else:
                    await self._stretch(one, source)
                failures = 0
            except FalsePeerError as fault:
                self._leave(source, fault)
            except PeerError as fault:
                failures += 1
                if failures >= FAILURES_MAX:
                    self._leave(source, fault)
            if one.partial is not None and one.partial.complete and not one.closed and not one.underway:
                await self._close(one)
            self._moved.set()
            self._moved = asyncio.Event()

    def _next(self, source: Source) -> Transfer | None:
        for one in self._begun.values():
            if one.stretches and source.name not in one.absent:
                return one
        if sum(map(self._is_live, self._begun.values())) >= OPEN_MAX:
            return None
        return next((one for one in self._waiting.values() if source.name not in one.absent), None)

    def _is_live(self, one: Transfer) -> bool:
        """Whether a blob that was begun can go on in this fetch."""
        return bool(one.underway or self._sources.keys() - one.absent)

    def _may_come_back(self, source: Source) -> bool:
        """Whether others have something in hand that this source could take over."""
        waits = any(source.name not in one.absent for one in self._waiting.values())
        return any(one.underway and (waits or source.name not in one.absent) for one in self._begun.values())

    async def _open(self, one: Transfer, source: Source) -> None:
        """Find out which pieces are lacking."""
        digest = one.want.digest
        self._begun[digest] = self._waiting.pop(digest)
        one.underway += 1
        try:
            partial = await self._call(self._receiving.begun, one.want)
            if partial is None:
                tree = await source.tree(one.want.digest)
                if tree is None:
                    one.absent.add(source.name)
                    return
                partial = await self._call(self._receiving.begin, one.want, tree)
            if partial is None:  # another process fetches it, or did
                del self._begun[digest]
                self._elsewhere += 1
                return
            one.partial = partial
            one.stretches.extend(runs(partial.lacks(), STRETCH_PIECES))
            self.fetched.resumed_bytes += partial.done_bytes
            self._advance(partial.done_bytes)
        finally:
            one.underway -= 1
            if one.partial is None and self._begun.pop(digest, None) is not None:
                self._waiting[digest] = one

    async def _stretch(self, one: Transfer, source: Source) -> None:
        """Fetch one stretch, piece by piece; what does not come goes back into the queue."""
        assert one.partial is not None, "only opened blobs have stretches"
        tree = one.partial.tree
        first, end = one.stretches.popleft()
        one.underway += 1
        one.sources.add(source.name)
        begin, last = first * limits.PIECE_BYTES, min(end * limits.PIECE_BYTES, tree.nbytes)
        buffer, other = (memoryview(bytearray(limits.PIECE_BYTES)) for _ in range(2))  # one is filled, one written
        number, piece, filled = first, buffer[: tree.piece_bytes(first)], 0
        writing: asyncio.Task[Any] | None = None
        try:
            async for data in source.stretch(tree.digest, begin, last):
                view = memoryview(data)
                self.fetched.nbytes += len(view)
                while len(view):
                    if number >= end:
                        raise FalsePeerError(f"{source.name} sends more than was asked for.")
                    step = min(len(view), len(piece) - filled)
                    piece[filled : filled + step] = view[:step]
                    view, filled = view[step:], filled + step
                    if filled == len(piece):
                        if writing is not None:
                            await self._wrote(writing)
                        writing = asyncio.create_task(self._write(one.partial, number, piece))
                        number, buffer, other = number + 1, other, buffer
                        piece, filled = buffer[: tree.piece_bytes(number) if number < end else 0], 0
            if number == first and not filled:
                one.absent.add(source.name)
            elif number < end:
                raise PeerError(f"{source.name} ends before byte {last} of {tree.digest.hex()}.")
            if writing is not None:
                await self._wrote(writing)
        except PeerError:
            if writing is not None:  # wrong bytes say more of a source than that it broke off
                await self._wrote(writing)
            raise
        finally:
            if writing is not None:
                await asyncio.gather(writing, return_exceptions=True)
            one.underway -= 1
            one.sources.discard(source.name)
            one.stretches.extend(runs((n for n in one.partial.lacks() if first <= n < end), STRETCH_PIECES))

    async def _write(self, partial: Partial, number: int, data: memoryview) -> int:
        await asyncio.to_thread(self._receiving.write, partial, number, data)
        return len(data)

    async def _wrote(self, writing: asyncio.Task[Any]) -> None:
        self._advance(await writing)

    async def _close(self, one: Transfer) -> None:
        one.closed = True
        await self._call(self._receiving.finish, one.partial)
        self._begun.pop(one.want.digest, None)
        self.fetched.blobs += 1

    # ---- both

    def _advance(self, nbytes: int) -> None:
        self._done += nbytes
        self._progress("fetching", min(self._done, self._total), self._total)

    def _leave(self, source: Source, fault: PeerError) -> None:
        self._sources.pop(source.name, None)
        named = self.fetched.false if isinstance(fault, FalsePeerError) else self.fetched.failing
        named.setdefault(source.name, str(fault))

    async def _commit_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(COMMIT_SECONDS)
            await self._call(self._receiving.commit)


def _first(faults: BaseExceptionGroup) -> BaseException:
    found: BaseException = faults
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found
