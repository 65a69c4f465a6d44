"""A peer node: a replica that listens, talks to its peers, fetches what it lacks and keeps a merged checkpoint.

    async with cm.Node(replica, listen="127.0.0.1:7070", peers=["https://peer:7070"]) as node:
        await node.stopped()

Everything on the replica's database that gossip does runs in one thread, one thing after the other; blobs are written
in threads of their own. A fault of the replica or of a peer is said on the status page and tried again; any other ends
the node, which never runs on by halves.
"""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from aiohttp import web

from crdtmerge import limits
from crdtmerge.errors import CrdtMergeError, FalsePeerError, ReplicaError, UsageError
from crdtmerge.gossip import address, messages, tls, wire
from crdtmerge.gossip.client import HttpPeer, connections
from crdtmerge.gossip.fetch import Fetch, Fetched
from crdtmerge.gossip.give import give
from crdtmerge.gossip.holding import Holding
from crdtmerge.gossip.merged import KeptMerged
from crdtmerge.gossip.report import Reporter
from crdtmerge.gossip.server import HttpServer
from crdtmerge.gossip.spread import PERIOD_SECONDS, Contact, Spread
from crdtmerge.gossip.status import application
from crdtmerge.gossip.uploads import Uploads
from crdtmerge.pool.peers import Peer
from crdtmerge.replica.contribution import Manifest
from crdtmerge.replica.op import Add, Op, Unretract
from crdtmerge.store.blobs import Blob

if TYPE_CHECKING:
    from crdtmerge.pool.replica import Replica

LOOK_SECONDS = 0.5
"""How often a node looks whether another process wrote to its replica."""

FETCH_SECONDS = 5.0
"""How soon it tries again to fetch what it did not get."""

AHEAD_BYTES_MAX = 2 * limits.MANIFEST_BYTES_MAX
"""Manifests that are remembered for ADDs that are about to come."""


