"""Nodes in processes of their own, over TLS, in a graph drawn from a seed: one root and one digest in the end."""

from __future__ import annotations

import json
import random
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from crdtmerge.pool.replica import Replica
from crdtmerge.testing.digits import FAVOURED, load, mix, train
from tests.gossip.nodes import Served, key_of, replicas, wait_until
from tests.gossip.proxy import FLAKY, NONE, Faults, Proxies, Proxy
from tests.resolve.running import here

DEGREE = 3


class Network:
    """A pool of so many replicas, a node of each, and a proxy before each edge of a graph of degree 3."""

    def __init__(self, root: Path, seed: int, count: int, faults: Faults) -> None:
        self.root, self.count, self.faults = root, count, faults
        self.random = random.Random(seed)
        self.nodes: list[Served] = []
        self.proxies = Proxies(seed)
        self.edges: dict[tuple[int, int], Proxy] = {}
        self._opened = ExitStack()
        self.models = trained(root, count + 4)

    def __enter__(self) -> Network:
        with ExitStack() as opened:
            opened.enter_context(self.proxies)
            folder = self.root / "replica0"
            key_of(0).save(self.root / "key.pem")
            base, settings = self.models.pop(), ("--strategy", "ties", "--set", "density=0.5")
            _done("init", folder, "--base", base, *settings, "--key", self.root / "key.pem")
            first = opened.enter_context(Replica.open(folder))
            with replicas(self.root, first, self.count) as found:
                self.folders = [one.folder for one in found]
            self._draw()
            for number, folder in enumerate(self.folders):
                peers = [f"https://127.0.0.1:{self.edges[edge].port}" for edge in self.edges if edge[0] == number]
                options = [word for peer in peers for word in ("--peer", peer)]
                out = self.root / f"out{number}"
                self.nodes.append(opened.enter_context(Served(folder, *options, "--period", "0.5", "--resolve", out)))
            for (_, to), proxy in self.edges.items():
                proxy.target = ("127.0.0.1", self.nodes[to].port)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    def _draw(self) -> None:
        """Each dials some others, in a connected graph, and both sides trust each other."""
        while not self.edges or not self._is_connected():
            self.edges = {
                (one, other): Proxy(NONE, self.random)
                for one in range(self.count)
                for other in self.random.sample([n for n in range(self.count) if n != one], DEGREE)
            }
        for one, other in self.edges:
            proxy = self.edges[one, other] = self.proxies.open(faults=self.faults)
            keys = [key_of(number).public.hex() for number in (one, other)]
            _done("keys", "trust", keys[1], "--url", f"https://127.0.0.1:{proxy.port}", "-C", self.folders[one])
            _done("keys", "trust", keys[0], "-C", self.folders[other])

    def _is_connected(self) -> bool:
        near, todo = {0}, [0]
        while todo:
            at = todo.pop()
            new = {other for edge in self.edges if at in edge for other in edge} - near
            near |= new
            todo += new
        return len(near) == self.count

    def add(self, number: int) -> str:
        """Add the next model at a node, from another process; its content."""
        done = _done("add", self.models.pop(), "-C", self.folders[number], "--json")
        content: str = json.loads(done)["id"]
        return content

    def remove(self, number: int, content: str) -> None:
        """Remove a model at a node."""
        _done("remove", content, "-C", self.folders[number])

    def part(self) -> None:
        """Cut all edges between the two halves."""
        half = self.count // 2
        self.proxies.cut([proxy for edge, proxy in self.edges.items() if (edge[0] < half) != (edge[1] < half)])

    def heal(self) -> None:
        """Let all through again."""
        self.proxies.heal(self.edges.values())

    def settle(self, visible: set[str]) -> None:
        """Wait until all nodes have one set, all of it, and have merged it to the same bytes."""

        def settled() -> bool:
            reports = [node.report for node in self.nodes]
            return (
                all({one["id"] for one in report["visible"]} == visible for report in reports)
                and all(report["ready_count"] == len(visible) for report in reports)
                and len({report["state_root"] for report in reports}) == 1
                and all(report["merged"]["state"] == "current" for report in reports)
                and len({report["merged"]["merge_id"] for report in reports}) == 1
            )

        begin = time.perf_counter()
        try:
            wait_until(settled, "all nodes have one set and have merged it", seconds=300)
        except AssertionError as fault:
            keep = ("root", "visible_count", "ready_count", "merged", "warnings")
            fault.add_note("\n".join(str({name: node.report[name] for name in keep}) for node in self.nodes))
            raise
        print(
            f"{self.count} nodes have one set and one digest {time.perf_counter() - begin:.1f} s after the last change"
        )
        digests = {node.report["merged"]["output_digest"] for node in self.nodes}
        receipts = [json.loads((self.root / f"out{n}" / "receipt.json").read_text()) for n in range(self.count)]
        assert {receipt["output_digest"] for receipt in receipts} == digests
        assert len(digests) == 1
        assert not any(node.report["disagreements"] for node in self.nodes)


def trained(root: Path, count: int) -> list[Path]:
    """Small networks: fine-tunes of one base, the base the last."""
    digits = load()
    base = train(None, digits.train_x[:200], digits.train_y[:200], epochs=2, seed=1)
    found = []
    for number in range(count):
        seen = mix(digits, FAVOURED[number % 3], 0.1, number)[:200]
        state = train(base, digits.train_x[seen], digits.train_y[seen], epochs=1, seed=number, rate=0.02)
        found.append(_saved(root / f"ft{number}.safetensors", state))
    return [*found, _saved(root / "base.safetensors", base)]


def _saved(path: Path, state: dict[str, torch.Tensor]) -> Path:
    save_file(state, path)
    return path


def _done(*arguments: object) -> str:
    done = here(*arguments)
    assert done.code == 0, done
    return done.out


def check_network(root: Path, seed: int, count: int, faults: Faults) -> None:
    """All come together, are parted, write on both sides, meet again and come together again."""
    with Network(root, seed, count, faults) as network:
        added = [network.add(number) for number in range(count)]
        network.settle(set(added))
        if faults is FLAKY:
            assert sum(proxy.broken for proxy in network.edges.values()), "the network is bad"
        network.part()
        more = [network.add(number) for number in (0, count - 1, 1)]
        network.remove(0, added[0])
        network.remove(count - 1, added[count - 1])
        network.heal()
        network.settle({*added, *more} - {added[0], added[count - 1]})
        for node in network.nodes:
            assert node.stop() == 0, node.log
            assert "Traceback" not in node.log, node.log
        for folder in network.folders:
            _done("fsck", "-C", folder)


@pytest.mark.parametrize(("seed", "faults"), [(1, NONE), (2, FLAKY)], ids=["calm", "flaky"])
def test_five_nodes_come_to_one_root_and_one_digest(tmp_path: Path, seed: int, faults: Faults) -> None:
    check_network(tmp_path, seed, 5, faults)


@pytest.mark.soak
@pytest.mark.parametrize("faults", [NONE, FLAKY], ids=["calm", "flaky"])
@pytest.mark.parametrize("seed", range(3))
def test_twenty_nodes_come_to_one_root_and_one_digest(tmp_path: Path, seed: int, faults: Faults) -> None:
    check_network(tmp_path, seed, 20, faults)
