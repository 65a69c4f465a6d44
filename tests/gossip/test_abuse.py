"""Whatever is sent to a node, it answers 4xx or hangs up, stays within its bounds and goes on for the others."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import threading
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crdtmerge import limits
from crdtmerge.errors import FalsePeerError
from crdtmerge.gossip import messages, server, wire
from crdtmerge.gossip.node import Node
from crdtmerge.gossip.statements import Statement
from crdtmerge.pool.replica import Replica
from tests.gossip.nodes import Served, key_of
from tests.gossip.talking import answered, ask, connected, node_of, port_of, raw
from tests.pool.replicas import Model, founded, said_by, second


def large(number: int) -> Model:
    """A model with a tensor of three pieces."""
    return {"large": np.random.default_rng(number).standard_normal(700_000, np.float32), "small": np.float32([number])}


class Rig:
    """A node over plain HTTP in a loop of its own, what it lacks, and all that it or the loop complained of."""

    def __init__(self, root: Path) -> None:
        self.one = founded(root / "one", like=large(0), key=key_of(0))
        self.other = second(self.one, root / "other", key_of(1))
        self.other.add(large(1))
        self.one.add(large(2))
        self.one.join(*said_by(self.other))
        self.complaints: list[str] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def start(self) -> None:
        self._loop.set_exception_handler(lambda loop, context: self.complaints.append(str(context)))
        self._thread.start()
        self.node: Node = self.run(self._open())

    async def _open(self) -> Node:
        return await Node(self.one, listen="http://127.0.0.1:0").__aenter__()

    def stop(self) -> None:
        self.run(self.node.__aexit__(None, None, None))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
        self.one.close()
        self.other.close()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(120)

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> int:
        """The status of an answer to a plain request."""
        found = {name.replace("_", "-"): value for name, value in headers.items()}
        return int(self.run(self._plain(method, path, body, found)))

    async def _plain(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(self.node))
        said = {"Host": "n", "Connection": "close", **({} if body is None else {"Content-Length": str(len(body))})}
        lines = [f"{method} {path} HTTP/1.1", *(f"{n}: {v}" for n, v in {**said, **headers}.items() if v)]
        with contextlib.suppress(OSError):
            writer.write("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + (body or b""))
            await writer.drain()
        try:
            async with asyncio.timeout(60):
                return (await answered(reader))[0]
        finally:
            writer.transport.abort()


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    rig = Rig(tmp_path_factory.mktemp("rig"))
    handler = _Collecting(rig.complaints)
    logging.getLogger().addHandler(handler)
    rig.start()
    try:
        yield rig
    finally:
        rig.stop()
        logging.getLogger().removeHandler(handler)


class _Collecting(logging.Handler):
    def __init__(self, found: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._found = found

    def emit(self, record: logging.LogRecord) -> None:
        self._found.append(f"{record.name}: {record.getMessage()} {record.exc_info}")


@pytest.fixture(autouse=True)
def _no_complaint(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "rig" in request.fixturenames:
        rig: Rig = request.getfixturevalue("rig")
        complaints, rig.complaints[:] = list(rig.complaints), []
        assert not complaints, complaints[:3]
        assert rig.ask("GET", "/v1/lacking") == 200, "it goes on"


def valid_messages(rig: Rig) -> list[tuple[str, str, bytes, dict[str, str]]]:
    """A request to every path that takes a body, each one right."""
    other, pool = rig.other, rig.one.pool_id
    ops, manifests = said_by(other)
    want = next(row for manifest in manifests.values() for row in manifest.rows if row.name == "large")
    tree, piece = other.giving().tree(want.digest), other.giving().blob(want.digest)
    assert tree is not None
    assert piece is not None
    said = Statement.signed(other.key, pool, 1, bytes(32), bytes(32)).wire
    request = messages.Request(
        pool,
        heads=other.heads,
        ranges=msgpack.packb([[None, b"", 1, bytes(32)]]),
        wants=(bytes(32),),
        ops=tuple(op.wire for op in ops),
        manifests=tuple(manifest.to_bytes() for manifest in manifests.values()),
        said=(said,),
    )
    joining = wire.Joining(bytes(16), key_of(5).public).signed(key_of(5), rig.node.key)
    ranged = {"Content-Range": f"bytes 0-{limits.PIECE_BYTES - 1}/{piece.nbytes}"}
    name = want.digest.hex()
    return [
        ("POST", "/v1/sync", request.to_bytes(), {}),
        ("POST", "/v1/join", joining, {}),
        ("POST", "/v1/whole", want.digest * 3, {}),
        ("PUT", "/v1/whole", wire.pack_whole({want.digest: b"x", bytes(32): b"y"}), {}),
        ("PUT", f"/v1/manifest/{'0' * 64}", next(iter(manifests.values())).to_bytes(), {}),
        ("PUT", f"/v1/tree/{name}", tree, {}),
        ("PUT", f"/v1/blob/{name}", bytes(other.giving().piece(piece, 0))[:2000], ranged),
    ]


def check_refused(rig: Rig, method: str, path: str, body: bytes, headers: dict[str, str]) -> None:
    status = rig.ask(method, path, body, **headers)
    assert status == 200 or 400 <= status < 500, (status, method, path, body[:100])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_bytes_are_refused_everywhere(rig: Rig, data: st.DataObject) -> None:
    method, path, _, headers = data.draw(st.sampled_from(valid_messages(rig)))
    check_refused(rig, method, path, data.draw(st.binary(max_size=300)), headers)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutations_of_valid_messages_are_taken_or_refused(rig: Rig, data: st.DataObject) -> None:
    method, path, body, headers = data.draw(st.sampled_from(valid_messages(rig)))
    mutated = bytearray(body)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, max(len(mutated) - 1, 0)))
        match data.draw(st.sampled_from(["set", "insert", "delete", "cut"])):
            case "set" if mutated:
                mutated[at] = data.draw(st.integers(0, 255))
            case "insert":
                mutated[at:at] = data.draw(st.binary(max_size=9))
            case "delete":
                del mutated[at : at + data.draw(st.integers(1, 40))]
            case _:
                del mutated[at:]
    check_refused(rig, method, path, bytes(mutated), headers)


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=70),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9) | st.binary(max_size=33), inner, max_size=4)
    ),
    max_leaves=12,
)
_FIELDS = ["pool", "heads", "ranges", "wants", "ops", "manifests", "said", "refused", "lacks", "more"]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_well_formed_nonsense_is_refused_everywhere(rig: Rig, data: st.DataObject) -> None:
    method, path, _, headers = data.draw(st.sampled_from(valid_messages(rig)))
    value = data.draw(_VALUES)
    if path == "/v1/sync":
        value = {"pool": rig.one.pool_id, **data.draw(st.dictionaries(st.sampled_from(_FIELDS), _VALUES))}
    check_refused(rig, method, path, msgpack.packb(value), headers)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200) | _VALUES.map(msgpack.packb))
def test_what_a_client_reads_is_refused_by_name_alone(data: bytes) -> None:
    read = (
        messages.Answer.from_bytes, messages.Request.from_bytes, wire.read_whole, wire.read_ids,
        wire.LackingThere.from_bytes, lambda data: wire.Joining.read(data, bytes(32)), Statement.from_wire,
    )  # fmt: skip
    for one in read:
        with contextlib.suppress(FalsePeerError):
            one(data)  # type: ignore[operator]


HUGE = 1 << 41


@pytest.mark.parametrize(
    ("reads", "value"),
    [
        (messages.Answer.from_bytes, {"refused": [[HUGE, "why"]]}),
        (messages.Answer.from_bytes, {"refused": {b"x": 1}}),
        (wire.read_whole, [[bytes(32), HUGE]]),
        (wire.LackingThere.from_bytes, [b"", [[bytes(32), HUGE]]]),
        (wire.LackingThere.from_bytes, [HUGE, []]),
        (messages.Request.from_bytes, {"pool": HUGE}),
        (messages.Request.from_bytes, {"pool": bytes(32), "ops": HUGE}),
    ],
)
def test_a_number_in_the_place_of_bytes_is_refused_and_not_allocated(reads: Any, value: object) -> None:
    with pytest.raises(FalsePeerError):
        reads(msgpack.packb(value))


# ---- HTTP

NAME = "ab" * 32


def test_paths_and_methods_that_are_none_of_ours(rig: Rig) -> None:
    paths = ["/", "/v1", "/v1/", "//v1/sync", "/v1/sync/", "/v1/blob/", f"/v1/blob/{NAME}/", f"/v1/blob/{NAME}00"]
    paths += [
        f"/v1/blob/{NAME.upper()}",
        "/v1/blob/../sync",
        "/v1/%2e%2e/sync",
        "/v1/blob/%00",
        "/v1/blob/" + "%61" * 63,
    ]
    paths += ["/v1/tree/" + "é" * 64, "/v1/sync?x=1#y", "*", "http://else.where/v1/nothing", "/" + "x" * 7000]
    for path in paths:
        for method in ("GET", "PUT", "DELETE", "OPTIONS", "TRACE", "BREW"):
            assert rig.ask(method, path) in (0, 400, 404), (method, path)
    assert rig.ask("GET", "/" + "x" * 20_000) in (0, 400, 414)
    assert rig.ask("GET", "/v1/lacking", X="y" * 20_000) in (0, 400, 431)


def test_bodies_must_say_their_length_and_stay_within_it(rig: Rig) -> None:
    for method, path, body, headers in valid_messages(rig):
        refused = [
            rig.ask(method, path, None, **headers),
            rig.ask(method, path, b"", **headers, Content_Length="", Transfer_Encoding="chunked"),
            rig.ask(method, path, body, **headers, Content_Encoding="gzip"),
            rig.ask(method, path, body, **headers, Content_Length=str(80 << 20)),
            rig.ask(method, path, body, **headers, Content_Length="-5"),
            rig.ask(method, path, body, **headers, Content_Length="5x"),
        ]
        assert all(status in (0, 400, 408) for status in refused), (path, refused)


def test_a_connection_that_is_lost_in_the_middle_of_a_request_is_nobodys_fault(rig: Rig) -> None:
    async def lost() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", port_of(rig.node))
        writer.write(b"POST /v1/sync HTTP/1.1\r\nHost: n\r\nContent-Length: 100\r\n\r\nbegun")
        await writer.drain()
        await asyncio.sleep(0.1)
        writer.transport.abort()
        await asyncio.sleep(0.1)

    before = list(rig.complaints)
    for _ in range(5):
        rig.run(lost())
    assert rig.complaints == before


def test_wrong_ranges_are_refused(rig: Rig) -> None:
    blob = next(
        b
        for e in rig.one.visible
        for r in rig.one.manifest(e.id).rows
        if (b := rig.one.giving().blob(r.digest)) and b.nbytes > limits.PIECE_BYTES
    )  # type: ignore[union-attr]
    path, nbytes = f"/v1/blob/{blob.digest.hex()}", blob.nbytes
    for text in (
        "bytes=5-",
        "bytes=-5",
        "bytes=0-1,5-6",
        "bytes=0-",
        "items=0-5",
        "bytes=a-b",
        f"bytes={nbytes}-",
        "bytes=",
        f"bytes={'9' * 40}-",
        "bytes=1048576-5",
    ):
        assert rig.ask("GET", path, Range=text) == (206 if text == "bytes=0-" else 416), text
    assert rig.ask("GET", path) == 206
    assert rig.ask("GET", path, Range=f"bytes={limits.PIECE_BYTES}-{10 * nbytes}") == 206
    assert rig.ask("GET", f"/v1/blob/{NAME}") == 404


def test_only_what_is_lacking_is_taken_and_only_right_bytes(rig: Rig) -> None:
    lacking = rig.run(rig.node.lacking())
    (digest,) = lacking.large
    blob, giving = rig.other.giving().blob(digest), rig.other.giving()
    assert blob is not None
    path, whole = f"/v1/blob/{digest.hex()}", f"bytes 0-{limits.PIECE_BYTES - 1}/{blob.nbytes}"
    piece = bytes(giving.piece(blob, 0))
    assert rig.ask("PUT", f"/v1/blob/{NAME}", piece, Content_Range=whole) == 400
    assert rig.ask("PUT", f"/v1/tree/{NAME}", giving.tree(digest)) == 400
    assert rig.ask("PUT", f"/v1/tree/{digest.hex()}", giving.tree(digest)) == 200
    for text in (
        "",
        "bytes */5",
        "bytes 5-9/10",
        "bytes 0-1",
        f"bytes {limits.PIECE_BYTES * 3}-{limits.PIECE_BYTES * 4}/9",
    ):
        assert rig.ask("PUT", path, piece, Content_Range=text) == 400, text
    assert rig.ask("PUT", path, bytes(len(piece)), Content_Range=whole) == 400
    assert rig.ask("PUT", path, piece[:-1], Content_Range=whole) == 400
    assert rig.ask("PUT", path, piece, Content_Range=whole) == 200
    assert rig.ask("PUT", path, piece, Content_Range=whole) == 200, "again does no harm"
    small = {one: giving.whole(one) for one in lacking.whole}
    wrong = {one: bytes(len(data or b"")) for one, data in small.items()}
    assert rig.ask("PUT", "/v1/whole", wire.pack_whole(wrong)) == 400
    assert rig.ask("PUT", "/v1/whole", wire.pack_whole({bytes(32): b"not asked for"})) == 200
    assert rig.one.giving().blob(bytes(32)) is None


def test_requests_may_be_replayed(rig: Rig) -> None:
    before = len(rig.one.opset)
    for _ in range(20):
        for method, path, body, headers in valid_messages(rig)[:3]:
            assert rig.ask(method, path, body, **headers) in (200, 403)
    assert len(rig.one.opset) == before


# ---- time and numbers


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Replica, Replica]]:
    """A replica, and one that it trusts."""
    with (
        founded(tmp_path / "one", like=large(0), key=key_of(0)) as one,
        second(one, tmp_path / "two", key_of(1)) as two,
    ):
        one.peers.trust(two.author)
        yield one, two


def test_headers_and_bodies_that_drip_are_cut_off(
    pair: tuple[Replica, Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "IDLE_SECONDS", 1.0)
    monkeypatch.setattr(server, "BODY_SECONDS", 0.5)
    monkeypatch.setattr(server, "BODY_RATE", 1 << 30)

    async def drip(node: Node, begin: bytes, count: int = 600) -> bytes:
        reader, writer = await connected(node, pair[1])
        writer.write(begin)
        reading = asyncio.create_task(reader.read())
        with contextlib.suppress(OSError):
            for _ in range(count):
                if reading.done():
                    break
                writer.write(b"a")
                await writer.drain()
                await asyncio.sleep(0.1)
        try:
            return await reading
        except OSError:
            return b""

    async def main() -> None:
        async with node_of(pair[0]) as node:
            headers, body, silent = await asyncio.gather(
                drip(node, b"GET /v1/lacking HTTP/1.1\r\nX: "),
                drip(node, b"POST /v1/sync HTTP/1.1\r\nHost: n\r\nConnection: close\r\nContent-Length: 5000\r\n\r\n"),
                drip(node, b"", 0),
            )
            assert (headers, silent) == (b"", b"")
            assert b" 408 " in body
            assert (await ask(node, pair[1], "GET", "/v1/lacking"))[0] == 200

    asyncio.run(main())


def test_who_does_not_read_what_it_asked_for_is_cut_off(
    pair: tuple[Replica, Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "BODY_SECONDS", 0.5)
    monkeypatch.setattr(server, "BODY_RATE", 1 << 30)
    one, two = pair
    with founded(one.folder.parent / "big", like={"w": np.zeros(8_000_000, np.float32)}, key=key_of(2)) as big:
        content = big.add({"w": np.random.default_rng(1).standard_normal(8_000_000, np.float32)}).id
        big.peers.trust(two.author)
        manifest = big.manifest(content)
        assert manifest is not None
        path = f"/v1/blob/{manifest.rows[0].digest.hex()}"

        async def main() -> None:
            async with node_of(big) as node:
                _, writer = await connected(node, two)
                writer.transport.pause_reading()  # type: ignore[attr-defined]
                writer.write(f"GET {path} HTTP/1.1\r\nHost: n\r\n\r\n".encode())
                assert node.server is not None
                end = time.monotonic() + 60
                while node.server.bytes_sent == 0 or node.server._connections._idle_since:
                    assert time.monotonic() < end, "the connection is not held for ever"
                    await asyncio.sleep(0.1)
                writer.transport.abort()
                assert (await ask(node, two, "GET", path))[0] == 206

        asyncio.run(main())


def test_connections_are_bounded_and_strangers_take_no_place_of_peers(
    pair: tuple[Replica, Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "CONNECTIONS_MAX", 12)
    monkeypatch.setattr(server, "STRANGERS_MAX", 4)

    async def alive(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        with contextlib.suppress(OSError):
            writer.write(b"GET /v1/lacking HTTP/1.1\r\nHost: n\r\n\r\n")
            return bool(await reader.read(1))
        return False

    async def main() -> None:
        async with node_of(pair[0]) as node:
            strangers = [await connected(node, None) for _ in range(10)]
            living = [await alive(*one) for one in strangers]
            assert sum(living) == 4
            peers = [await connected(node, pair[1]) for _ in range(12)]
            assert sum([await alive(*one) for one in peers]) == 8
            for _, writer in [*strangers, *peers]:
                writer.transport.abort()
            await asyncio.sleep(0.2)
            assert (await ask(node, pair[1], "GET", "/v1/lacking"))[0] == 200

    asyncio.run(main())


def test_requests_of_one_peer_at_a_time_are_bounded(
    pair: tuple[Replica, Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "REQUESTS_MAX", 3)
    monkeypatch.setattr(server, "BUSY_SECONDS", 0.3)

    async def main() -> None:
        async with node_of(pair[0]) as node:
            free = asyncio.Event()

            async def stuck() -> wire.LackingThere:
                await free.wait()
                return wire.LackingThere([], {})

            monkeypatch.setattr(node, "lacking", stuck)
            asked = [asyncio.create_task(ask(node, pair[1], "GET", "/v1/lacking")) for _ in range(8)]
            await asyncio.wait(asked, timeout=60, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.sleep(1)
            assert [status for status, _ in (one.result() for one in asked if one.done())] == [429] * 5
            free.set()
            assert sorted([(await one)[0] for one in asked]) == [200] * 3 + [429] * 5

    asyncio.run(main())


def test_a_request_that_is_cut_off_anywhere_leaves_the_node_running(pair: tuple[Replica, Replica]) -> None:
    async def main() -> None:
        async with node_of(pair[0]) as node:
            request = messages.Request(pair[0].pool_id, heads=()).to_bytes()
            data = b"POST /v1/sync HTTP/1.1\r\nHost: n\r\nContent-Length: %d\r\n\r\n" % len(request) + request
            for at in range(0, len(data), 7):
                _, writer = await connected(node, pair[1])
                writer.write(data[:at])
                writer.close()
            assert (await raw(node, pair[1], data.replace(b"Host: n", b"Host: n\r\nConnection: close")))[0] == 200

    asyncio.run(main())


def test_memory_stays_flat_under_thousands_of_bad_requests(tmp_path: Path) -> None:
    with (
        founded(tmp_path / "one", like=large(0), key=key_of(0)) as one,
        second(one, tmp_path / "two", key_of(1)) as two,
    ):
        one.add(large(1))
        one.peers.trust(two.author)
        source = random.Random(1)
        with Served(tmp_path / "one") as served:
            context = _context(two, served)

            async def shoot(count: int, nbytes: int) -> None:
                for _ in range(count):
                    reader, writer = await asyncio.open_connection("127.0.0.1", served.port, ssl=context)
                    path = source.choice(["sync", "join", "whole", f"blob/{NAME}", f"tree/{NAME}", f"manifest/{NAME}"])
                    said = nbytes or source.randrange(2000)
                    writer.write(f"PUT /v1/{path} HTTP/1.1\r\nHost: n\r\nContent-Length: {said}\r\n\r\n".encode())
                    with contextlib.suppress(OSError):
                        writer.write(source.randbytes(min(said, 1 << 16)))
                        await writer.drain()
                        await asyncio.wait_for(reader.read(1 << 16), 60)
                    writer.transport.abort()

            async def all_of(count: int, nbytes: int) -> None:
                await asyncio.gather(*(shoot(count // 8, nbytes) for _ in range(8)))

            asyncio.run(all_of(400, 0))
            before = served.memory_bytes
            asyncio.run(all_of(2000, 0))
            asyncio.run(all_of(1000, 100 << 20))
            assert served.memory_bytes - before < 64 * limits.MIB
            assert served.report["visible_count"] == 1
            assert served.stop() == 0
            assert "Traceback" not in served.log, served.log


def _context(client: Replica, served: Served) -> Any:
    from crdtmerge.gossip import tls

    return tls.client_context(client.folder / "key.pem", client.author, bytes.fromhex(served.said["key"]))
