"""Statistics, further inputs and plans of one merge: how they are claimed, what is refused, what verify makes of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import crdtmerge as cm
from crdtmerge import limits
from crdtmerge.errors import (
    ChangedError,
    CrdtMergeError,
    HeaderError,
    InputError,
    MismatchError,
    NeedsError,
    NonFiniteError,
    UsageError,
)
from crdtmerge.recipe import Recipe
from crdtmerge.replica.contribution import Claim
from crdtmerge.resolve import plan_file, statistic, verify
from crdtmerge.resolve.merge import into_memory
from crdtmerge.resolve.merging import Merge, Options
from crdtmerge.resolve.receipt import Receipt
from crdtmerge.resolve.statistic import Kept, Statistic
from crdtmerge.strategies.protocol import Plan
from tests.resolve import models
from tests.resolve.tiny_strategies import Anchored, Learnt, curvature, register, saved

WHO = ("a", "b", "c")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


def stats_of(*people: str) -> list[dict[str, dict[str, torch.Tensor]]]:
    return [{"curvature": curvature(who)} for who in people]


def weighed(*people: str, **more: Any) -> cm.Merged:
    return cm.merge([models.state(who) for who in people], strategy="weighed", stats=stats_of(*people), **more)


# ---- statistics


def test_statistics_weigh_what_they_belong_to_in_whatever_order_the_models_come() -> None:
    merged, turned = weighed("a", "b", "c"), weighed("c", "a", "b")
    for name, curve in curvature("a").items():
        above = sum(curvature(who)[name].double() * models.state(who)[name].double() for who in WHO)
        below = sum(curvature(who)[name].double() for who in WHO)
        assert torch.allclose(merged[name].double(), above / below, atol=1e-6), curve.shape
    assert merged.receipt.to_bytes() == turned.receipt.to_bytes()


def test_a_file_and_the_mapping_that_it_was_written_from_are_one_statistic(tmp_path: Path) -> None:
    paths, stats = saved(tmp_path, *WHO)
    from_files = cm.merge(paths, strategy="weighed", stats=[{"curvature": path} for path in stats])
    assert from_files.receipt.to_bytes() == weighed(*WHO).receipt.to_bytes()
    digests = {claim.stats["curvature"] for _, claim in from_files.receipt.contributions}
    assert digests == {hashlib.sha256(path.read_bytes()).digest() for path in stats}


def test_another_statistic_makes_another_root_and_other_bytes(tmp_path: Path) -> None:
    twice = {name: 2 * x for name, x in curvature("a").items()}
    other = cm.merge(
        [models.state(who) for who in WHO],
        strategy="weighed",
        stats=[{"curvature": twice}, *stats_of("b", "c")],
    )
    assert other.receipt.root != weighed(*WHO).receipt.root
    assert other.receipt.output_digest != weighed(*WHO).receipt.output_digest


def test_a_statistic_that_nobody_needs_is_claimed_all_the_same(tmp_path: Path) -> None:
    stats = stats_of("a", "b")
    with_them = cm.merge([models.state("a"), models.state("b")], strategy="linear", stats=stats)
    without = cm.merge([models.state("a"), models.state("b")], strategy="linear")
    assert with_them.receipt.root != without.receipt.root
    assert with_them.receipt.output_digest == without.receipt.output_digest


def test_any_block_size_and_number_of_threads_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"w": (300, 517)}
    people = [models.state(who, shapes=shapes) for who in WHO]
    stats = [{"curvature": {"w": models.state(who, shapes=shapes)["w"].abs() + 1}} for who in "def"]
    found = set()
    for block, threads in ((None, 1), ("65536", 3)):
        if block:
            monkeypatch.setenv("CRDTMERGE_BLOCK", block)
        found.add(cm.merge(people, strategy="weighed", stats=stats, threads=threads).receipt.to_bytes())
    assert len(found) == 1


def without(name: str, of: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: x for key, x in of.items() if key != name}


REFUSED: dict[str, tuple[Callable[[Path], Any], type[CrdtMergeError], str]] = {
    "none": (lambda at: (), NeedsError, r"needs the statistic 'curvature' of every model; that of model 1 is missing"),
    "of one model only": (lambda at: [*stats_of("a"), {}], NeedsError, "that of model 2 is missing"),
    "None for one": (lambda at: [*stats_of("a"), None], NeedsError, "that of model 2 is missing"),
    "too few": (lambda at: stats_of("a"), UsageError, "statistics of 1 models for 2"),
    "too many": (lambda at: stats_of(*WHO), UsageError, "statistics of 3 models for 2"),
    "a table": (lambda at: {"curvature": curvature("a")}, UsageError, "stats is dict; a list"),
    "a table of texts": (lambda at: ["ab", "cd"], UsageError, "stats holds str"),
    "a name with a slash": (lambda at: [{"../x": curvature("a")}] * 2, UsageError, "cannot name statistics"),
    "a number": (lambda at: [{"curvature": 5}] * 2, UsageError, "the curvature of model 1 is int"),
    "no such file": (lambda at: [{"curvature": at / "no"}] * 2, InputError, "cannot be opened"),
    "a folder": (lambda at: [{"curvature": at}] * 2, InputError, "is a folder where a file is wanted"),
    "no safetensors file": (lambda at: [{"curvature": put(at / "x", bytes(range(40)))}] * 2, HeaderError, "header"),
    "other names": (
        lambda at: [{"curvature": {"other": torch.ones(3)}}] * 2,
        MismatchError,
        "has none of the model's tensors; it holds 'other'",
    ),
    "a tensor short in one": (
        lambda at: [*stats_of("a"), {"curvature": without("scale", curvature("b"))}],
        MismatchError,
        "1 of 2 contributions have it in their curvature",
    ),
    "another shape": (
        lambda at: [{"curvature": curvature(who) | {"scale": torch.ones(2)}} for who in "ab"],
        MismatchError,
        r"'scale' has shape \[\] in the models and \[2\] in their curvature",
    ),
    "two shapes": (
        lambda at: [{"curvature": curvature("a") | {"scale": torch.ones(size)}} for size in (1, 2)],
        MismatchError,
        "'scale' has shape",
    ),
    "whole numbers": (
        lambda at: [{"curvature": curvature(who) | {"scale": torch.tensor(3)}} for who in "ab"],
        MismatchError,
        "'scale' is I64; statistics are floats",
    ),
    "NaN": (
        lambda at: [*stats_of("a"), {"curvature": curvature("b") | {"scale": torch.tensor(float("nan"))}}],
        NonFiniteError,
        "the curvature of model 2: tensor 'scale' holds 1 values that are NaN",
    ),
}  # fmt: skip


def put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("what", REFUSED)
def test_statistics_that_do_not_fit_are_refused_with_a_sentence(what: str, tmp_path: Path) -> None:
    given, kind, words = REFUSED[what]
    with pytest.raises(kind, match=words) as refused:
        cm.merge([models.state("a"), models.state("b")], strategy="weighed", stats=given(tmp_path))
    assert str(refused.value).endswith((".", "`.", "?"))


def test_one_model_given_twice_needs_the_same_statistics_both_times() -> None:
    a, b = models.state("a"), models.state("b")
    same = cm.merge([a, b, a], strategy="weighed", stats=stats_of("a", "b", "a"))
    assert same.receipt.to_bytes() == weighed("a", "b").receipt.to_bytes()
    assert any("counts once" in note for note in same.notes)
    with pytest.raises(UsageError, match=r"hold the same content.*curvature [0-9a-f]{16} and .*curvature [0-9a-f]{16}"):
        cm.merge([a, b, a], strategy="weighed", stats=stats_of("a", "b", "c"))


def test_what_was_claimed_must_be_what_is_given() -> None:
    claim = Claim(stats={"curvature": bytes(32)})
    with pytest.raises(MismatchError, match=r"has digest [0-9a-f]{16}; 0000000000000000 was claimed"):
        into_memory([(models.state("a"), claim)], Recipe("weighed"), None, Options(), beside(stats=stats_of("a")))
    with pytest.raises(NeedsError, match="is claimed as 0000000000000000 and not here"):
        into_memory([(models.state("a"), claim)], Recipe("weighed"), None, Options())
    unread = beside(stats=[{"curvature": 5}])
    merged = into_memory([(models.state("a"), claim)], Recipe("linear"), None, Options(), unread)
    assert merged.receipt.contributions[0][1] == claim, "what is claimed and not needed is not read"


def beside(**how: Any) -> Any:
    from crdtmerge.resolve.beside import Beside

    return Beside(**how)


@pytest.mark.parametrize("rehash", [False, True])
def test_a_statistic_that_changes_meanwhile_is_an_error(tmp_path: Path, rehash: bool) -> None:
    (path,), (stat,) = saved(tmp_path, "a")
    asked = [(path, Claim())], Recipe("weighed"), None, Options(rehash=rehash), beside(stats=[{"curvature": stat}])
    with Merge(*asked) as one:
        data = bytearray(stat.read_bytes())
        data[-1] ^= 1
        if rehash:  # behind the back of all stamps
            source = one._beside.statistics[0]["curvature"]
            source.check_unchanged = lambda: None  # type: ignore[method-assign]
        stat.write_bytes(data)
        with pytest.raises(ChangedError, match="changed while it was read"):
            one.run(Nowhere(), folder=False)


class Nowhere:
    def write(self, name: str, offset: int, data: object) -> None:
        """Drop it."""


def test_a_statistic_is_the_same_from_a_file_from_memory_and_from_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistic, "STRETCH_BYTES", limits.PIECE_BYTES)
    tensors = {"b": torch.arange(600_000.0), "a": torch.ones(3, dtype=torch.bfloat16), "e": torch.ones(0, 4)}
    path = models.save(tmp_path / "s.safetensors", tensors)
    data = path.read_bytes()
    digest = hashlib.sha256(data).digest()
    for value in (path, str(path), tensors, Kept.in_memory(digest, data)):
        one = Statistic.of(value, "it")
        assert (one.digest, one.nbytes, one.to_bytes()) == (digest, len(data), data)
        one.check_again()
        one.close()
    flipped = Kept.in_memory(digest, data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ChangedError, match="no longer those that were kept"):
        _ = Statistic.of(flipped, "it").digest
    for cut in (0, 5, 8, 40):
        with pytest.raises(ChangedError, match="not the file"):
            Statistic.of(Kept.in_memory(digest, data[:cut]), "it")


# ---- further inputs


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    return {
        "anchor": models.save(tmp_path / "anchor.safetensors", models.state("z")),
        "shift": put(tmp_path / "shift.txt", b"0.5"),
    }


def anchored(inputs: Any, people: str = "ab", **more: Any) -> cm.Merged:
    return cm.merge([models.state(who) for who in people], strategy="anchored", inputs=inputs, **more)


def test_further_models_and_files_are_read_and_named_in_the_recipe(inputs: dict[str, Path]) -> None:
    merged = anchored(inputs)
    wanted = (models.state("a")["scale"].double() + models.state("b")["scale"].double()) / 2
    assert merged["scale"].item() == pytest.approx((wanted + 0.5 * models.state("z")["scale"].double()).item())
    named = merged.receipt.recipe.inputs
    assert named["shift"] == hashlib.sha256(b"0.5").digest()
    assert named["anchor"] == cm.merge([models.state("z")], strategy="linear").receipt.contributions[0][0]
    in_memory = anchored({"anchor": models.state("z"), "shift": inputs["shift"]})
    assert in_memory.receipt.to_bytes() == merged.receipt.to_bytes()
    inputs["shift"].write_text("0.25")
    assert anchored(inputs).receipt.recipe.id != merged.receipt.recipe.id


def test_inputs_that_are_missing_or_others_are_refused(inputs: dict[str, Path]) -> None:
    with pytest.raises(NeedsError, match=r"needs the input 'shift': give it with --input shift=PATH"):
        anchored({"anchor": inputs["anchor"]})
    with pytest.raises(UsageError, match=r"has no input 'more'. It has: anchor, shift"):
        anchored(inputs | {"more": inputs["shift"]})
    with pytest.raises(UsageError, match=r"strategy 'linear' has no input 'anchor'. It has: none"):
        cm.merge([models.state("a")], strategy="linear", inputs=inputs)
    with pytest.raises(UsageError, match="inputs is list"):
        anchored([1])
    with pytest.raises(UsageError, match="the input 'shift' is dict"):
        anchored(inputs | {"shift": {}})
    with pytest.raises(InputError, match="is no regular file"):
        anchored(inputs | {"shift": inputs["shift"].parent})
    with pytest.raises(InputError, match="cannot be read"):
        anchored(inputs | {"shift": "no/such\0file"})
    with pytest.raises(MismatchError, match="the input 'anchor' lacks it"):
        anchored(inputs | {"anchor": {"w": torch.ones(3)}})
    with pytest.raises(NonFiniteError, match="Repair the model"):
        anchored(inputs | {"anchor": models.state("z") | {"scale": torch.tensor(float("inf"))}})


def test_a_recipe_that_names_its_inputs_takes_no_others(inputs: dict[str, Path]) -> None:
    named = anchored(inputs).receipt.recipe
    asked = Recipe("anchored", inputs=named.inputs)
    again = cm.merge([models.state("a"), models.state("b")], strategy=asked, inputs=inputs)
    assert again.receipt.recipe == named
    with pytest.raises(NeedsError, match=rf"needs the input 'anchor' with digest {named.inputs['anchor'].hex()[:16]}"):
        cm.merge([models.state("a")], strategy=asked)
    inputs["shift"].write_text("0.25")
    with pytest.raises(MismatchError, match=r"the input 'shift' has digest [0-9a-f]{16}; the recipe names"):
        cm.merge([models.state("a"), models.state("b")], strategy=asked, inputs=inputs)
    with pytest.raises(UsageError, match="'linear' has no input 'anchor'"):
        cm.merge([models.state("a")], strategy=Recipe("linear", inputs=named.inputs))
    with pytest.raises(UsageError, match="a name with a digest of 32 bytes"):
        Recipe("anchored", inputs={"shift": b"short"})


def test_an_input_file_that_changes_meanwhile_is_an_error(inputs: dict[str, Path]) -> None:
    models_ = [(models.state("a"), Claim())]
    with Merge(models_, Recipe("anchored"), None, Options(rehash=True), beside(inputs=inputs)) as one:
        inputs["shift"].write_text("0.75")
        with pytest.raises(ChangedError, match="the input 'shift' changed while it was read"):
            one.run(Nowhere(), folder=False)


# ---- plans


def made(path: Path, inputs: Any, people: str = "ab", strategy: str = "anchored", **more: Any) -> Plan:
    """A plan as ``crdtmerge plan`` makes one."""
    said = [(models.state(who), Claim()) for who in people]
    with Merge(said, Recipe(strategy, **more), None, Options(), beside(inputs=inputs)) as one:
        plan_file.write(path, one.plan, one.unplanned_id, one.recipe.inputs)
        return one.plan


def test_a_plan_is_applied_and_not_made_again_and_enters_the_recipe(inputs: dict[str, Path], tmp_path: Path) -> None:
    plan = made(tmp_path / "a.plan", inputs)
    plain, before = anchored(inputs), Anchored.plans
    planned = anchored(inputs, plan=tmp_path / "a.plan")
    assert Anchored.plans == before
    assert planned.receipt.output_digest == plain.receipt.output_digest
    assert planned.receipt.recipe.inputs["plan"] == plan.digest
    assert planned.receipt.merge_id != plain.receipt.merge_id
    assert planned.receipt.to_bytes() == anchored(inputs, plan=plan).receipt.to_bytes()
    without_shift = anchored({"anchor": inputs["anchor"]}, plan=tmp_path / "a.plan")
    assert without_shift.receipt.to_bytes() == planned.receipt.to_bytes(), "a plan does without what it was made from"
    with pytest.raises(NeedsError, match="needs the input 'anchor'"):
        anchored({}, plan=tmp_path / "a.plan")
    other = anchored(inputs, plan=Plan({"shift": 0.0}))
    assert other.receipt.output_digest != plain.receipt.output_digest


def test_a_plan_of_another_set_recipe_or_input_is_refused_with_both_ids(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    made(tmp_path / "a.plan", inputs)
    _, own = plan_file.read(tmp_path / "a.plan")
    other = anchored(inputs, "abc").receipt.merge_id
    with pytest.raises(MismatchError, match=rf"is the plan of merge {own.hex()}; this is merge {other.hex()}"):
        anchored(inputs, "abc", plan=tmp_path / "a.plan")
    for more in ({"seed": 5}, {"dtype": "bf16"}, {"exclude": ["scale"]}, {"weights": [1, 2]}):
        with pytest.raises(MismatchError, match="this is merge"):
            anchored(inputs, plan=tmp_path / "a.plan", **more)
    inputs["shift"].write_text("0.25")
    with pytest.raises(MismatchError, match="this is merge"):
        anchored(inputs, plan=tmp_path / "a.plan")


def test_a_recipe_that_names_a_plan_takes_no_other(inputs: dict[str, Path], tmp_path: Path) -> None:
    plan = made(tmp_path / "a.plan", inputs)
    asked = Recipe("anchored", inputs={"plan": plan.digest})
    people = [models.state("a"), models.state("b")]
    with pytest.raises(NeedsError, match=rf"the recipe names the plan {plan.digest.hex()[:16]}: give it with --plan"):
        cm.merge(people, strategy=asked, inputs=inputs)
    with pytest.raises(MismatchError, match="the plan has digest"):
        cm.merge(people, strategy=asked, inputs=inputs, plan=Plan({"shift": 3.0}))
    found = cm.merge(people, strategy=asked, inputs=inputs, plan=tmp_path / "a.plan")
    assert found.receipt.to_bytes() == anchored(inputs, plan=plan).receipt.to_bytes()


def test_what_is_no_plan_is_refused(inputs: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="plan"):
        anchored(inputs, plan=inputs["shift"])
    with pytest.raises(InputError, match="cannot be read"):
        anchored(inputs, plan=inputs["shift"].with_name("no"))
    with pytest.raises(UsageError, match="the plan is dict"):
        anchored(inputs, plan={"shift": 1.0})
    with pytest.raises(UsageError, match="strategy 'linear' makes no plan"):
        cm.merge([models.state("a")], strategy="linear", plan=Plan())


def test_a_merge_whose_plan_ran_a_model_is_of_class_p_until_the_plan_is_named(tmp_path: Path) -> None:
    people = [models.state("a"), models.state("b")]
    plain = cm.merge(people, strategy="learnt").receipt
    assert (plain.exact, bool(plain.build)) == (False, True)
    made(tmp_path / "a.plan", {}, strategy="learnt")
    planned = cm.merge(people, strategy="learnt", plan=tmp_path / "a.plan").receipt
    assert (planned.exact, planned.build) == (True, None)
    assert planned.output_digest == plain.output_digest


# ---- verification


@pytest.fixture
def out(tmp_path: Path) -> Path:
    paths, stats = saved(tmp_path, *WHO)
    cm.merge(paths, strategy="weighed", stats=[{"curvature": path} for path in stats]).save(tmp_path / "out")
    return tmp_path / "out"


def test_verify_finds_statistics_by_inputs_json(out: Path) -> None:
    hints = json.loads((out / "inputs.json").read_bytes())
    assert sorted(hints) == ["base", "contributions", "stats"]
    assert hints["stats"].keys() == {row["id"] for row in hints["contributions"]}
    assert {Path(one["curvature"]).name for one in hints["stats"].values()} == {
        f"{w}.curvature.safetensors" for w in WHO
    }
    assert cm.verify(out).answer == "same"


def test_verify_can_not_tell_without_a_statistic_or_with_another(out: Path, tmp_path: Path) -> None:
    stat = tmp_path / "b.curvature.safetensors"
    data = stat.read_bytes()
    stat.unlink()
    verdict = cm.verify(out)
    assert (verdict.answer, "the curvature of" in verdict.reason) == ("unknown", True)
    models.save(stat, curvature("z"))
    assert cm.verify(out).answer == "unknown"
    (tmp_path / "elsewhere").write_bytes(data)
    models_ = [tmp_path / f"{who}.safetensors" for who in WHO]
    others = [tmp_path / f"{who}.curvature.safetensors" for who in "ac"]
    assert cm.verify(out, [*models_, *others]).answer == "unknown"
    assert cm.verify(out, [tmp_path / "elsewhere", *others, *models_]).answer == "same"
    assert cm.verify(out, [*others, *models_, tmp_path / "elsewhere"]).answer == "same"


def test_verify_sees_another_byte_and_another_claim(out: Path) -> None:
    weights = out / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert cm.verify(out).answer == "different"


@pytest.mark.parametrize("hints", [{"stats": 5}, {"stats": {"x": 5}}, {"inputs": 5}, {"inputs": {"plan": 5}}])
def test_a_list_of_inputs_that_is_none_is_no_crash(out: Path, hints: dict[str, Any]) -> None:
    table = json.loads((out / "inputs.json").read_bytes()) | hints
    (out / "inputs.json").write_text(json.dumps(table))
    assert cm.verify(out).answer in ("different", "same", "unknown")


def test_verify_of_a_planned_merge_applies_the_plan(inputs: dict[str, Path], tmp_path: Path) -> None:
    paths, _ = saved(tmp_path, "a", "b")
    made(tmp_path / "a.plan", inputs)
    out = tmp_path / "out"
    cm.merge(paths, strategy="anchored", inputs=inputs, plan=tmp_path / "a.plan").save(out)
    hints = json.loads((out / "inputs.json").read_bytes())
    assert {name: Path(path).name for name, path in hints["inputs"].items()} == {
        "anchor": "anchor.safetensors",
        "shift": "shift.txt",
        "plan": "a.plan",
    }
    before = Anchored.plans
    assert cm.verify(out).answer == "same"
    assert Anchored.plans == before
    everything = [*paths, *inputs.values(), tmp_path / "a.plan"]
    assert cm.verify(out, everything).answer == cm.verify(out, everything[::-1]).answer == "same"
    assert cm.verify(out, [path for path in everything if path != inputs["shift"]]).answer == "same"
    for gone in (*paths, inputs["anchor"], tmp_path / "a.plan"):
        there = [path for path in everything if path != gone]
        verdict = cm.verify(out, there)
        assert (verdict.answer, "is missing" in verdict.reason) == ("unknown", True), gone
    made(tmp_path / "a.plan", inputs, "abc")
    assert cm.verify(out).answer == "same", "the plan holds the same values"
    plan_file.write(tmp_path / "a.plan", Plan({"shift": 0.0}), bytes(32))
    assert cm.verify(out).answer == "unknown"


def test_a_plan_that_was_in_memory_can_not_be_found_again(inputs: dict[str, Path], tmp_path: Path) -> None:
    paths, _ = saved(tmp_path, "a", "b")
    cm.merge(paths, strategy="anchored", inputs=inputs, plan=Plan({"shift": 0.5})).save(tmp_path / "out")
    verdict = cm.verify(tmp_path / "out")
    assert (verdict.answer, "the plan" in verdict.reason) == ("unknown", True)


def test_class_p_is_verified_by_the_build_that_made_it_and_by_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, _ = saved(tmp_path, "a", "b")
    merged = cm.merge(paths, strategy="guessed")
    merged.save(tmp_path / "out")
    receipt = json.loads((tmp_path / "out/receipt.json").read_bytes())
    assert (receipt["class"], torch.__version__ in receipt["build"]) == ("P", True)
    assert cm.verify(tmp_path / "out").answer == "same"
    data = (tmp_path / "out/receipt.json").read_bytes()
    for lie in (data.replace(b'"class": "P"', b'"class": "E"'), data.replace(receipt["build"].encode(), b"")):
        assert Receipt.from_bytes(data, "it") == merged.receipt
        (tmp_path / "out/receipt.json").write_bytes(lie)
        assert cm.verify(tmp_path / "out").answer != "same"
    (tmp_path / "out/receipt.json").write_bytes(data)
    monkeypatch.setattr(verify, "build_here", lambda device: "torch 9 toaster")
    verdict = cm.verify(tmp_path / "out")
    assert verdict.answer == "unknown"
    assert receipt["build"] in verdict.reason
    assert "torch 9 toaster" in verdict.reason


def test_another_plan_of_a_model_is_another_merge_of_class_p(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, _ = saved(tmp_path, "a", "b")
    cm.merge(paths, strategy="learnt").save(tmp_path / "out")
    assert cm.verify(tmp_path / "out").answer == "same"
    monkeypatch.setattr(Learnt, "found", 0.375)
    assert cm.verify(tmp_path / "out").answer == "different"


# ---- recipes and receipts with inputs


@pytest.mark.parametrize(
    "inputs", [{}, [], {"a": 5}, {"a": "00"}, {"a": "zz" * 32}, {"a": "AB" * 32}, {5: "ab" * 32}, "ab"], ids=str
)
def test_the_inputs_of_a_recipe_have_one_spelling(inputs: Any) -> None:
    value = Recipe("anchored", version=1, inputs={"a": bytes(32)}).canonical()
    assert Recipe.from_canonical(value).canonical() == value
    with pytest.raises(ValueError, match="inputs"):
        Recipe.from_canonical(value | {"inputs": inputs})


def test_a_plan_is_one_input_among_others() -> None:
    plain = Recipe("anchored", version=1, inputs={"z": bytes(32), "a": bytes(32)})
    planned = plain.planned(b"\1" * 32)
    assert list(planned.inputs) == ["a", "plan", "z"]
    assert planned.planned(None) == plain
    assert len({planned.id, plain.id, planned.planned(b"\2" * 32).id}) == 3
