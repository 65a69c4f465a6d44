"""Simulated networks end in agreement, whatever went wrong: faults of the network, disks, crashes, old copies, liars.

Soak: 20,000 runs. CRDTMERGE_SOAK_SEEDS=FIRST-LAST names their seeds.
"""

from __future__ import annotations

import asyncio
import math
import os
import subprocess
import sys
from collections import Counter

import pytest

from crdtmerge.gossip.holding import Holding
from crdtmerge.replica.opset import OpSet
from crdtmerge.testing import virtual_time
from crdtmerge.testing.epidemic import epidemic
from crdtmerge.testing.simulation import LOOK_SECONDS, UNREST_SECONDS, Outcome, Simulation
from tests.gossip.simulation_mutants import MUTANTS, QUICK, survived
from tests.replica.naive import Naive

CHUNK, SAMPLE = 25, 300
"""Runs of each test, and of all of them in ``make test``; raise it for more."""

SOAK_FIRST, SOAK_LAST = map(int, os.environ.get("CRDTMERGE_SOAK_SEEDS", "1000-20999").split("-"))
SOAK_CHUNK = 250


def checked(seed: int) -> Outcome:
    """A run with all its checks, and the oracle's."""
    outcome = Simulation(seed).run()
    check_oracle(outcome.opsets[-1])
    return outcome


def check_oracle(one: OpSet) -> None:
    """A set says what the rules say of its operations."""
    oracle = Naive(one.genesis, one.ops())
    assert set(one.heads()) == oracle.heads
    assert [entry.id for entry in one.visible()] == sorted(oracle.visible)
    assert {entry.id: entry.adders for entry in one.visible()} == {
        content: said["adders"] for content, said in oracle.visible.items()
    }
    assert {op.id for content in one.contents() for op in one.live(content)} == oracle.live
    assert {op.id for op in one.ops() if one.is_void(op.id)} == oracle.void
    assert {(fork.one.id, fork.other.id) for fork in one.forks()} == oracle.forks
    assert one.recipe == oracle.recipe


@pytest.mark.parametrize("first", range(0, SAMPLE, CHUNK))
def test_honest_nodes_agree_whatever_went_wrong(first: int) -> None:
    for seed in range(first, first + CHUNK):
        checked(seed)


@pytest.mark.soak
@pytest.mark.parametrize("first", range(SOAK_FIRST, SOAK_LAST + 1, SOAK_CHUNK))
def test_honest_nodes_agree_in_thousands_of_runs(first: int) -> None:
    for seed in range(first, min(first + SOAK_CHUNK, SOAK_LAST + 1)):
        checked(seed)


WANTED = {
    *("crashes", "lost writes", "restores", "lost to old copies", "partitions", "forks", "lies", "forged", "bans"),
    *("lost", "damaged", "doubled", "manifest", "given"),
}


def test_runs_hold_all_that_can_go_wrong() -> None:
    held: Counter[str] = Counter()
    for seed in range(SAMPLE):
        held += checked(seed).counts
        if held.keys() >= WANTED:
            return
    assert held.keys() >= WANTED


def test_a_seed_is_one_run_on_every_hash_seed() -> None:
    program = (
        "from crdtmerge.testing.simulation import Simulation\nfor seed in (3, 4): print(Simulation(seed).run().digest)"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
        ).stdout
        for hash_seed in ("0", "1", "4711")
    }
    assert len(said) == 1
    assert len(set(said.pop().split())) == 2, "another seed is another run"


def test_a_failure_says_how_to_replay_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Holding, "take", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError) as caught:
        Simulation(5).run()
    assert caught.value.__notes__ == ["replay with: python -m crdtmerge.testing.simulation --seed 5 --verbose"]


@pytest.mark.parametrize("seed", range(3))
def test_where_nothing_goes_wrong_news_are_everywhere_at_once(seed: int) -> None:
    counts = Simulation(seed, calm=True).run().counts
    assert counts["calm seconds"] <= LOOK_SECONDS
    assert counts["bans"] == counts["crashes"] == counts["lost"] == counts["damaged"] == 0


@pytest.mark.parametrize(("nodes", "seed"), [(2, 0), (50, 0), (50, 1), (1000, 0)])
def test_an_operation_is_everywhere_after_few_rounds(nodes: int, seed: int) -> None:
    assert epidemic(nodes, seed) <= math.ceil(math.log2(nodes)) + 4


@pytest.mark.parametrize("name", QUICK)
def test_a_fault_is_caught_soon(name: str) -> None:
    assert survived(MUTANTS[name], seeds=100) is not None


@pytest.mark.soak
@pytest.mark.parametrize("name", MUTANTS)
def test_every_fault_is_caught(name: str) -> None:
    assert survived(MUTANTS[name]) is not None


def test_virtual_time_runs_from_timer_to_timer() -> None:
    async def sleeper(seconds: float) -> None:
        await asyncio.sleep(seconds)
        woken.append(asyncio.get_running_loop().time())

    async def all_of_them() -> None:
        tasks = [asyncio.create_task(sleeper(seconds)) for seconds in (3600, 1, UNREST_SECONDS)]
        await tasks[0]

    woken: list[float] = []
    virtual_time.run(all_of_them())
    assert woken == [1.0, UNREST_SECONDS, 3600.0]


def test_virtual_time_does_not_wait_for_ever() -> None:
    async def waits() -> None:
        await asyncio.Event().wait()

    with pytest.raises(AssertionError, match="nothing is ready"):
        virtual_time.run(waits())
