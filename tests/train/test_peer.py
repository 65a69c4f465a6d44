"""One peer among others: rounds without a barrier, one visible content an author, equal sets equal bytes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from crdtmerge.errors import InputError, UsageError
from crdtmerge.recipe import Recipe
from crdtmerge.state import Delta
from crdtmerge.train.facts import Facts
from crdtmerge.train.peer import Peer, distance
from crdtmerge.train.pool import load, own, seen
from crdtmerge.train.rounds import consensus_error, exchange, spread
from crdtmerge.train.rules import everyone, neighbours, oneself, sampled
from crdtmerge.train.sampling import order
from crdtmerge.train.topology import full, ring
from crdtmerge.train.weighing import Weighing
from tests.train.models import constant, hear_all, memory, peers, pools, still, towards


def value(peer: Peer) -> float:
    return float(peer.model["w"][0])


def test_a_round_replaces_the_own_contribution_in_one_operation() -> None:
    (pool,) = pools(1)
    peer = Peer(pool, constant(0.0), towards(8.0))
    for number in range(4):
        peer.round()
        assert len(pool.state.visible) == 1
        assert len(list(pool.opset.ops())) == number + 1
        assert peer.facts.round == seen(pool)[pool.author].facts.round == number + 1
    assert value(peer) == 7.5


def test_contributing_the_same_again_leaves_one_content() -> None:
    (pool,) = pools(1)
    peer = Peer(pool, constant(1.0), still)
    for _ in range(3):
        peer.round()
    assert len(pool.state.visible) == 1
    assert own(pool) == (pool.state.visible[0].id,)
    assert len(pool.opset.live(pool.state.visible[0].id)) == 1


def test_any_order_of_gossip_gives_the_same_bytes() -> None:
    results = set()
    for pairs in itertools.islice(itertools.permutations(itertools.permutations(range(3), 2)), 0, 700, 120):
        members = peers(3)
        for _ in range(3):
            for i, j in pairs:
                memory(members[i]).hear(memory(members[j]).state)
        assert len({peer.pool.root for peer in members}) == 1
        results |= {peer.final_merge().receipt.output_digest for peer in members}
    assert len(results) == 1


def test_two_authors_of_one_content_count_twice() -> None:
    first, second, third = peers(3)
    second.adopt(constant(0.0))
    second.contribute()
    hear_all([first, second, third])
    assert len(memory(first).state.visible) == 2
    merged = first.final_merge()
    assert merged["w"].tolist() == [2 / 3] * 3


def test_shares_are_the_row_of_the_matrix_and_an_absent_neighbours_stays_with_oneself() -> None:
    members = peers(5)
    keys = [peer.pool.author for peer in members]
    for peer in members:
        peer.rule = neighbours(ring(5).metropolis(), keys)
    exchange(members, full(5))
    third = Fraction(10**18 // 3, 10**18)
    assert members[0].shares(members[0].there()) == {keys[0]: 1 - 2 * third, keys[1]: third, keys[4]: third}
    alone = {key: one for key, one in members[0].there().items() if key != keys[4]}
    assert members[0].shares(alone) == {keys[0]: 1 - third, keys[1]: third}
    members[0].mix()
    assert value(members[0]) == pytest.approx((0 + 1 + 4) / 3)


def test_late_peers_are_weighed_and_lost_ones_drop_out() -> None:
    members = peers(3, weighing=Weighing(staleness=1), patience=3)
    hear_all(members)
    first, second, third = members
    for _ in range(3):
        first.step()
    hear_all(members)
    second.facts = Facts(2)
    second.contribute()
    hear_all(members)
    keys = [peer.pool.author for peer in members]
    assert first.shares(first.there()) == {keys[0]: 1, keys[1]: Fraction(1, 2), keys[2]: Fraction(1, 4)}
    first.step()
    assert first.shares(first.there()) == {keys[0]: 1, keys[1]: Fraction(1, 3)}, "third is four rounds behind"
    assert third.shares(third.there()) == dict.fromkeys(keys, Fraction(1)), "nobody is behind third"


def test_who_rarely_takes_part_counts_more_when_it_does() -> None:
    first, second = peers(2, weighing=Weighing(participation=50))
    for _ in range(3):
        first.step()
    second.facts = Facts(3)
    second.contribute()
    hear_all([first, second])
    keys = [first.pool.author, second.pool.author]
    assert first.shares(first.there()) == {keys[0]: 1, keys[1]: 2}, "rounds 0 and 3: intervals of 1 and 3"


def test_a_final_merge_leaves_nobody_out_whose_tensors_are_on_their_way() -> None:
    first, second = peers(2)
    delta = memory(second).state.delta_since(())
    memory(first).state |= Delta(delta.genesis, delta.ops, replace(delta.holdings, tensors={}))
    assert set(first.there()) == {first.pool.author}
    assert first.mix() is None
    with pytest.raises(InputError, match="announced"):
        first.final_merge()


def test_who_comes_back_counts_again_and_who_stops_goes_on_from_its_last() -> None:
    first, second = peers(2, patience=1)
    for _ in range(3):
        first.round()
    memory(first).hear(memory(second).state)
    assert first.mix() is None, "second is too far behind"
    resumed = Peer(memory(first), None, towards(1.0))
    assert resumed.facts.round == 3
    assert torch.equal(resumed.model["w"], first.model["w"])
    second.facts = Facts(3)
    second.contribute()
    memory(first).hear(memory(second).state)
    assert first.mix() is not None
    assert value(first) == 0.5


def test_a_ring_without_a_barrier_agrees_on_the_optimum_of_all() -> None:
    targets = [0.0, 1.0, 2.0, 3.0, 9.0]
    ring_pools = pools(5)
    keys = [pool.author for pool in ring_pools]
    rule = neighbours(ring(5).metropolis(), keys)
    members = [Peer(p, constant(0.0), towards(t, 0.1), rule=rule) for p, t in zip(ring_pools, targets, strict=True)]
    for number in range(36):
        for i, peer in enumerate(members):
            if (number + i) % 3:  # each misses every third round
                peer.round()
                for j in ((i + 1) % 5, (i - 1) % 5):
                    memory(members[j]).hear(memory(peer).state)
    values = [value(peer) for peer in members]
    assert all(abs(v - 3.0) < 1.0 for v in values)
    assert consensus_error([peer.model for peer in members]) < 1.0


def test_gossip_alone_brings_a_ring_to_the_mean() -> None:
    members = peers(5)
    rule = neighbours(ring(5).metropolis(), [peer.pool.author for peer in members])
    before = consensus_error([peer.model for peer in members])
    for peer in members:
        peer.rule = rule
    for _ in range(12):
        exchange(members, ring(5))
        for peer in members:
            peer.mix()
        for peer in members:
            peer.contribute()
    after = consensus_error([peer.model for peer in members])
    assert after < before * 0.55**12
    assert sum(map(value, members)) / 5 == pytest.approx(2.0)


def test_sweeps_of_gossip_in_one_merge_are_those_one_by_one() -> None:
    mixing = ring(5).metropolis()
    one_by_one, at_once = peers(5), peers(5)
    for members, matrix, sweeps in ((one_by_one, mixing, 3), (at_once, mixing.power(3), 1)):
        for peer in members:
            peer.rule = neighbours(matrix, [one.pool.author for one in members])
        for _ in range(sweeps):
            spread(members)
            for peer in members:
                peer.mix()
            for peer in members:
                peer.contribute()
    for a, b in zip(one_by_one, at_once, strict=True):
        assert value(a) == pytest.approx(value(b), abs=1e-12)


def test_rules() -> None:
    members = peers(4)
    spread(members)
    there, me = members[0].there(), members[0].pool.author
    assert everyone(me, there, 0) == dict.fromkeys(there, 1)
    assert oneself(me, there, 0) == {me: 1}
    root = bytes(32)
    assert set(sampled(root, 2)(me, there, 5)) == set(order(root, there, 5)[:2])
    members[0].rule = oneself
    assert members[0].mix() is None
    with pytest.raises(UsageError):
        neighbours(ring(5).metropolis(), [me] * 5)


def test_what_others_say_wrongly_has_no_part() -> None:
    first, second = peers(2)
    stranger = pools(1)[0]
    for note in ("trained with love", Facts().encode() + " ", None):
        stranger.state = stranger.state.add(constant(1e6), note=note)
    memory(first).hear(memory(second).state)
    memory(first).hear(stranger.state)
    assert len(memory(first).state.visible) == 3
    assert set(first.there()) == {first.pool.author, second.pool.author}
    first.mix()
    assert value(first) == 0.5


def test_a_claim_of_the_distant_future_makes_nobody_else_stale() -> None:
    members = peers(4, weighing=Weighing(staleness=4), patience=2)
    members[3].facts = Facts(1 << 31)
    members[3].contribute()
    spread(members)
    assert members[0].final_merge()["w"].tolist() == [1.5] * 3


def test_robust_rules_by_naming_the_recipe() -> None:
    def nearest(content: bytes) -> Recipe:
        return Recipe("nna", pivot=content.hex(), byzantine=1)

    members = peers(4, recipe="weight_average")
    members[3].adopt(constant(1e9))
    members[3].contribute()
    spread(members)
    members[0].recipe = nearest
    merged = members[0].mix()
    assert merged is not None
    assert value(members[0]) == 1.0


def test_partial_contributions_are_averaged_by_those_who_hold_each() -> None:
    recipe = Recipe("weight_average", missing="skip")
    first, second, third = (
        Peer(pool, {"trunk": torch.tensor([i]), **{f"expert.{e}": torch.tensor([10.0 * e]) for e in range(3)}}, still)
        for i, pool in zip((0.0, 3.0, 6.0), pools(3, recipe), strict=True)
    )
    for number, peer in enumerate((first, second, third)):
        peer.covers = ("trunk", f"expert.{number}")
        peer.model[f"expert.{number}"] += 1 + number
        peer.contribute()
    spread([first, second, third])
    merged = second.mix()
    assert merged is not None
    assert {name: x.item() for name, x in second.model.items()} == {
        "trunk": 3.0,
        "expert.0": 1.0,
        "expert.1": 12.0,
        "expert.2": 23.0,
    }
    assert sorted(load(second.pool, own(second.pool)[0])) == ["expert.1", "trunk"]


def test_counters_stay_and_are_not_shared() -> None:
    (pool,) = pools(1)
    peer = Peer(pool, constant(1.0) | {"count": torch.tensor(3)}, lambda model: {**model, "count": model["count"] + 1})
    peer.round()
    assert int(peer.model["count"]) == 4
    assert sorted(load(pool, own(pool)[0])) == ["w"]


def test_the_staleness_gap_is_known_where_one_was_at_the_start() -> None:
    first, second = peers(2, weighing=Weighing(gap=True))
    hear_all([first, second])
    for peer in (first, second):
        peer.mix()
    assert first.facts.start == second.facts.start is not None
    first.trainer, second.trainer = (Peer(first.pool, constant(0.0), towards(t)).trainer for t in (8.5, 2.5))
    second.step()
    first.step()
    hear_all([first, second])
    assert (value(first), value(second)) == (4.5, 1.5)
    assert first.shares(first.there())[second.pool.author] == Fraction(1, 5), "went 4 while the other moved 1"


def test_what_cannot_be_is_said() -> None:
    (pool,) = pools(1)
    with pytest.raises(UsageError, match="give the model"):
        Peer(pool, None, still)
    peer = Peer(pool, constant(0.0), still)
    with pytest.raises(UsageError, match="contribute"):
        peer.mix()
    with pytest.raises(UsageError, match="nobody"):
        peer.final_merge()
    with pytest.raises(UsageError, match="nothing to contribute"):
        Peer(pool, constant(0.0), still, covers=["expert.*"]).contribute()


def test_distance_and_disagreement() -> None:
    assert distance(constant(1.0), constant(3.0)) == pytest.approx(2 * 3**0.5)
    assert consensus_error([constant(0.0), constant(0.0)]) == 0
