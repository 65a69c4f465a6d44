"""Who may talk to a node: trusted keys alone, and strangers only with an invitation, once."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from crdtmerge.errors import PeerError, UsageError
from crdtmerge.gossip import address, tls, wire
from crdtmerge.gossip.client import HttpPeer, connections
from crdtmerge.gossip.node import Node
from crdtmerge.gossip.sync import begin_from_peer, sync_peer
from crdtmerge.keys import Key
from crdtmerge.pool.replica import Replica
from tests.gossip.nodes import LIMIT_SECONDS, key_of
from tests.gossip.talking import answered, ask, connected, context_of, node_of, port_of, raw
from tests.pool.replicas import contents, founded, model, second

PATHS = [
    ("POST", "/v1/sync"),
    ("GET", "/v1/lacking"),
    ("POST", "/v1/whole"),
    ("PUT", "/v1/whole"),
    *((method, f"/v1/{kind}/{'0' * 64}") for kind in ("manifest", "tree", "blob") for method in ("GET", "PUT")),
    ("GET", "/"),
    ("GET", "/v1/join/"),
    ("GET", "/v1/%73ync"),
]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Replica, Replica]]:
    """A replica, and another that it does not trust."""
    with founded(tmp_path / "one", key=key_of(0)) as one, second(one, tmp_path / "two", key_of(1)) as two:
        one.add(model(1))
        yield one, two


def where_of(node: Node) -> address.Where:
    assert node.url is not None
    return address.peer(node.url)


def invitation(replica: Replica, node: Node, seconds: float = 60.0) -> address.Invitation:
    return address.Invitation(where_of(node), replica.peers.invite(seconds))


async def until(condition: object, what: str) -> None:
    end = time.monotonic() + LIMIT_SECONDS
    while not await condition():  # type: ignore[operator]
        assert time.monotonic() < end, what
        await asyncio.sleep(0.05)


def test_without_a_certificate_only_joining_answers(pair: tuple[Replica, Replica]) -> None:
    async def main() -> None:
        async with node_of(pair[0]) as node:
            for method, path in PATHS:
                status, body = await ask(node, None, method, path, b"" if method != "GET" else None)
                assert (status, b"know you" in body) == (403, True), (method, path)
            status, body = await ask(node, None, "POST", "/v1/join", b"\xc0")
            assert (status, b"malformed" in body) == (400, True)

    asyncio.run(main())


def test_an_untrusted_certificate_ends_the_handshake(pair: tuple[Replica, Replica]) -> None:
    async def main() -> None:
        async with node_of(pair[0]) as node:
            status = await _status(node, pair[1])
            assert status == 0

    asyncio.run(main())


def test_a_key_that_signs_for_another_is_a_stranger(pair: tuple[Replica, Replica], tmp_path: Path) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

    one, two = pair
    one.peers.trust(two.author)
    private = load_pem_private_key((two.folder / "key.pem").read_bytes(), None)
    key_of(7).save(tmp_path / "other.pem")
    other = load_pem_private_key((tmp_path / "other.pem").read_bytes(), None)
    for issuer in (two.author.hex(), key_of(7).public.hex()):
        found = (
            x509.CertificateBuilder()
            .subject_name(tls._name("node of somebody"))
            .issuer_name(tls._name(issuer))
            .public_key(other.public_key())  # type: ignore[arg-type]
            .serial_number(1)
            .not_valid_before(tls._FROM)
            .not_valid_after(tls._UNTIL)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .sign(private, None)  # type: ignore[arg-type]
        )
        (tmp_path / "forged.pem").write_bytes(found.public_bytes(Encoding.PEM))

        async def main() -> int:
            async with node_of(one) as node:
                context = tls.client_context(None, None, node.key)
                context.load_cert_chain(tmp_path / "forged.pem", tmp_path / "other.pem")
                reader, writer = await asyncio.open_connection("127.0.0.1", port_of(node), ssl=context)
                writer.write(b"GET /v1/lacking HTTP/1.1\r\nHost: n\r\nConnection: close\r\n\r\n")
                return (await answered(reader))[0]

        assert asyncio.run(main()) in (0, 403), issuer


def test_the_client_refuses_a_server_with_another_key(pair: tuple[Replica, Replica]) -> None:
    async def main() -> None:
        one, two = pair
        one.peers.trust(two.author)
        async with node_of(one) as node, connections() as session:
            own, other = two.folder / "key.pem", key_of(5).public
            peer = HttpPeer(session, where_of(node).url, tls.client_context(own, two.author, other))
            with pytest.raises(PeerError, match=r"key|cannot be reached"):
                await peer.lacking()
            right = HttpPeer(session, where_of(node).url, tls.client_context(own, two.author, one.author))
            await right.lacking()

    asyncio.run(main())


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2])
def test_older_versions_of_tls_are_refused(pair: tuple[Replica, Replica], version: ssl.TLSVersion) -> None:
    async def main() -> None:
        async with node_of(pair[0]) as node:
            context = context_of(node, None)
            context.minimum_version = context.maximum_version = version
            with pytest.raises((ssl.SSLError, OSError)):
                await asyncio.open_connection("127.0.0.1", port_of(node), ssl=context)
            assert (await ask(node, None, "GET", "/"))[0] == 403

    asyncio.run(main())


def test_plain_http_to_a_tls_port_gets_nothing(pair: tuple[Replica, Replica]) -> None:
    async def main() -> None:
        async with node_of(pair[0]) as node:
            reader, writer = await asyncio.open_connection("127.0.0.1", port_of(node))
            writer.write(b"POST /v1/sync HTTP/1.1\r\nHost: n\r\nContent-Length: 0\r\n\r\n")
            assert (await answered(reader))[0] == 0

    asyncio.run(main())


# ---- invitations


def test_who_is_invited_joins_with_all_that_is_there_and_stays_trusted(
    pair: tuple[Replica, Replica], tmp_path: Path
) -> None:
    async def main() -> None:
        one, _ = pair
        async with node_of(one) as node:
            joined = await begin_from_peer(tmp_path / "new", invitation(one, node), key_of(3))
            assert joined.root == one.root
            assert joined.ready() == one.ready()
            assert key_of(3).public in {peer.key for peer in one.peers.every()}
            joined.add(model(9))
            done = await sync_peer(joined, where_of(node))
            assert (done.ops_sent, done.blobs_sent > 0) == (1, True)
            assert contents(one) == contents(joined)
            assert one.ready() == joined.ready()
            joined.close()

    asyncio.run(main())


def test_an_invitation_stands_once_and_only_until_it_expires(pair: tuple[Replica, Replica], tmp_path: Path) -> None:
    async def main() -> None:
        one, _ = pair
        async with node_of(one) as node:
            used = invitation(one, node)
            (await begin_from_peer(tmp_path / "new", used, key_of(3))).close()
            for number, bad in enumerate(
                (used, invitation(one, node, -1.0), used._replace(secret=bytes(16)), used._replace(secret=b""))
            ):
                with pytest.raises(PeerError, match=r"403.*does not stand"):
                    await begin_from_peer(tmp_path / f"bad{number}", bad, key_of(4))
                assert not (tmp_path / f"bad{number}").exists()
            assert key_of(4).public not in {peer.key for peer in one.peers.every()}

    asyncio.run(main())


def test_a_message_to_join_is_good_for_one_server_and_one_key(pair: tuple[Replica, Replica]) -> None:
    async def main() -> None:
        one, two = pair
        async with node_of(one) as node, node_of(two) as other:
            secret = one.peers.invite()
            said = wire.Joining(secret, key_of(3).public).signed(key_of(3), node.key)
            assert (await ask(other, None, "POST", "/v1/join", said))[0] == 400
            forged = wire.Joining(secret, key_of(3).public).signed(key_of(4), node.key)
            assert (await ask(node, None, "POST", "/v1/join", forged))[0] == 400
            assert (await ask(node, None, "POST", "/v1/join", said))[0] == 200
            assert (await ask(node, None, "POST", "/v1/join", said))[0] == 403

    asyncio.run(main())


def test_two_who_show_one_invitation_at_once_do_not_both_join(pair: tuple[Replica, Replica]) -> None:
    async def main() -> None:
        one, _ = pair
        async with node_of(one) as node:
            secret = one.peers.invite()
            said = [wire.Joining(secret, key_of(n).public).signed(key_of(n), node.key) for n in range(3, 13)]
            answers = await asyncio.gather(*(ask(node, None, "POST", "/v1/join", one) for one in said))
            assert sorted(status for status, _ in answers) == [200] + [403] * 9

    asyncio.run(main())


@pytest.mark.parametrize(
    "text", ["http://127.0.0.1:1/#{key}.{secret}", "https://h:1/#{key}.12", "https://h:1/#x.{secret}"]
)
def test_what_is_no_invitation_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        address.invitation(text.format(key=key_of(1).public.hex(), secret="00" * 16))


# ---- trust that comes and goes


def test_trust_and_distrust_are_followed_while_the_node_runs(pair: tuple[Replica, Replica]) -> None:
    async def main() -> None:
        one, two = pair
        async with node_of(one) as node:
            assert await _status(node, two) == 0
            one.peers.trust(two.author)
            await until(lambda: _is(node, two, 200), "the key is trusted")
            reader, writer = await connected(node, two)
            writer.write(b"GET /v1/lacking HTTP/1.1\r\nHost: n\r\n\r\n")
            assert b"200" in await reader.readuntil(b"\r\n\r\n")
            one.peers.distrust(two.author)
            await until(lambda: _is(node, two, 403), "the key is trusted no longer")
            writer.write(b"GET /v1/lacking HTTP/1.1\r\nHost: n\r\nConnection: close\r\n\r\n")
            assert b" 403 " in await reader.read(), "nor over a connection that stands"
            one.peers.trust(two.author)
            await until(lambda: _is(node, two, 200), "the key is trusted again")

    asyncio.run(main())


def test_distrust_also_counts_for_a_peer_that_the_node_was_told_to_talk_to(pair: tuple[Replica, Replica]) -> None:
    async def main() -> None:
        one, two = pair
        two.peers.trust(one.author)
        async with node_of(two) as other:
            url = where_of(other).url
            one.peers.trust(two.author, url)
            async with node_of(one, peers=[url]) as node:

                async def talks() -> bool:
                    return any(contact.last_session is not None for contact in node.spread.contacts.values())

                async def is_left_alone() -> bool:
                    return not node.spread.contacts and not node.trusts(two.author)

                await until(talks, "they talk")
                one.peers.distrust(two.author)
                await until(is_left_alone, "it is left alone")
                one.peers.trust(two.author, url)
                await until(talks, "they talk again")

    asyncio.run(main())


async def _status(node: Node, client: Replica) -> int:
    try:
        return (await raw(node, client, b"GET /v1/lacking HTTP/1.1\r\nHost: n\r\nConnection: close\r\n\r\n"))[0]
    except (ssl.SSLError, OSError):
        return 0


async def _is(node: Node, client: Replica, status: int) -> bool:
    return await _status(node, client) == status


def test_keys_of_small_order_cannot_join(pair: tuple[Replica, Replica]) -> None:
    async def main() -> None:
        async with node_of(pair[0]) as node:
            small = bytes([1]) + bytes(31)
            said = wire.Joining(pair[0].peers.invite(), small).signed(Key.from_seed(bytes(32)), node.key)
            assert (await ask(node, None, "POST", "/v1/join", said))[0] == 400

    asyncio.run(main())
