"""Simulated networks: the production code of gossip under virtual time, with everything that can go wrong, from a seed.

    python -m crdtmerge.testing.simulation --seed N [--nodes N] [--ops N] [--verbose]       replays one run
    python -m crdtmerge.testing.simulation --seeds 0:2000 --workers 2 [--json]               runs many and counts
    python -m crdtmerge.testing.simulation --epidemic 1000                                   rounds until all know

A run: honest nodes and liars write, while messages are lost, late, doubled, damaged or kept from passing, nodes crash,
start again and come back from old copies. Then the network heals, all must come to one set, and ``agreement`` looks at
it.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from random import Random
from typing import Any

from crdtmerge.gossip.spread import BAN_SECONDS, REDIAL_SECONDS_MAX
from crdtmerge.replica import op as signing
from crdtmerge.replica.opset import OpSet
from crdtmerge.testing import payloads, virtual_time
from crdtmerge.testing.agreement import check_agreement, check_one_round, check_running
from crdtmerge.testing.byzantine import Liar
from crdtmerge.testing.epidemic import epidemic
from crdtmerge.testing.virtual_network import Network, Weather
from crdtmerge.testing.virtual_node import Node

UNREST_SECONDS = 60.0
"""How long things go wrong."""

CALM_SECONDS = 4 * REDIAL_SECONDS_MAX
"""How soon all must agree once nothing goes wrong any more; those who were banned get ``BAN_SECONDS`` more."""

LOOK_SECONDS = 2.0
"""Between two looks whether they do."""

REMEMBERED = 1 << 14

Event = Callable[[], None]


@dataclass
class Outcome:
    """What a run came to. ``opsets`` are the honest nodes' own."""

    seed: int
    digest: str
    counts: Counter[str]
    trace: list[str] = field(repr=False)
    opsets: list[OpSet] = field(repr=False)


