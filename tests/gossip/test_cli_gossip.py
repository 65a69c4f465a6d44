"""The commands of peers: serve, sync, init --from, keys trust, distrust, invite; what they say, end with and refuse."""

from __future__ import annotations

import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from crdtmerge.pool.replica import Replica
from tests.cli.folders import document, refused, told
from tests.gossip.nodes import Served, key_of, wait_until
from tests.pool.replicas import contents, founded, model, second
from tests.resolve.running import Ran, here, process


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A replica with a contribution, and one that it trusts without."""
    with founded(tmp_path / "one", key=key_of(0)) as one, second(one, tmp_path / "two", key_of(1)) as other:
        one.add(model(1))
        one.peers.trust(other.author)
        yield one.folder, other.folder


def key(number: int) -> str:
    return key_of(number).public.hex()


def test_serve_says_first_where_it_is_reached_and_what_it_is(two: tuple[Path, Path]) -> None:
    with Served(two[0]) as node:
        assert set(node.said) == {"url", "status", "key", "pool"}
        assert node.said["url"].endswith(f"#{key(0)}")
        assert node.said["key"] == key(0)
        with Replica.open(two[0]) as replica:
            assert node.said["pool"] == replica.pool_id.hex()
        wait_until(lambda: node.report["ready_count"] == 1, "the page is there")
        assert node.report["address"] == node.url


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_node_orderly_and_leaves_nothing(two: tuple[Path, Path], number: int) -> None:
    with Served(two[0]) as node:
        group = node.process.pid
        assert node.stop(number) == 0, node.log
        assert node.log == ""
        children = [one for one in Path("/proc").iterdir() if one.name.isdigit() and _parent(one) == group]
        assert not children
    with Replica.open(two[0]) as replica:
        assert not replica._room.database.rows("SELECT * FROM leases")
        assert replica.fsck().clean


def _parent(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0


def test_a_node_goes_on_where_it_was_killed(two: tuple[Path, Path]) -> None:
    with Served(two[0]) as node:
        port = node.port
        node.kill()
        node.listen = f"127.0.0.1:{port}"
        node.start()
        assert document(_sync(two[1], node))["ops_received"] == 1
        assert node.stop() == 0


def _sync(folder: Path, node: Served, *options: str) -> Ran:
    return here("sync", node.url, "-C", folder, *(options or ("--json",)))


def test_sync_brings_both_to_one_set_and_says_what_it_did(two: tuple[Path, Path]) -> None:
    with Replica.open(two[1]) as other, Served(two[0]) as node:
        other.add(model(2))
        said = document(_sync(two[1], node))
        counted = {"rounds", "ops_sent", "ops_received", "overhead_bytes", "blobs_fetched", "bytes_fetched"}
        counted |= {"resumed_bytes", "blobs_sent", "bytes_sent", "lacking", "refused", "root"}
        assert counted <= set(said)
        assert (said["ops_sent"], said["ops_received"], said["lacking"], said["refused"]) == (1, 1, 0, 0)
        assert said["blobs_fetched"] == said["blobs_sent"] == 2, "the shared tensor is fetched with the first"
        assert said["root"] == other.root.hex()
        wait_until(lambda: node.report["root"] == said["root"], "both have one set")
        wait_until(lambda: node.report["ready_count"] == 2, "and all of it")
        again = document(_sync(two[1], node))
        assert (again["rounds"], again["ops_sent"], again["ops_received"], again["bytes_fetched"]) == (1, 0, 0, 0)
        text = told(here("sync", node.url, "-C", two[1]))
        assert "received 0 operations" in text
        assert said["root"] in text


def test_init_from_an_invitation_makes_a_replica_in_step(two: tuple[Path, Path], tmp_path: Path) -> None:
    with Served(two[0]) as node:
        plain = node.url.partition("#")[0]
        text = document(here("keys", "invite", plain, "-C", two[0], "--json"))["invitation"]
        said = document(here("init", tmp_path / "new", "--from", text, "--json"))
        assert said["ops"] == 1
        with Replica.open(two[0]) as one, Replica.open(tmp_path / "new") as new:
            assert (new.root, new.ready()) == (one.root, one.ready())
            assert new.author in {peer.key for peer in one.peers.every()}
        refused(here("init", tmp_path / "again", "--from", text), "does not stand")
        assert not (tmp_path / "again").exists()
        refused(here("init", tmp_path / "again", "--from", node.url), "is no invitation")
        assert document(here("sync", plain, "-C", tmp_path / "new", "--json"))["ops_received"] == 0


def test_an_invitation_without_a_node_behind_it_says_so(two: tuple[Path, Path], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    text = document(here("keys", "invite", f"https://127.0.0.1:{port}", "-C", two[0], "--json"))["invitation"]
    refused(here("init", tmp_path / "new", "--from", text), "cannot be reached")
    assert not (tmp_path / "new").exists()


def test_trust_is_shown_and_taken_back(two: tuple[Path, Path]) -> None:
    told(here("keys", "trust", key(2), "--url", "https://127.0.0.1:7", "-C", two[0]))
    keys = document(here("keys", "show", "-C", two[0], "--json"))["keys"]
    assert {"key": key(2), "rank": "member", "trusted": True, "url": "https://127.0.0.1:7"} in [
        {**one, "rank": "member"} for one in keys
    ]
    told(here("keys", "distrust", key(2), "-C", two[0]))
    refused(here("keys", "distrust", key(2), "-C", two[0]), "not trusted here")
    refused(here("keys", "trust", "zz", "-C", two[0]), "no public key")
    refused(here("keys", "trust", key(2), "--url", "https://h/path", "-C", two[0]), "no address")


def test_distrust_stops_a_peer_of_a_running_node(two: tuple[Path, Path]) -> None:
    with Served(two[0]) as node:
        document(_sync(two[1], node))
        told(here("keys", "distrust", key(1), "-C", two[0]))
        wait_until(lambda: _sync(two[1], node).code == 2, "it is refused")
        told(here("keys", "trust", key(1), "-C", two[0]))
        wait_until(lambda: _sync(two[1], node).code == 0, "it is let in again")


def test_what_cannot_be_is_refused_in_one_line(two: tuple[Path, Path], tmp_path: Path) -> None:
    one, other = two
    refused(process("serve", "-C", tmp_path), "is not a replica")
    refused(here("sync", "https://127.0.0.1:1", "-C", other), "whose key?")
    refused(here("sync", "http://192.0.2.1:1", "-C", other), "plain HTTP")
    refused(process("serve", "-C", one, "--listen", "http://0.0.0.0:0", "--status", "off"), "plain HTTP")
    refused(process("serve", "-C", one, "--peer", "https://127.0.0.1:1"), "whose key?")
    refused(process("serve", "-C", one, "--peer", "https://127.0.0.1:99999#" + key(1)), "ort")
    refused(process("serve", "-C", one, "--key-quota", "much"), "no size")
    refused(here("sync", f"https://127.0.0.1:1#{key(1)}", "-C", other), "cannot be reached")
    refused(here("keys", "invite", "http://127.0.0.1:1", "-C", one), "need TLS")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused(process("serve", "-C", one, "--listen", f"127.0.0.1:{port}", "--status", "off"), "cannot listen")
        refused(process("serve", "-C", one, "--listen", "127.0.0.1:0", "--status", f"127.0.0.1:{port}"), "--status")
    with Replica.open(one) as replica:
        assert not replica._room.database.rows("SELECT * FROM leases")


def test_a_peer_with_another_key_is_refused(two: tuple[Path, Path]) -> None:
    with Served(two[0]) as node:
        plain = node.url.partition("#")[0]
        refused(here("sync", f"{plain}#{key(3)}", "-C", two[1]), "does not hold the key")


def test_peers_of_different_pools_refuse_each_other(two: tuple[Path, Path], tmp_path: Path) -> None:
    with founded(tmp_path / "else", recipe="linear", key=key_of(1)) as other, Served(two[0]) as node:
        refused(here("sync", node.url, "-C", other.folder), "this is pool")
        assert not contents(other)


def test_plain_http_on_loopback_works_between_two(two: tuple[Path, Path]) -> None:
    with Served(two[0], listen="http://127.0.0.1:0") as node:
        assert node.url.startswith("http://127.0.0.1:")
        assert "#" not in node.url
        assert document(_sync(two[1], node))["ops_received"] == 1


def test_a_node_whose_task_ends_by_a_fault_of_ours_ends_too(two: tuple[Path, Path]) -> None:
    import asyncio

    from crdtmerge.gossip.node import Node

    async def main() -> None:
        with Replica.open(two[0]) as replica:
            async with Node(replica, listen=None) as node:

                async def broken() -> None:
                    raise ZeroDivisionError

                node.spread.look = broken  # type: ignore[method-assign]
                async with asyncio.timeout(60):
                    with pytest.raises(ZeroDivisionError):
                        await node.stopped()

    asyncio.run(main())


def test_the_page_of_a_node_is_for_this_machine_alone(two: tuple[Path, Path]) -> None:
    with Served(two[0]) as node:
        wait_until(lambda: node.report["ops"] == 1, "it is there")
        request = urllib.request.Request(f"{node.said['status']}/api/status", headers={"Host": "elsewhere.example"})
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(request, timeout=60)
