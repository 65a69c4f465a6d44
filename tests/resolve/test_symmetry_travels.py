"""The symmetry travels with the base or a model: every door finds it, and nothing but the pool is needed to merge."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import crdtmerge as cm
from crdtmerge.errors import InputError, MismatchError, NeedsError
from crdtmerge.gossip import bucket
from crdtmerge.keys import Key
from crdtmerge.recipe import Recipe
from crdtmerge.resolve.sources import open_source
from crdtmerge.resolve.travelling import carried_input
from crdtmerge.symmetry.groups import Axis, Group, Symmetry
from tests.resolve.models import save_folder
from tests.resolve.running import here

SHAPES = {"a.weight": (8, 3), "a.bias": (8,), "b.weight": (2, 8)}
AXES = (Axis("a.weight", 0), Axis("a.bias", 0), Axis("b.weight", 1, True))
SYMMETRY = Symmetry((Group(8, AXES),), {"a.weight": ((8,), (3,)), "a.bias": ((8,),), "b.weight": ((2,), (8,))})
OTHER = Symmetry(
    (Group(3, (Axis("a.weight", 1, True),)), *SYMMETRY.groups),
    SYMMETRY.tensors,
)
TEXT, OTHER_TEXT = SYMMETRY.encode().decode(), OTHER.encode().decode()
NAME = "symmetry.json"
KEYS = [Key.from_seed(bytes([n]) * 32) for n in (1, 2)]

Place = Callable[..., list[Path]]


@pytest.fixture
def placed(tmp_path: Path) -> Place:
    """Folders of a base and two models: one network in three orders of its units, each with these files."""

    def make(*files: Mapping[str, str], under: str = "models") -> list[Path]:
        rng = np.random.default_rng(0)
        one = {name: torch.from_numpy(rng.standard_normal(shape)).float() for name, shape in SHAPES.items()}
        root = tmp_path / under
        root.mkdir()
        made = []
        for number, own in enumerate(files):
            p = rng.permutation(8)
            model = {name: SYMMETRY.turned(name, x, [p]).contiguous() for name, x in one.items()}
            made.append(save_folder(root / f"m{number}", model, {"config.json": "{}", **own}))
        return made

    return make


def through_all(folder: Path, recipe: Recipe, base: Path | None, models: list[Path]) -> list[Any]:
    """What each door makes of them with no input given: a merged model."""
    folder.mkdir()
    found = [cm.merge(models, strategy=recipe, base=base), cm.merge(models[::-1], strategy=recipe, base=base)]
    state = cm.MergeState(recipe, base=base)
    for model in models:
        state = state.add(model)
    found += [state.resolve(), cm.MergeState.from_bytes(state.to_bytes()).resolve()]
    like = {} if base is not None else {"like": models[0]}
    with cm.Replica.create(folder / "pool", recipe, base=base, **like) as replica:
        for model in models:
            replica.add(model)
        found.append(replica.resolve())
        resolved = replica.resolve_to(folder / "out")
        assert not replica.resolve_to(folder / "out").merged
    assert resolved.receipt.merge_id == found[0].receipt.merge_id
    return found


def same(one: Mapping[str, torch.Tensor], path: Path) -> bool:
    return all(torch.equal(one[name], x) for name, x in load_file(path / "model.safetensors").items())


WHERE = {"the base": ({NAME: TEXT}, {}, {}), "one model": ({}, {}, {NAME: TEXT}), "all": ({NAME: TEXT},) * 3}
RECIPES = {
    "the base": Recipe("rebasin"),
    "one model": Recipe("aligned", inner="task_arithmetic"),
    "all": Recipe("zipit", method="weights"),
}


@pytest.mark.parametrize("where", WHERE)
def test_every_door_finds_it(where: str, placed: Place, tmp_path: Path) -> None:
    base, *models = placed(*WHERE[where])
    given = tmp_path / "given.json"
    given.write_text(TEXT)
    wanted = cm.merge(models, strategy=RECIPES[where], base=base, inputs={"symmetry": given})
    assert any(same(wanted, path) for path in (base, *models)), "copies of one network merge into it"
    for merged in through_all(tmp_path / "doors", RECIPES[where], base, models):
        assert merged.receipt.to_bytes() == wanted.receipt.to_bytes()


def test_without_a_base(placed: Place, tmp_path: Path) -> None:
    models = placed({}, {NAME: TEXT}, {NAME: TEXT})
    first, *others = through_all(tmp_path / "doors", Recipe("rebasin"), None, models)
    assert all(one.receipt.to_bytes() == first.receipt.to_bytes() for one in others)


def test_contributions_that_disagree_are_refused_at_every_door(placed: Place, tmp_path: Path) -> None:
    base, one, other = placed({}, {NAME: TEXT}, {NAME: OTHER_TEXT})
    with pytest.raises(MismatchError, match=r"symmetry.json of .*m1 and the symmetry.json of .*m2 differ"):
        cm.merge([one, other], strategy="rebasin")
    state = cm.MergeState("rebasin").add(one).add(other)
    with pytest.raises(MismatchError, match=r"of contribution \w+ and the symmetry.json of contribution"):
        state.resolve()
    with cm.Replica.create(tmp_path / "pool", "rebasin", like=one) as replica:
        replica.add(one)
        replica.add(other)
        with pytest.raises(MismatchError, match="differ"):
            replica.resolve()
    given = cm.merge([one, other], strategy="rebasin", inputs={"symmetry": one / NAME})
    asked = Recipe("rebasin", inputs=given.receipt.recipe.inputs)
    assert cm.merge([other, one], strategy=asked).receipt.merge_id == given.receipt.merge_id, "the recipe says which"
    assert same(given, one) or same(given, other)
    (base / NAME).write_text(TEXT)
    settled = cm.merge([one, other], strategy="rebasin", base=base)
    assert settled.receipt.recipe.inputs == given.receipt.recipe.inputs, "the base says which"


def test_what_is_given_wins_and_must_be_what_the_recipe_names(placed: Place, tmp_path: Path) -> None:
    base, *models = placed({NAME: TEXT}, {}, {})
    given = tmp_path / "other.json"
    given.write_text(OTHER_TEXT)
    carried = cm.merge(models, strategy="rebasin", base=base).receipt.recipe
    assert cm.merge(models, strategy="rebasin", base=base, inputs={"symmetry": given}).receipt.recipe != carried
    asked = Recipe("rebasin", inputs=carried.inputs)
    with pytest.raises(MismatchError, match="the recipe names"):
        cm.merge(models, strategy=asked, base=base, inputs={"symmetry": given})
    other = cm.merge(models, strategy="rebasin", base=base, inputs={"symmetry": given}).receipt.recipe.inputs
    with pytest.raises(NeedsError, match="with digest"):
        cm.merge(models, strategy=Recipe("rebasin", inputs=other), base=base)


def test_outputs_are_verified_from_the_folders_alone(placed: Place, tmp_path: Path) -> None:
    base, *models = placed({}, {}, {NAME: TEXT})
    out, moved = tmp_path / "out", tmp_path / "moved"
    assert here("merge", *models, "--base", base, "--strategy", "rebasin", "-o", out).code == 0
    assert "symmetry" not in (out / "inputs.json").read_text()
    assert cm.verify(out).answer == "same"
    base.parent.rename(moved)
    assert cm.verify(out).answer == "unknown"
    folders = [moved / path.name for path in (*models, base)]
    assert cm.verify(out, folders).answer == "same"
    with cm.Replica.create(tmp_path / "pool", "rebasin", base=folders[-1]) as replica:
        for path in folders[:2]:
            replica.add(path)
    assert cm.verify(out, [tmp_path / "pool"]).answer == "same"
    (moved / models[1].name / NAME).write_text(OTHER_TEXT)
    verdict = cm.verify(out, folders)
    assert (verdict.answer, "the input 'symmetry'" in verdict.reason) == ("unknown", True)
    (moved / "as-given.json").write_text(TEXT)
    assert cm.verify(out, [*folders, moved / "as-given.json"]).answer == "same"


def test_a_plan_does_without_it(placed: Place, tmp_path: Path) -> None:
    base, *models = placed({NAME: TEXT}, {}, {})
    plan = tmp_path / "a.plan"
    assert here("plan", *models, "--base", base, "--strategy", "rebasin", "-o", plan).code == 0
    merged = cm.merge(models, strategy="rebasin", base=base)
    (base / NAME).unlink()
    applied = cm.merge(models, strategy="rebasin", base=base, plan=plan)
    assert applied.receipt.output_digest == merged.receipt.output_digest
    assert applied.receipt.recipe.inputs["symmetry"] == merged.receipt.recipe.inputs["symmetry"]


def test_where_nobody_has_it_the_message_says_both_ways(placed: Place) -> None:
    models = placed({}, {}, {})
    with pytest.raises(NeedsError, match=r"--input symmetry=PATH, or as symmetry.json in the folder of the base"):
        cm.merge(models, strategy="rebasin")


@pytest.mark.parametrize("text", ["", "{}", "[1]", TEXT[:-1], TEXT + " ", '{"format":"other"}'])
def test_a_malformed_one_is_named(text: str, placed: Place) -> None:
    base, *models = placed({NAME: text}, {}, {})
    with pytest.raises(InputError, match=r"the symmetry.json of \S*m0: "):
        cm.merge(models, strategy="rebasin", base=base)
    assert cm.merge(models, strategy="linear", base=base), "nothing else reads it"


def test_it_only_travels_where_it_is_not_needed(placed: Place, tmp_path: Path) -> None:
    plain = cm.merge(placed({}, {}, {}), strategy="linear")
    merged = cm.merge(placed({NAME: TEXT}, {NAME: OTHER_TEXT}, {NAME: TEXT}, under="with"), strategy="linear")
    assert merged.receipt.merge_id == plain.receipt.merge_id
    assert merged.receipt.output_digest == plain.receipt.output_digest
    merged.save(tmp_path / "out")
    assert (tmp_path / "out" / NAME).read_text() in (TEXT, OTHER_TEXT)


def test_one_that_is_announced_and_not_here_is_not_passed_over(placed: Place, tmp_path: Path) -> None:
    models = placed({NAME: TEXT}, {})
    state = cm.MergeState("rebasin").add(models[0]).add(models[1])
    state._holdings = replace(state._holdings, files={})
    with pytest.raises(NeedsError, match=r"its symmetry.json is announced and not here"):
        state.resolve()
    with cm.Replica.create(tmp_path / "pool", "rebasin", base=models[0]) as replica:
        replica.add(models[1])
        content, files = replica.genesis.base, {NAME: bytes(32)}
        assert content is not None
        source = replica.source(content, files)
        with pytest.raises(NeedsError, match=r"its symmetry.json is announced and not here"):
            carried_input("symmetry", None, [], source)


def test_the_first_that_is_found_ends_the_search(placed: Place) -> None:
    base, one, other = (open_source(path, "model") for path in placed({NAME: TEXT}, {NAME: OTHER_TEXT}, {}))
    found = carried_input("symmetry", None, [one, other], base)
    assert found is not None
    assert found.data == TEXT.encode()
    assert carried_input("symmetry", None, [other], None) is None
    assert carried_input("symmetry", bytes(32), [one, other], base) is None


@pytest.mark.parametrize("where", ["the base", "one model"])
def test_a_peer_resolves_with_nothing_but_the_pool(where: str, placed: Place, tmp_path: Path) -> None:
    base, *models = placed(*WHERE[where])
    shared = tmp_path / "shared"
    with cm.Replica.create(tmp_path / "alice", "rebasin", base=base, key=KEYS[0]) as alice:
        for model in models:
            alice.add(model)
        asyncio.run(bucket.sync_bucket(alice, shared))
        wanted = alice.resolve()
    base.parent.rename(tmp_path / "gone")
    with asyncio.run(bucket.begin_from_bucket(tmp_path / "bob", shared, key=KEYS[1]))[0] as bob:
        assert bob.resolve().receipt.to_bytes() == wanted.receipt.to_bytes()
        resolved = bob.resolve_to(tmp_path / "out")
    assert resolved.receipt.to_bytes() == wanted.receipt.to_bytes()
    assert cm.verify(tmp_path / "out", [tmp_path / "bob"]).answer == "same"
    bundle = tmp_path / "pool.bundle"
    with cm.Replica.open(tmp_path / "alice") as alice:
        alice.export(bundle)
    with cm.Replica.of_bundle(tmp_path / "carol", bundle) as carol:
        assert carol.resolve().receipt.to_bytes() == wanted.receipt.to_bytes()
