"""The status of a running peer, as a page, as a stream of events, as JSON and as metrics. Read only.

RULES
1. Nothing is changed through it: only GET and HEAD are answered.
2. A request must name a host that is ours, so that no other site reaches it by pointing its own name here.
3. The page is one file. Its policy lets it run its own script and style by their hashes, connect to its own origin,
   and nothing else; it makes no markup out of text (Trusted Types).
4. However many pages are open, the report is made for them twice a second at most, and sent only if it has news.

    GET /            the page          GET /events      server-sent events: the report, each time it changed
    GET /api/status  the report        GET /metrics     Prometheus text format        GET /healthz   can it be made?

>>> web.run_app(application(node.report), host="127.0.0.1", port=8900)  # doctest: +SKIP
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import resources
from typing import Literal, TypedDict

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

VISIBLE_MAX = 500
"""Visible contributions that a report lists; it counts all of them."""

CLIENTS_MAX = 32
"""Open streams of events: some pages of some people. A browser that forgot one is noticed and let go."""

LOOK_SECONDS = 0.5
"""How often the report is looked at while someone listens."""

HEARTBEAT_SECONDS = 15.0
"""A stream without news says so often that it is alive: proxies close what is silent for half a minute."""

WRITE_SECONDS = 60.0
"""A listener that takes nothing for so long is let go."""

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
"""The hosts that a request may always name."""

PeerState = Literal["connected", "waiting", "failing", "banned"]
MergedState = Literal["current", "merging", "waiting", "failed"]
PEER_STATES: tuple[PeerState, ...] = ("connected", "waiting", "failing", "banned")
MERGED_STATES: tuple[MergedState, ...] = ("current", "merging", "waiting", "failed")


class Visible(TypedDict):
    """A visible contribution. ``bytes`` counts all its tensors, as far as that is known."""

    id: str
    weight: str
    role: str
    task: str | None
    adders: list[str]
    note: str | None
    ready: bool
    bytes: int | None
    missing_bytes: int


class Peer(TypedDict):
    """Another replica that this one talks to, or would."""

    url: str | None
    key: str | None
    state: PeerState
    last_sync_seconds_ago: float | None
    rtt_seconds: float | None
    failures: int
    next_try_seconds: float | None
    ops_sent: int
    ops_received: int
    bytes_sent: int
    bytes_received: int
    reason: str | None


class Transfer(TypedDict):
    """A blob that is being fetched."""

    digest: str
    content: str | None
    bytes: int
    done_bytes: int
    sources: int


class Merged(TypedDict):
    """The checkpoint that this peer keeps merged."""

    state: MergedState
    out: str
    merge_id: str | None
    output_digest: str | None
    message: str | None


class Disagreement(TypedDict):
    """The peer with that key says that the same merge has another digest."""

    merge_id: str
    ours: str
    theirs: str
    key: str


class Fork(TypedDict):
    """Two operations that one key signed for one place."""

    key: str
    ops: list[str]


class Totals(TypedDict):
    """What went over the network since the peer started."""

    ops_sent: int
    ops_received: int
    bytes_sent: int
    bytes_received: int
    blobs_fetched: int


class Report(TypedDict):
    """What a peer says of itself. Ids, keys and digests are lowercase hex."""

    pool: str
    actor: str
    address: str | None
    version: str
    uptime_seconds: float
    root: str
    state_root: str
    recipe: str
    ops: int
    visible_count: int
    ready_count: int
    visible: list[Visible]
    hidden_count: int
    peers: list[Peer]
    transfers: list[Transfer]
    merged: Merged | None
    disagreements: list[Disagreement]
    forks: list[Fork]
    warnings: list[str]
    totals: Totals


def application(report: Callable[[], Report], hosts: Iterable[str] = ()) -> web.Application:
    """The status of the peer that ``report`` speaks for, to be served on loopback.

    ``report`` is called in the event loop, so it must be quick. ``hosts`` are the names and addresses, without port,
    by which others than this machine reach the page.
    """
    site = _Site(report)
    app = web.Application(middlewares=[_only_for({*LOOPBACK, *(host.lower() for host in hosts)})])
    app.on_response_prepare.append(site.protect)
    app.on_shutdown.append(site.close)
    app.router.add_get("/", site.page)
    app.router.add_get("/events", site.events)
    app.router.add_get("/api/status", site.status)
    app.router.add_get("/metrics", site.metrics)
    app.router.add_get("/healthz", site.health)
    return app


class _Site:
    """The handlers, and who listens."""

    def __init__(self, report: Callable[[], Report]) -> None:
        self._report = report
        self._news = _News(self._made)
        self._page = resources.files(__package__).joinpath("status.html").read_text(encoding="utf-8")
        self._policy = _policy(self._page)
        self._metrics = CollectorRegistry()
        self._metrics.register(_Metrics(self._made))
        self._listening = 0
        self._closing = asyncio.Event()

    def _made(self) -> Report:
        try:
            return self._report()
        except Exception as error:
            logging.getLogger(__name__).warning("the status report cannot be made", exc_info=error)
            reason = json.dumps({"status": "failing", "reason": f"the report cannot be made: {error}"})
            raise web.HTTPServiceUnavailable(text=reason, content_type="application/json") from error

    async def protect(self, request: web.Request, response: web.StreamResponse) -> None:
        """Headers of every answer."""
        response.headers["Content-Security-Policy"] = self._policy
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
        response.headers["Cross-Origin-Opener-Policy"] = "same-origin"
        response.headers["Cache-Control"] = "no-store"

    async def close(self, app: web.Application) -> None:
        """End all streams."""
        self._closing.set()

    async def page(self, request: web.Request) -> web.Response:
        """The page."""
        return web.Response(text=self._page, content_type="text/html")

    async def status(self, request: web.Request) -> web.Response:
        """The report, once."""
        return web.Response(text=_json(self._made()), content_type="application/json")

    async def health(self, request: web.Request) -> web.Response:
        """Whether the report can be made."""
        self._made()
        return web.json_response({"status": "ok"})

    async def metrics(self, request: web.Request) -> web.Response:
        """The report in numbers."""
        return web.Response(body=generate_latest(self._metrics), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def events(self, request: web.Request) -> web.StreamResponse:
        """The report each time it changed, until the listener leaves or this peer ends."""
        if self._listening >= CLIENTS_MAX:
            reason = json.dumps({"status": "busy", "reason": f"{CLIENTS_MAX} pages are open already; close one"})
            raise web.HTTPServiceUnavailable(text=reason, content_type="application/json")
        self._news.look()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        self._listening += 1
        try:
            await response.prepare(request)
            if request.method == "GET":
                await self._tell(request, response)
        except web.HTTPServiceUnavailable:
            pass  # the stream ends; whoever tries again is told why
        except (ConnectionError, TimeoutError):
            if request.transport is not None:
                request.transport.abort()
        finally:
            self._listening -= 1
        return response

    async def _tell(self, request: web.Request, response: web.StreamResponse) -> None:
        told, told_at = 0, 0.0
        while request.transport is not None:  # the listener is there
            self._news.look()
            now = time.monotonic()
            if self._news.number != told or now - told_at >= HEARTBEAT_SECONDS:
                message = self._news.event() if self._news.number != told else b": nothing new\n\n"
                told, told_at = self._news.number, now
                async with asyncio.timeout(WRITE_SECONDS):
                    await response.write(message)
            try:
                await asyncio.wait_for(self._closing.wait(), LOOK_SECONDS)
            except TimeoutError:
                continue
            return


class _News:
    """The newest report, looked at twice a second at most, and numbered by what is new in it."""

    def __init__(self, made: Callable[[], Report]) -> None:
        self._made = made
        self._newest: Report | None = None
        self._looked_at = -math.inf
        self._event: bytes | None = None
        self._known: tuple[object, list[float]] = (None, [])
        self.number = 0

    def look(self) -> None:
        """Count up if the report has changed in more than that time has passed."""
        now = time.monotonic()
        if now - self._looked_at < LOOK_SECONDS / 2:
            return
        self._newest, self._looked_at, self._event = self._made(), now, None
        facts, moments = _facts(self._newest), _moments(self._newest, now)
        if facts != self._known[0] or any(abs(a - b) > 1 for a, b in zip(moments, self._known[1], strict=True)):
            self._known = facts, moments
            self.number += 1

    def event(self) -> bytes:
        """The newest report as an event."""
        assert self._newest is not None, "looked at before it is told"
        if self._event is None:
            self._event = f"data: {_json(self._newest)}\n\n".encode()
        return self._event


def _facts(report: Report) -> object:
    """A report without what changes by itself from second to second."""
    peers = [{**peer, "last_sync_seconds_ago": None, "next_try_seconds": None} for peer in report["peers"]]
    return {**report, "uptime_seconds": None, "peers": peers}


def _moments(report: Report, now: float) -> list[float]:
    """When each peer was met and will be tried: these stand still while the seconds count."""
    moments = []
    for peer in report["peers"]:
        ago, ahead = peer["last_sync_seconds_ago"], peer["next_try_seconds"]
        moments += [-1.0 if ago is None else now - ago, -1.0 if ahead is None else now + ahead]
    return moments


class _Metrics(Collector):
    """A report in the names and units that Prometheus wants."""

    def __init__(self, made: Callable[[], Report]) -> None:
        self._made = made

    def collect(self) -> Iterator[Metric]:
        """One report's worth."""
        report = self._made()
        peers, merged, totals = report["peers"], report["merged"], report["totals"]
        yield InfoMetricFamily("crdtmerge_build", "The software.", value={"version": report["version"]})
        yield GaugeMetricFamily("crdtmerge_uptime_seconds", "Since the peer started.", report["uptime_seconds"])
        yield GaugeMetricFamily("crdtmerge_ops", "Operations in the set.", report["ops"])
        yield GaugeMetricFamily("crdtmerge_visible_contributions", "Visible in the set.", report["visible_count"])
        about = f"Visible with all tensors here, among the first {VISIBLE_MAX}."
        yield GaugeMetricFamily("crdtmerge_ready_contributions", about, report["ready_count"])
        yield GaugeMetricFamily("crdtmerge_hidden_contributions", "Hidden in the set.", report["hidden_count"])
        states = Counter(peer["state"] for peer in peers)
        yield _by_state("crdtmerge_peers", "Peers in each state.", {state: states[state] for state in PEER_STATES})
        rtt = GaugeMetricFamily("crdtmerge_peer_rtt_seconds", "Round trip to a peer.", labels=["peer"])
        for name, seconds in {(peer["url"] or peer["key"] or ""): peer["rtt_seconds"] for peer in peers}.items():
            if name and seconds is not None:
                rtt.add_metric([name], seconds)
        yield rtt
        yield GaugeMetricFamily("crdtmerge_transfers_in_progress", "Blobs in flight.", len(report["transfers"]))
        yield GaugeMetricFamily(
            "crdtmerge_disagreements", "Peers' digests of a merge that differ from ours.", len(report["disagreements"])
        )
        yield GaugeMetricFamily("crdtmerge_forks", "Pairs of operations for one place.", len(report["forks"]))
        if merged is not None:
            merging: dict[str, int] = {state: int(merged["state"] == state) for state in MERGED_STATES}
            yield _by_state("crdtmerge_merge_state", "1 for the state of the kept merge.", merging)
        yield CounterMetricFamily("crdtmerge_ops_received", "Operations received.", totals["ops_received"])
        yield CounterMetricFamily("crdtmerge_ops_sent", "Operations sent.", totals["ops_sent"])
        yield CounterMetricFamily("crdtmerge_bytes_received", "Bytes received.", totals["bytes_received"])
        yield CounterMetricFamily("crdtmerge_bytes_sent", "Bytes sent.", totals["bytes_sent"])
        yield CounterMetricFamily("crdtmerge_blobs_fetched", "Blobs fetched.", totals["blobs_fetched"])


def _by_state(name: str, about: str, counts: Mapping[str, int]) -> Metric:
    family = GaugeMetricFamily(name, about, labels=["state"])
    for state, count in counts.items():
        family.add_metric([state], count)
    return family


def _only_for(hosts: set[str]) -> Middleware:
    """Refuse requests that name another host."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        named = re.fullmatch(r"(\[[0-9a-f:.]+\]|[^\[\]:]+)(:[0-9]{1,5})?", request.headers.get("Host", "").lower())
        if named is None or named[1] not in hosts:
            raise web.HTTPMisdirectedRequest(text="this host is not served here; name it when the peer is started\n")
        return await handler(request)

    return check


def _policy(page: str) -> str:
    """What the page may do: run what is written in it, and ask its own origin."""
    hashes = {
        tag: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for text in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        )
        for tag in ("script", "style")
    }
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )


def _json(report: Report) -> str:
    return json.dumps(report, separators=(",", ":"), allow_nan=False)