class Simulation:
    """One run."""

    def __init__(self, seed: int, *, nodes: int | None = None, ops: int | None = None, calm: bool = False) -> None:
        self.seed, self.random, self.trace, self.calm = seed, Random(seed), list[str](), calm
        self.options = "".join(f" --{name} {value}" for name, value in (("nodes", nodes), ("ops", ops)) if value)
        random = self.random
        self.network = Network(Random(f"network {seed}"), self.note)
        count = nodes or random.randint(5, 7)
        liars = 0 if calm else min(random.choice((0, 0, 1, 1, 2)), count - 2)
        self.contents = payloads.contents(large=random.random() < 0.1)
        founders = random.choice((0, 0, 1, 2, 3))
        self.genesis = payloads.pool(founders, members_only=founders > 0 and random.random() < 0.5)
        self.ops = ops or random.choice((30, 40, 60, 60))
        self.counts: Counter[str] = Counter()
        self.nodes = self._people(count, liars)
        self.honest = [node for node in self.nodes if node.honest]

    def note(self, who: str, what: str) -> None:
        """Write a line of the trace."""
        self.trace.append(f"{asyncio.get_running_loop().time():9.3f} {who:8} {what}")

    def run(self) -> Outcome:
        """All of it, with every check. What is raised tells how to replay it."""
        try:
            with remembering():
                return virtual_time.run(self._run())
        except BaseException as fault:
            asked = f"--seed {self.seed}{self.options} --verbose"
            fault.add_note(f"replay with: python -m crdtmerge.testing.simulation {asked}")
            raise

    # ---- who and what

    def _people(self, count: int, liars: int) -> list[Node]:
        """Nodes in a ring with some more links; the honest among them are linked without the liars."""
        random, owners = self.random, list(payloads.keys(count))
        random.shuffle(owners)
        names = [f"node-{at}" for at in range(count - liars)] + [f"liar-{at}" for at in range(liars)]
        honest, peers = names[: count - liars], {name: dict[str, None]() for name in names}
        for at, name in enumerate(honest):
            peers[name][honest[at - 1]] = None
        for name in names:
            for other in random.sample(names, 1 if name in honest else count - 1):
                if other != name:
                    peers[name][other] = None
        found = []
        for name, key in zip(names, owners, strict=True):
            kind = Node if name in honest else Liar
            source = Random(f"{name} {self.seed}")
            found.append(kind(name, key, self.genesis, self.network, source, tuple(peers[name]), self.contents))
        return found

    def _weather(self) -> Weather:
        random = self.random
        return Weather(
            random.choice((0.0, 0.05, 0.2, 0.5)),
            random.choice((0.0, 0.1, 0.2)),
            random.choice((0.0, 0.0, 0.0, 0.02)),
            random.choice((0.02, 0.2, 1.0)),
        )

    def _plan(self) -> list[tuple[float, Event]]:
        """What happens when."""
        random, what = self.random, list[Event]()
        left = self.ops
        while left > 0:
            count = min(left, random.choice((1, 1, 2, 4, 8)))
            left -= count
            what.append(partial(self._write, random.choice(self.honest), count))
        if not self.calm:
            for node in self.honest:
                what += [node.disk.back_up] * random.choice((1, 1, 2))
                what += [partial(self._crash_soon, node)] * random.choice((0, 0, 1, 2))
                what += [partial(self._restore, node)] * random.choice((0, 0, 1))
            what += [self._part] * random.choice((0, 1, 2, 4))
            what += [partial(self._state, node) for node in random.sample(self.honest, 2)]
            what += [node.lie for node in self.nodes if isinstance(node, Liar) for _ in range(random.randint(4, 16))]
        times = sorted(random.uniform(0, UNREST_SECONDS) for _ in what)
        random.shuffle(what)
        return list(zip(times, what, strict=True))

    # ---- what happens

    async def _run(self) -> Outcome:
        loop = asyncio.get_running_loop()
        if not self.calm:
            self.network.weather = self._weather()
            for node in self.honest:
                node.flush_seconds = self.random.choice((0.0, 0.01, 0.2))
                self.network.seconds[node.name] = self.random.choice((0.0, 0.01, 0.1, 1.5))
        for node in self.nodes:
            node.start()
        self._admit()
        for at, event in self._plan():
            await asyncio.sleep(at - loop.time())
            check_running(self.honest)
            event()
        self.heal()
        healed = loop.time()
        await self._agreement()
        self.counts["calm seconds"] = math.ceil(loop.time() - healed)
        check_agreement(self.honest, self.random)
        await check_one_round(*self.random.sample(self.honest, 2))
        return self._outcome()

    def _admit(self) -> None:
        """Where only members may write, the first founder lets most of the others in."""
        if self.genesis.membership == "open":
            return
        founder = next(node for node in self.nodes if node.key.public == self.genesis.curators[0])
        others = [node.key for node in self.nodes if node.key.public not in self.genesis.curators]
        grants = iter(payloads.grants(others))
        founder.spawn(founder.write(lambda *_: next(grants), len(others)))

    def _write(self, node: Node, count: int) -> None:
        if node.up:
            node.spawn(node.write(partial(payloads.payload, about=self.contents), count))

    def _write_at_once(self, node: Node) -> None:
        """Mostly a node that has just started writes before it hears from anybody what it wrote before."""
        if self.random.random() < 0.9:
            self._write(node, 1)

    def _state(self, node: Node) -> None:
        if node.up:
            node.state()

    def _crash_soon(self, node: Node) -> None:
        """A node crashes, often while it writes."""
        if self.random.random() < 0.7:
            self._write(node, self.random.choice((1, 2, 3)))
        soon = self.random.expovariate(1 / (node.flush_seconds + 0.001))
        asyncio.get_running_loop().call_later(soon, self._crash, node)

    def _crash(self, node: Node) -> None:
        if self.calm or not node.up:
            return
        lost = node.crash()
        self.counts["lost writes"] += lost
        self.note(node.name, f"crashes{' and loses a write' if lost else ''}")
        asyncio.get_running_loop().call_later(self.random.expovariate(1 / 5), self._start, node)

    def _start(self, node: Node) -> None:
        if not node.up:
            node.start()
            self.note(node.name, f"starts with {len(node.opset)} operations")
            self._write_at_once(node)

    def _restore(self, node: Node) -> None:
        """An old copy is put back; what only this node had is gone, and nobody can ask for it."""
        if not node.disk.copies:
            return
        if node.up:
            node.crash()
        elsewhere = self.random.random() < 0.5
        node.disk.restore(
            self.random.choice(node.disk.copies), elsewhere=elsewhere, forgetful=self.random.random() < 0.3
        )
        node.start()
        self.counts["restores"] += 1
        self.note(node.name, f"comes back from a copy with {len(node.opset)} operations")
        self._write_at_once(node)
        for author in self.honest:
            for one in [one for one in author.acknowledged if not any(self._has(other, one) for other in self.honest)]:
                del author.acknowledged[one]
                self.counts["lost to old copies"] += 1

    @staticmethod
    def _has(node: Node, identity: bytes) -> bool:
        return node.disk.commit.tables.has("ops", identity)

    def _part(self) -> None:
        """The network falls apart for a while; perhaps messages still pass in one direction."""
        names = [node.name for node in self.nodes]
        side = set(self.random.sample(names, self.random.randint(1, len(names) - 1)))
        both = self.random.random() < 0.6
        cut = [
            (one, other)
            for one in names
            for other in names
            if (one in side) != (other in side) and (both or one in side)
        ]
        self.counts["partitions"] += 1
        self.network.blocked |= set(cut)
        self.note("network", f"parts {'' if both else 'one way '}{' '.join(name for name in names if name in side)}")
        asyncio.get_running_loop().call_later(self.random.uniform(2, 30), self._join_up, cut)

    def _join_up(self, cut: Sequence[tuple[str, str]]) -> None:
        self.network.blocked -= set(cut)

    def heal(self) -> None:
        """From now on nothing goes wrong but what liars do."""
        self.note("network", "heals")
        self.calm = True
        self.network.weather = Weather(late_seconds=0.02)
        self.network.blocked.clear()
        self.network.seconds.clear()
        for node in self.honest:
            self._start(node)

    # ---- checks

    async def _agreement(self) -> None:
        """Wait until all honest nodes have one set, as long as that may take."""
        loop = asyncio.get_running_loop()
        banned = any(one.banned_until for node in self.honest for one in node.spread.contacts.values())
        last = loop.time() + CALM_SECONDS + banned * BAN_SECONDS
        while len({node.opset.heads() for node in self.honest}) > 1 or self._writing():
            check_running(self.honest)
            have = {node.name: len(node.opset) for node in self.honest}
            assert loop.time() < last, f"the honest nodes do not come to one set: {have}"
            await asyncio.sleep(LOOK_SECONDS)

    def _writing(self) -> bool:
        """Whether something is under way on a disk."""
        return any(node.disk.unflushed is not None for node in self.honest)

    def _outcome(self) -> Outcome:
        """What it came to."""
        for node in self.nodes:
            self.counts.update(node.counts)
        self.counts.update(self.network.counts)
        self.counts["ops"], self.counts["forks"] = len(self.honest[0].opset), len(self.honest[0].opset.forks())
        self.counts["acknowledged"] = sum(len(node.acknowledged) for node in self.honest)
        self.counts["virtual seconds"] = round(asyncio.get_running_loop().time())
        end = f"{self.honest[0].opset.state_root.hex()} {sorted(self.counts.items())}"
        found = hashlib.sha256("\n".join([*self.trace, end]).encode()).hexdigest()
        return Outcome(self.seed, found, self.counts, self.trace, [node.opset for node in self.honest])


