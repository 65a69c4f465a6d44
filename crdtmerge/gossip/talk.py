"""Sessions with a peer that answers over some link: all of one, or operations pushed as they are made."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol

from crdtmerge.errors import FalsePeerError, InputError
from crdtmerge.gossip.holding import Holding
from crdtmerge.gossip.messages import Answer, Request
from crdtmerge.gossip.session import Opener, Summary
from crdtmerge.gossip.statements import Statements
from crdtmerge.replica.contribution import Manifest

Call = Callable[..., Awaitable[Any]]
"""Runs a function on the replica where it may block, one after the other."""


class Link(Protocol):
    """A way to a peer. Every method raises PeerError where it cannot be reached."""

    async def exchange(self, message: bytes) -> bytes:
        """The answer to a request."""
        ...

    async def manifest(self, content: bytes) -> bytes | None:
        """A manifest that is there."""
        ...

    async def give_manifest(self, content: bytes, data: bytes) -> None:
        """A manifest for an ADD that is about to be sent."""
        ...


async def converse(holding: Holding, link: Link, call: Call, statements: Statements | None = None) -> Summary:
    """A whole session: both sides end with the union of what they had.

    Raises PeerError, FalsePeerError, PoolMismatchError, StorageError; what came before is kept.
    """
    opener: Opener = await call(Opener, holding, statements.newest() if statements else ())
    while (request := await call(opener.request)) is not None:
        answer = await _exchanged(link, request, opener.summary)
        await call(opener.take, answer)
        if statements:
            statements.take(answer.said)
        if opener.missing:
            await call(opener.supply, await _manifests(link, sorted(opener.missing)))
        for content in sorted(opener.unknown_there):
            await _give(holding, link, call, content)
        opener.delivered()
    return opener.summary


async def push(
    holding: Holding, link: Link, call: Call, ids: Iterable[bytes], statements: Statements | None = None
) -> tuple[Summary, bool]:
    """Send operations that the peer may not have yet; whether it needs a whole session to take them."""
    summary, left, behind = Summary(), list(ids), False
    given: set[bytes] = set()
    while left or (statements and not summary.rounds):
        ops, manifests = await call(holding.payload, left)
        said = statements.newest() if statements and not summary.rounds else ()
        request = Request(holding.pool, ops=tuple(op.wire for op in ops), manifests=tuple(manifests), said=tuple(said))
        answer = await _exchanged(link, request, summary)
        if statements:
            statements.take(answer.said)
        contents = [getattr(op.payload, "content", None) for op in ops]
        lacks = set(answer.lacks) & set(contents) - given
        waits = [content in lacks for content in contents]
        first = waits.index(True) if True in waits else len(ops)  # what came after it may have waited for it
        for content in sorted(lacks):
            await _give(holding, link, call, content)
        given |= lacks
        summary.sent += first
        left = left[first:] if ops else []
        behind = behind or (answer.behind and not lacks)
    return summary, behind


async def _exchanged(link: Link, request: Request, summary: Summary) -> Answer:
    message = request.to_bytes()
    answered = await link.exchange(message)
    answer = Answer.from_bytes(answered)
    payload = sum(map(len, (*request.ops, *request.manifests, *answer.ops, *answer.manifests)))
    summary.overhead_bytes += len(message) + len(answered) - payload
    summary.rounds += 1
    return answer


async def _manifests(link: Link, contents: Iterable[bytes]) -> dict[bytes, Manifest]:
    found = {}
    for content in list(contents):
        data = await link.manifest(content)
        if data is None:
            continue
        try:
            manifest = Manifest.from_bytes(data)
        except InputError as fault:
            raise FalsePeerError(str(fault)) from None
        if manifest.id != content:
            raise FalsePeerError(f"a peer answers with another manifest than that of {content.hex()[:16]}.")
        found[content] = manifest
    return found


async def _give(holding: Holding, link: Link, call: Call, content: bytes) -> None:
    manifest: Manifest | None = await call(holding.manifest, content)
    if manifest is not None:
        await link.give_manifest(content, manifest.to_bytes())