class Node:
    """A node of a replica, running while in its context.

    Args:
        replica: stays open, and may be used beside the node.
        listen: ``HOST:PORT`` over TLS, or ``http://HOST:PORT`` without; port 0 is any. None: it does not listen.
        peers: URLs of peers, each with its key as fragment (``https://host:7070#KEY``) or a trusted one's.
        resolve: where a merged checkpoint is kept up to date.
        insecure: plain HTTP also beyond loopback.
        period: seconds between two sessions, about.
        status: ``HOST:PORT`` of its page, over plain HTTP.
        key_quota: bytes of one key's contributions that are fetched: tensors, statistics and files.
    """

    def __init__(
        self,
        replica: Replica,
        *,
        listen: str | None = "127.0.0.1:7070",
        peers: Iterable[str] = (),
        resolve: str | Path | None = None,
        insecure: bool = False,
        period: float = PERIOD_SECONDS,
        status: str | None = None,
        key_quota: int | None = None,
        source: random.Random | None = None,
    ) -> None:
        self.replica, self._period, self._source = replica, period, source
        self._key_quota = key_quota
        self._status = address.showing(status) if status and status != "off" else None
        self._listen = address.listening(listen, insecure=insecure) if listen else None
        self._peers = [address.peer(url, replica.peers, insecure=insecure) for url in peers]
        self._database = ThreadPoolExecutor(1, thread_name_prefix="crdtmerge-gossip")
        self._ahead: OrderedDict[bytes, tuple[Manifest, int]] = OrderedDict()
        self._fetch_soon = asyncio.Event()
        self._stop = asyncio.Event()
        self._fault: BaseException | None = None
        self._trusted: set[bytes] = set()
        self._known: set[bytes] = set()
        self._refused: set[bytes] = set()
        self._anchored: set[bytes] = set()
        self._context: ssl.SSLContext | None = None
        self._out = Path(resolve) if resolve is not None else None
        self.fetching: Fetch | None = None
        self.fetched = Fetched()
        self.warnings: dict[str, str] = {}
        self.started = time.monotonic()

    # ---- running

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as opened:
            opened.callback(self._database.shutdown)
            replica = self.replica
            self.key_file = replica.folder / "key.pem"
            self._key = await self.call(lambda: replica.key)
            self.holding = await self.call(Holding, replica)
            self.receiving = replica.receiving(self._key_quota)
            await self.call(self.receiving.__enter__)
            opened.push_async_callback(self.call, self.receiving.__exit__, None, None, None)
            self.giving, self.uploads = replica.giving(), Uploads(self.receiving, self.call)
            self.session = await opened.enter_async_context(connections())
            self.spread = Spread(
                self.holding,
                self.call,
                source=self._source,
                period=self._period,
                on_news=self._on_news,
                on_starving=self._feed,
                on_fault=self._failed,
            )
            opened.push_async_callback(self.spread.close)
            self.merged = KeptMerged(self, self._out) if self._out else None
            self._follow(await self.call(self.replica.peers.every))
            self.server = await self._serving(opened)
            reporter = Reporter(self)
            self.status_url = await self._showing(opened, reporter)
            tasks = [asyncio.create_task(one) for one in (self._watch(), self._fetch(), reporter.run())]
            if self.merged:
                tasks.append(asyncio.create_task(self.merged.run()))
            for task in tasks:
                task.add_done_callback(self._ended)
            opened.push_async_callback(_cancelled, tasks)
            self._opened = opened.pop_all()
        self._fetch_soon.set()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        await self._opened.aclose()

    def stop(self) -> None:
        """Let ``stopped`` return."""
        self._stop.set()

    async def stopped(self) -> None:
        """Wait until ``stop``. Raises what ended the node before."""
        await self._stop.wait()
        if self._fault is not None:
            raise self._fault

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (fault := task.exception()) is not None:
            self._failed(fault)

    def _failed(self, fault: BaseException) -> None:
        self._fault = self._fault or fault
        self._stop.set()

    async def call(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Run something on the replica, after what is running."""
        return await asyncio.get_running_loop().run_in_executor(self._database, partial(work, *arguments))

    @property
    def url(self) -> str | None:
        """Where it listens, with its key: what others give as ``--peer``."""
        if self._listen is None or self.server is None:
            return None
        host = f"[{self._listen.host}]" if ":" in self._listen.host else self._listen.host
        plain = f"{self._listen.scheme}://{host}:{self.server.port}"
        return f"{plain}#{self.key.hex()}" if self._listen.scheme == "https" else plain

    async def _serving(self, opened: AsyncExitStack) -> HttpServer | None:
        if self._listen is None:
            return None
        if self._listen.scheme == "https":
            self._context = tls.server_context(self.key_file, self.key, self._trusted)
            self._anchored = set(self._trusted)
        try:
            return await opened.enter_async_context(
                HttpServer(self, self._listen.host, self._listen.port, self._context)
            )
        except OSError as fault:
            raise UsageError(f"cannot listen on {self._listen.host}:{self._listen.port}: {fault.strerror}.") from None

    async def _showing(self, opened: AsyncExitStack, reporter: Reporter) -> str | None:
        """Its page, where it is wanted."""
        if self._status is None:
            return None
        _, host, port = self._status
        runner = web.AppRunner(application(reporter.report, [host]), access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        opened.push_async_callback(runner.cleanup)
        site = web.TCPSite(runner, host, port)
        try:
            await site.start()
        except OSError as fault:
            raise UsageError(f"cannot show the status on {host}:{port}: {fault.strerror}; choose --status.") from None
        return f"http://{host}:{runner.addresses[0][1]}"

    def meet(self, where: address.Where) -> None:
        """Talk to a peer from now on."""
        context = tls.client_context(self.key_file, self.key, where.key) if where.key else None
        self.spread.meet(Contact(HttpPeer(self.session, where.url, context), where.url, where.key))

    # ---- what it does by itself

    def _on_news(self, ops: list[Op]) -> None:
        if any(isinstance(op.payload, Add | Unretract) for op in ops):
            self._fetch_soon.set()
        if self.merged:
            self.merged.look()

    async def _watch(self) -> None:
        """Notice what other processes did: operations, trust, blobs."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                await self.spread.look()
                self._follow(await self.call(self.replica.peers.every))
                self.warnings.pop("replica", None)
            except CrdtMergeError as fault:
                self.warnings["replica"] = str(fault)
            if self.merged:
                self.merged.look()

    def _follow(self, peers: list[Peer]) -> None:
        """Trust whom the replica trusts and whom it was told to talk to, until that is taken back."""
        known = {peer.key for peer in peers}
        self._refused = (self._refused | (self._known - known)) - known
        self._known = known
        for where in self._peers:
            if where.key in self._refused:
                self.spread.forget(where.url)
            elif where.url not in self.spread.contacts:
                self.meet(where)
        self._trusted = (known | {where.key for where in self._peers if where.key}) - self._refused
        for key in self._trusted:
            self._recognise(key)

    def _recognise(self, key: bytes) -> None:
        """Let a key through the handshake."""
        if self._context is not None and key not in self._anchored:
            tls.trust(self._context, key)
            self._anchored.add(key)

    async def _fetch(self) -> None:
        """Fetch what is lacking whenever something may be."""
        while True:
            await self._fetch_soon.wait()
            self._fetch_soon.clear()
            sources = [one.link for one in self.spread.contacts.values() if one.banned_until is None]
            links = [one for one in sources if isinstance(one, HttpPeer)]
            self.fetching = fetching = Fetch(self.receiving, links, call=self.call)
            try:
                fetched = await fetching.run()
                self.warnings.pop("fetch", None)
            except CrdtMergeError as fault:
                self.warnings["fetch"] = str(fault)
                fetched = fetching.fetched
                fetched.lacking += 1
            finally:
                self.fetching = None
            self._learn(fetched)
            self.warnings = {name: said for name, said in self.warnings.items() if not name.startswith("quota ")} | {
                f"quota {key.hex()}": f"{count} contents or files of {key.hex()[:16]} are over its quota and not taken."
                for key, count in self.receiving.over_quota.items()
            }
            if self.merged:
                self.merged.look()
            if fetched.lacking:
                asyncio.get_running_loop().call_later(FETCH_SECONDS, self._fetch_soon.set)

    async def _feed(self, contact: Contact) -> None:
        """Bring a peer that cannot reach this node what it lacks."""
        if isinstance(contact.link, HttpPeer):
            await give(self.giving, contact.link)

    def _learn(self, fetched: Fetched) -> None:
        """Add up, and leave alone whoever served wrong bytes."""
        total = self.fetched
        total.blobs += fetched.blobs
        total.nbytes += fetched.nbytes
        total.resumed_bytes += fetched.resumed_bytes
        total.lacking = fetched.lacking
        for name in [*total.failing.keys() - fetched.failing.keys()]:
            self.warnings.pop(f"fetch from {name}", None)
        self.warnings |= {f"fetch from {name}": why for name, why in fetched.failing.items()}
        total.failing = fetched.failing
        for name, why in fetched.false.items():
            total.false[name] = why
            if name in self.spread.contacts:
                self.spread.ban(self.spread.contacts[name], why)

    # ---- what others ask of it (``server.Desk``)

    @property
    def key(self) -> bytes:
        """The node's own key."""
        public: bytes = self._key.public
        return public

    def trusts(self, key: bytes) -> bool:
        """Whether a key may talk to it."""
        return key in self._trusted

    async def answer(self, request: messages.Request, peer: bytes | None) -> messages.Answer:
        """One round of a session."""
        name = next((one.name for one in self.spread.contacts.values() if peer and one.key == peer), None)
        ahead = {content: manifest for content, (manifest, _) in self._ahead.items()}
        answer = await self.spread.answer(request, name, ahead)
        starving = name is None and (self.fetched.lacking > 0 or self._fetch_soon.is_set())
        return replace(answer, starving=starving)

    async def join(self, joining: wire.Joining) -> bytes | None:
        """The genesis record for one who was invited; from now on it is trusted."""
        if not await self.call(self.replica.peers.redeem, joining.secret, joining.key):
            return None
        self._recognise(joining.key)
        self._trusted.add(joining.key)
        return self.replica.genesis.to_bytes()

    async def manifest(self, content: bytes) -> bytes | None:
        """A manifest."""
        found: Manifest | None = await self.call(self.replica.manifest, content)
        return found.to_bytes() if found else None

    async def keep_manifest(self, data: bytes) -> None:
        """Remember a manifest for the ADD that comes next."""
        try:
            manifest = await asyncio.to_thread(Manifest.from_bytes, data)
        except CrdtMergeError as fault:
            raise FalsePeerError(str(fault)) from None
        self._ahead[manifest.id] = manifest, len(data)
        while len(self._ahead) > 1 and sum(nbytes for _, nbytes in self._ahead.values()) > AHEAD_BYTES_MAX:
            self._ahead.popitem(last=False)

    async def whole(self, digests: list[bytes]) -> dict[bytes, bytes]:
        """Files and tensors of one piece, as many as an answer takes."""
        found: dict[bytes, bytes] = {}
        room = wire.WHOLE_BYTES_MAX
        for digest in dict.fromkeys(digests):
            data = await self._given(self.giving.whole, digest)
            if data is not None:
                room -= len(data)
                if room < 0:
                    break
                found[digest] = data
        return found

    async def tree(self, digest: bytes) -> bytes | None:
        """The tree of a tensor."""
        return await asyncio.to_thread(self.giving.tree, digest)

    async def blob(self, digest: bytes) -> Blob | None:
        """A tensor."""
        return await asyncio.to_thread(self.giving.blob, digest)

    async def piece(self, blob: Blob, number: int) -> Any:
        """The bytes of one of its pieces, checked."""
        return await self._given(self.giving.piece, blob, number)

    async def _given(self, give: Callable[..., Any], *what: Any) -> Any:
        """Bytes of a blob; that it is damaged is said here too."""
        try:
            return await asyncio.to_thread(give, *what)
        except ReplicaError as fault:
            self.warnings["damage"] = str(fault)
            raise

    async def lacking(self) -> wire.LackingThere:
        """What is not here."""
        return await self.uploads.lacking()

    async def take_whole(self, found: dict[bytes, bytes]) -> None:
        """Keep files and tensors that are lacking."""
        await self.uploads.take_whole(found)
        self._arrived()

    async def take_tree(self, digest: bytes, data: bytes) -> None:
        """Begin a tensor that is lacking."""
        await self.uploads.take_tree(digest, data)

    async def take_piece(self, digest: bytes, number: int, data: bytes) -> None:
        """Keep a piece of it."""
        if await self.uploads.take_piece(digest, number, data):
            self._arrived()

    def _arrived(self) -> None:
        if self.merged:
            self.merged.look()


async def _cancelled(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
