"""A statistic travels with its model through every door: equal sets give one root, merge id, receipt and bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import crdtmerge as cm
from crdtmerge import limits
from crdtmerge.errors import CrdtMergeError, InputError, MismatchError, NeedsError, NonFiniteError, UsageError
from crdtmerge.recipe import Recipe
from crdtmerge.replica.contribution import Claim
from crdtmerge.resolve import plan_file
from crdtmerge.resolve.beside import Beside
from crdtmerge.resolve.merging import Merge, Options
from crdtmerge.strategies.protocol import Plan
from tests.resolve import models
from tests.resolve.running import here
from tests.resolve.tiny_strategies import Anchored, curvature, register, saved

WHO = ("a", "b", "c")
WEIGHTS = ("1", "0.5", "2")


class Asked:
    """Models and statistics as files, and every way to merge them by a strategy that reads statistics."""

    def __init__(self, folder: Path, strategy: str, stat: str) -> None:
        self.folder, self.strategy, self.stat = folder, strategy, stat
        self.paths, self.stats = saved(folder, *WHO)
        self.outs = 0

    def out(self) -> Path:
        self.outs += 1
        return self.folder / f"out-{self.outs}"

    def said(self) -> list[dict[str, Any]]:
        rows = zip(self.paths, WEIGHTS, self.stats, strict=True)
        return [{"model": path, "weight": w, "stats": {self.stat: stat}} for path, w, stat in rows]

    def one_call(self) -> cm.Receipt:
        tables = [{self.stat: path} for path in self.stats]
        return cm.merge(self.paths, strategy=self.strategy, weights=WEIGHTS, stats=tables).receipt

    def one_call_in_memory(self) -> cm.Receipt:
        people, tables = [models.state(who) for who in WHO], [{self.stat: curvature(who)} for who in WHO]
        merged = cm.merge(people[::-1], strategy=self.strategy, weights=WEIGHTS[::-1], stats=tables[::-1])
        return merged.receipt

    def state(self) -> cm.MergeState:
        joined = cm.MergeState(self.strategy)
        for how in self.said():
            joined |= cm.MergeState(self.strategy).add(how.pop("model"), **how)
        return joined

    def a_state(self) -> cm.Receipt:
        return self.state().resolve().receipt

    def a_state_from_bytes(self) -> cm.Receipt:
        return cm.MergeState.from_bytes(self.state().to_bytes()).resolve().receipt

    def a_state_by_delta(self) -> cm.Receipt:
        whole, one = self.state(), cm.MergeState(self.strategy)
        delta = cm.Delta.from_bytes(whole.delta_since(one.heads).to_bytes())
        return one.join(delta).resolve().receipt

    def a_state_renewed(self) -> cm.Receipt:
        return self.state().renewed().resolve().receipt

    def _replica(self) -> cm.Replica:
        replica = cm.Replica.create(self.out(), self.strategy, like=self.paths[0])
        for how in self.said():
            replica.add(how.pop("model"), **how)
        return replica

    def a_replica(self) -> cm.Receipt:
        with self._replica() as replica:
            in_memory, out = replica.resolve().receipt, self.out()
            resolved = replica.resolve_to(out)
            again = replica.resolve_to(out)
            assert (resolved.merged, again.merged, again.nbytes) == (True, False, 0)
        assert resolved.receipt.output_digest == in_memory.output_digest
        assert cm.verify(out).answer == "same", "the pool keeps what it was merged from"
        assert cm.verify(out, [*self.paths, *self.stats]).answer == "same"
        return in_memory

    def a_replica_of_an_export(self) -> cm.Receipt:
        bundle = self.out()
        with self._replica() as replica:
            replica.export(bundle)
        with cm.Replica.of_bundle(self.out(), bundle) as other:
            return other.resolve().receipt

    def a_replica_of_a_state(self) -> cm.Receipt:
        bundle = self.out()
        bundle.write_bytes(self.state().to_bytes())
        with cm.Replica.of_bundle(self.out(), bundle) as replica:
            return replica.resolve().receipt

    def command_merge(self) -> cm.Receipt:
        out = self.out()
        more = [part for weight in WEIGHTS for part in ("--weight", weight)]
        more += [part for path in self.stats for part in ("--stats", f"{self.stat}={path}")]
        ran = here("merge", *self.paths, "--strategy", self.strategy, *more, "-o", out)
        assert ran.code == 0, ran.err
        return self._written(out)

    def command_merge_by_path(self) -> cm.Receipt:
        out = self.out()
        more = [part for weight in WEIGHTS for part in ("--weight", weight)]
        bound = list(zip(self.paths, self.stats, strict=True))[::-1]
        more += [part for path, stat in bound for part in ("--stats", f"{path}:{self.stat}={stat}")]
        ran = here("merge", *self.paths, "--strategy", self.strategy, *more, "-o", out)
        assert ran.code == 0, ran.err
        assert here("verify", out).code == 0
        return self._written(out)

    def commands_of_a_replica(self) -> cm.Receipt:
        pool, out = self.out(), self.out()
        ran = [here("init", pool, "--like", self.paths[0], "--strategy", self.strategy)]
        for how in self.said()[::-1]:
            statistic = f"{self.stat}={how['stats'][self.stat]}"
            ran += [here("add", how["model"], "-C", pool, "--weight", how["weight"], "--stats", statistic)]
        ran += [here("resolve", "-C", pool, "-o", out), here("verify", out), here("fsck", "-C", pool)]
        assert [one.code for one in ran] == [0] * len(ran), [one.err for one in ran]
        return self._written(out)

    def _written(self, out: Path) -> cm.Receipt:
        return cm.Receipt.from_bytes((out / "receipt.json").read_bytes(), str(out))


DOORS: tuple[Callable[[Asked], cm.Receipt], ...] = (
    Asked.one_call,
    Asked.one_call_in_memory,
    Asked.a_state,
    Asked.a_state_from_bytes,
    Asked.a_state_by_delta,
    Asked.a_state_renewed,
    Asked.a_replica,
    Asked.a_replica_of_an_export,
    Asked.a_replica_of_a_state,
    Asked.command_merge,
    Asked.command_merge_by_path,
    Asked.commands_of_a_replica,
)


@pytest.mark.parametrize(("strategy", "stat"), [("weighed", "curvature"), ("fisher_merge", "fisher")])
def test_every_door_gives_one_receipt(
    strategy: str, stat: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch)
    asked = Asked(tmp_path, strategy, stat)
    receipts = {door.__name__: door(asked) for door in DOORS}
    first = receipts["one_call"]
    for name, found in receipts.items():
        assert (found.root, found.merge_id) == (first.root, first.merge_id), name
        assert found.to_bytes() == first.to_bytes(), name
    digests = {claim.stats[stat] for _, claim in first.contributions}
    assert digests == {hashlib.sha256(path.read_bytes()).digest() for path in asked.stats}


# ---- states


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


def added(who: str = "a", **how: Any) -> cm.MergeState:
    return cm.MergeState("weighed").add(models.state(who), **how)


@pytest.mark.usefixtures("tiny")
def test_what_is_done_to_a_statistic_later_changes_no_state(tmp_path: Path) -> None:
    (_,), (path,) = saved(tmp_path, "a")
    held = curvature("a")
    one, other = added(stats={"curvature": held}), added(stats={"curvature": path})
    before = one.resolve().receipt.output_digest
    held["scale"].fill_(9)
    path.unlink()
    assert one.resolve().receipt.output_digest == other.resolve().receipt.output_digest == before


@pytest.mark.usefixtures("tiny")
def test_a_statistic_that_is_only_announced_is_missing_until_someone_brings_it(tmp_path: Path) -> None:
    (_,), (path,) = saved(tmp_path, "a")
    digest = hashlib.sha256(path.read_bytes()).digest()
    announced = added(stats={"curvature": digest})
    with pytest.raises(NeedsError, match=rf"is claimed as {digest.hex()[:16]} and not here"):
        announced.resolve()
    back = cm.MergeState.from_bytes(announced.to_bytes())
    brought = back.add(models.state("a"), stats={"curvature": path})
    assert brought.resolve().receipt.to_bytes() == added(stats={"curvature": path}).resolve().receipt.to_bytes()
    assert (announced | added(stats={"curvature": path})).resolve().receipt.root == announced.root


@pytest.mark.usefixtures("tiny")
def test_statistics_of_a_removed_contribution_leave_the_state_and_come_back() -> None:
    one = added(stats={"curvature": curvature("a")})
    gone = one.remove(one.visible[0].id)
    assert len(gone.to_bytes()) < len(one.to_bytes()) - 2000
    assert not gone._holdings.files
    again = gone.add(models.state("a"), stats={"curvature": curvature("a")})
    assert again.resolve().receipt.to_bytes() == one.resolve().receipt.to_bytes()


REFUSED: dict[str, tuple[Any, type[CrdtMergeError], str]] = {
    "a text that is no path": ("no such file", InputError, "cannot be opened"),
    "31 bytes": (bytes(31), UsageError, "stats: 'curvature' is no plain name with a digest: a table of names"),
    "a number": (5, UsageError, "digests of 32 bytes is needed"),
    "other names": ({"w": np.ones(3, np.float32)}, MismatchError, "has none of the model's tensors; it holds 'w'"),
    "nothing": ({}, MismatchError, "it holds nothing"),
    "infinity": ({"scale": np.array(np.inf, np.float32)}, NonFiniteError, "tensor 'scale' holds 1 values"),
}  # fmt: skip


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("door", ["MergeState", "Replica"])
def test_a_statistic_that_is_none_is_refused_when_it_is_added(what: str, door: str, tmp_path: Path) -> None:
    value, kind, words = REFUSED[what]
    with cm.Replica.create(tmp_path / "pool", "weighed", like=models.state("a")) as replica:
        pool: Any = replica if door == "Replica" else cm.MergeState("weighed")
        with pytest.raises(kind, match=words):
            pool.add(models.state("a"), stats={"curvature": value})
        assert not replica.visible


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("door", ["MergeState", "Replica"])
def test_a_pool_takes_no_statistic_that_peers_would_not_pass_on(
    door: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,), (stat,) = saved(tmp_path, "a")
    size = stat.stat().st_size

    def add() -> None:
        if door == "MergeState":
            added(stats={"curvature": stat})
        else:
            with cm.Replica.create(tmp_path / f"pool-{limits.CARRIED_FILES_BYTES_MAX}", "weighed", like=path) as one:
                one.add(path, stats={"curvature": stat})

    monkeypatch.setattr(limits, "CARRIED_FILES_BYTES_MAX", size)
    add()
    monkeypatch.setattr(limits, "CARRIED_FILES_BYTES_MAX", size - 1)
    with pytest.raises(UsageError, match=rf"has {size} bytes; a pool keeps .* at most {size - 1} .*merge once with"):
        add()
    merged = cm.merge([path], strategy="weighed", stats=[{"curvature": stat}])
    assert merged.receipt.contributions[0][1].stats.keys() == {"curvature"}, "a merge once has no such bound"


# ---- further inputs and plans


@pytest.mark.usefixtures("tiny")
def test_inputs_and_plans_mean_the_same_at_every_door(tmp_path: Path) -> None:
    paths, _ = saved(tmp_path, *WHO)
    inputs: dict[str, Any] = {"anchor": tmp_path / "z.safetensors", "shift": tmp_path / "shift"}
    models.save(inputs["anchor"], models.state("z"))
    inputs["shift"].write_text("0.5")
    named = [part for name, path in inputs.items() for part in ("--input", f"{name}={path}")]
    with Merge([(path, Claim()) for path in paths], Recipe("anchored"), None, Options(), Beside((), inputs)) as one:
        plan, made_for = one.plan, one.unplanned_id
        plan_file.write(tmp_path / "a.plan", plan, made_for, one.recipe.inputs)
    state = cm.MergeState("anchored")
    for path in paths:
        state = state.add(path)
    (tmp_path / "pool.bundle").write_bytes(state.to_bytes())
    for said in (None, tmp_path / "a.plan", plan):
        before = Anchored.plans
        receipts = [
            cm.merge(paths, strategy="anchored", inputs=inputs, plan=said).receipt,
            state.resolve(inputs=inputs, plan=said).receipt,
        ]
        pool, out = tmp_path / f"pool-{type(said).__name__}", tmp_path / "out"
        with cm.Replica.of_bundle(pool, tmp_path / "pool.bundle") as replica:
            receipts.append(replica.resolve(inputs=inputs, plan=said).receipt)
            receipts.append(replica.resolve_to(out, inputs=inputs, plan=said).receipt)
            assert not replica.resolve_to(out, inputs=inputs, plan=said).merged
            assert cm.verify(out).answer == ("unknown" if isinstance(said, Plan) else "same")
        assert Anchored.plans == before + (0 if said else 4 + 1)
        if not isinstance(said, Plan):
            planned = ["--plan", said] if said else []
            for command in (
                ("merge", *paths, "--strategy", "anchored", *named, *planned),
                ("resolve", "-C", pool, *named, *planned),
            ):
                out = tmp_path / f"{command[0]}-{bool(said)}"
                ran = here(*command, "-o", out)
                assert ran.code == 0, ran.err
                receipts.append(cm.Receipt.from_bytes((out / "receipt.json").read_bytes(), "it"))
        assert len({one.to_bytes() for one in receipts}) == 1
        assert (receipts[0].recipe.inputs.get("plan") == plan.digest) == (said is not None)
    other = state.add(models.state("y"))
    with pytest.raises(MismatchError, match=rf"is the plan of merge {made_for.hex()}; this is merge [0-9a-f]{{64}}"):
        other.resolve(inputs=inputs, plan=tmp_path / "a.plan")


@pytest.mark.usefixtures("tiny")
def test_another_input_makes_another_merge_of_an_output(tmp_path: Path) -> None:
    (path,), _ = saved(tmp_path, "a")
    shift = tmp_path / "shift"
    with cm.Replica.create(tmp_path / "pool", "anchored", like=path) as replica:
        replica.add(path)
        digests = []
        for text in ("0.5", "0.25", "0.5"):
            shift.write_text(text)
            resolved = replica.resolve_to(tmp_path / "out", inputs={"anchor": models.state("z"), "shift": shift})
            assert resolved.merged
            digests.append(resolved.receipt.output_digest)
        with pytest.raises(NeedsError, match="needs the input 'shift'"):
            replica.resolve(inputs={"anchor": models.state("z")})
    assert digests[0] == digests[2] != digests[1]


@pytest.mark.usefixtures("tiny")
def test_a_pool_whose_recipe_names_inputs_takes_no_others(tmp_path: Path) -> None:
    anchor, other = models.state("z"), models.state("y")
    shift = tmp_path / "shift"
    shift.write_text("0.5")
    receipt = cm.merge([models.state("a")], strategy="anchored", inputs={"anchor": anchor, "shift": shift}).receipt
    state = cm.MergeState(Recipe("anchored", inputs=receipt.recipe.inputs)).add(models.state("a"))
    assert state.resolve(inputs={"anchor": anchor, "shift": shift}).receipt.to_bytes() == receipt.to_bytes()
    with pytest.raises(MismatchError, match="the recipe names"):
        state.resolve(inputs={"anchor": other, "shift": shift})
    with pytest.raises(UsageError, match="strategy 'weighed' has no input 'anchor'"):
        cm.MergeState(Recipe("weighed", inputs=receipt.recipe.inputs))