@contextmanager
def remembering() -> Iterator[None]:
    """Within it a process reads an operation and verifies a signature once, and not once for each of its nodes."""
    names = ("verify", "_parsed")
    kept = {name: getattr(signing, name) for name in names}
    for name in names:
        setattr(signing, name, lru_cache(REMEMBERED)(kept[name]))
    try:
        yield
    finally:
        for name in names:
            setattr(signing, name, kept[name])


# ---- many runs


def counted(seed: int, **options: Any) -> tuple[int, Counter[str], str | None]:
    """A seed, what a run of it counted, and what went wrong."""
    try:
        return seed, Simulation(seed, **options).run().counts, None
    except Exception as fault:  # noqa: BLE001 - whatever ends a run is what was looked for
        return seed, Counter(), f"{type(fault).__name__}: {fault}"


COLUMNS = (
    *("ops", "acknowledged", "forks", "sessions", "messages", "lost", "damaged", "crashes", "lost writes"),
    *("restores", "lost to old copies", "partitions", "lies", "forged", "bans"),
)


def many(seeds: range, workers: int, **options: Any) -> dict[str, Any]:
    """Runs of many seeds, counted together."""
    began, total, failed = time.perf_counter(), Counter[str](), dict[int, str]()
    with ProcessPoolExecutor(workers) as processes:
        for seed, counts, fault in processes.map(partial(counted, **options), seeds, chunksize=16):
            total.update(counts)
            if fault is not None:
                failed[seed] = fault
    return {
        "seeds": f"{seeds.start}:{seeds.stop}",
        "runs": len(seeds),
        **{name: total[name] for name in COLUMNS},
        "virtual hours": round(total["virtual seconds"] / 3600, 1),
        "seconds": round(time.perf_counter() - began, 1),
        "failed": {str(seed): fault for seed, fault in failed.items()},
    }


def main() -> int:
    """Replay a seed, or run many."""
    parser = argparse.ArgumentParser(prog="python -m crdtmerge.testing.simulation")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--seeds", default="0:100", metavar="FIRST:END")
    parser.add_argument("--nodes", type=int)
    parser.add_argument("--ops", type=int)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--epidemic", type=int, metavar="NODES")
    parser.add_argument("--verbose", action="store_true", help="print the trace of --seed")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    if asked.nodes is not None and asked.nodes < 2:
        parser.error("--nodes: at least 2")
    if asked.epidemic:
        _say(f"{asked.epidemic} nodes: all know after {epidemic(asked.epidemic, asked.seed or 0)} rounds")
        return 0
    if asked.seed is not None:
        return _replay(Simulation(asked.seed, nodes=asked.nodes, ops=asked.ops), verbose=asked.verbose)
    first, end = map(int, asked.seeds.split(":"))
    found = many(range(first, end), asked.workers, nodes=asked.nodes, ops=asked.ops)
    if asked.json:
        _say(json.dumps(found, indent=2))
    else:
        for name, value in found.items():
            _say(f"{name:20} {value if name != 'failed' else len(value)}")
        for seed, fault in found["failed"].items():
            _say(f"seed {seed}: {fault}")
    return 1 if found["failed"] else 0


def _replay(simulation: Simulation, *, verbose: bool) -> int:
    try:
        outcome = simulation.run()
    finally:
        if verbose:
            _say("\n".join(simulation.trace))
    _say(f"seed {outcome.seed}: {outcome.digest}")
    for name, value in sorted(outcome.counts.items()):
        _say(f"{name:20} {value}")
    return 0


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
