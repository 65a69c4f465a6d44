"""Inputs that do not fit each other are refused with a sentence that helps, or merged as the option given says.

Every refusal: our error class, the file, the tensor, both values and a way out; exit code 2; one JSON document that
says so; nothing written and no input touched.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from tests.resolve import models
from tests.resolve.running import Ran, here

BASE, A, B = models.state("base"), models.state("a"), models.state("b")
NAN, INF = float("nan"), float("inf")


def without(tensors: models.State, *names: str) -> models.State:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def spoiled(tensors: models.State, *values: tuple[int, float]) -> models.State:
    weight = tensors["blocks.0.weight"].clone()
    for at, value in values:
        weight.view(-1)[at] = value
    return tensors | {"blocks.0.weight": weight}


def quantised(folder: Path, tensors: models.State) -> Path:
    return models.save_folder(folder, tensors, {"config.json": '{"quantization_config": {"bits": 4}}'})


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FEW_WORDS, MORE_WORDS = torch.ones(32, 4), torch.ones(35, 4)
LAYERS = {f"layers.{n}.w": torch.ones(2) for n in range(7)}


class Row(NamedTuple):
    """Models by file name (or what writes one), the rest of the command, and what must be said."""

    given: dict[str, models.State | Callable[[Path], Path]]
    options: str
    kind: str
    words: list[str]


TABLE: dict[str, Row] = {
    # Names
    "one tensor more": Row(
        {"a": A, "b": B | {"extra": torch.ones(2)}},
        "{a} {b}",
        "MismatchError",
        ["{a} lacks 1 tensors that {b} has: 'extra'", "--missing base", "--missing skip", "--exclude"],
    ),
    "one tensor less": Row(
        {"a": A, "b": without(B, "scale")},
        "{a} {b}",
        "MismatchError",
        ["{b} lacks 1 tensors that {a} has: 'scale'", "--missing", "--exclude"],
    ),
    "many tensors less": Row(
        {"a": A | LAYERS, "b": B},
        "{b} {a}",
        "MismatchError",
        ["{b} lacks 7 tensors that {a} has: 'layers.0.w', ", "'layers.4.w' and 2 more", "--missing"],
    ),
    "the base lacks one": Row(
        {"a": A, "b": B, "base": without(BASE, "scale")},
        "{a} {b} --base {base} --strategy ties",
        "MismatchError",
        ["{base} lacks 1 tensors that ", "'scale'", "--missing"],
    ),
    "the base lacks one and the others may skip it": Row(
        {"a": A, "b": B, "base": without(BASE, "scale")},
        "{a} {b} --base {base} --strategy ties --missing skip",
        "MismatchError",
        ["the base lacks tensor 'scale', which ", "differences from the base", "--exclude"],
    ),
    "tied weights": Row(
        {"a": {EMBED: FEW_WORDS, HEAD: FEW_WORDS.clone()}, "b": {EMBED: FEW_WORDS * 2}},
        "{a} {b}",
        "MismatchError",
        ["{b} lacks 1 tensors that {a} has: 'lm_head.weight'", "equals 'model.embed_tokens.weight'", "tied"],
    ),
    # Shapes
    "shapes": Row(
        {"a": A, "b": B | {"blocks.0.bias": torch.ones(65)}, "base": BASE},
        "{a} {b} --base {base} --strategy ties",
        "MismatchError",
        ["{b}: tensor 'blocks.0.bias' has shape [65]; {base} has [64]", "one architecture", "--exclude"],
    ),
    "shapes of as many elements": Row(
        {"a": A | {"blocks.0.weight": A["blocks.0.weight"].reshape(17, 30)}, "base": BASE},
        "{a} --base {base} --strategy ties",
        "MismatchError",
        ["{a}: tensor 'blocks.0.weight' has shape [17, 30]; {base} has [30, 17]", "--exclude"],
    ),
    "an added vocabulary": Row(
        {"a": A | {EMBED: FEW_WORDS}, "b": B | {EMBED: MORE_WORDS}, "base": BASE | {EMBED: FEW_WORDS}},
        "{a} {b} --base {base} --strategy ties",
        "MismatchError",
        ["{b}: tensor 'model.embed_tokens.weight' has shape [35, 4]; {base} has [32, 4]", "Resize the vocabulary"],
    ),
    "an added vocabulary in the head": Row(
        {"a": A | {HEAD: FEW_WORDS}, "b": B | {HEAD: MORE_WORDS}},
        "{a} {b}",
        "MismatchError",
        ["'lm_head.weight'", "[35, 4]", "[32, 4]", "Resize the vocabulary first", "--exclude"],
    ),
    "shapes of buffers": Row(
        {"a": A, "b": B | {models.BUFFER: torch.arange(17)}},
        "{a} {b}",
        "MismatchError",
        ["tensor 'position_ids' has shape ", "[17]", "[1, 16]", "--exclude"],
    ),
    # Types
    "types": Row(
        {"a": A, "b": models.state("b", "BF16"), "base": BASE},
        "{a} {b} --base {base} --strategy ties",
        "MismatchError",
        ["{b}: tensor 'blocks.0.bias' is BF16; in {base} it is F32", "--dtype"],
    ),
    "integers against floats": Row(
        {"a": A, "b": B | {models.BUFFER: torch.ones(1, 16)}},
        "{a} {b}",
        "MismatchError",
        ["tensor 'position_ids' is ", "I64", "F32"],
    ),
    "integers against floats with a dtype": Row(
        {"a": A | {"scale": torch.tensor(1)}, "b": B},
        "{a} {b} --dtype float32",
        "MismatchError",
        ["tensor 'scale' is ", "I64", "F32"],
    ),
    # Integers and bools
    "integers that differ": Row(
        {"a": A, "b": B | {models.BUFFER: torch.arange(1, 17).reshape(1, 16)}},
        "{a} {b}",
        "MismatchError",
        ["tensor 'position_ids' (I64) differs", "{a}", "{b}", "never averaged", "--exclude"],
    ),
    "bools that differ": Row(
        {"a": A | {"mask": torch.tensor([True, False])}, "b": B | {"mask": torch.tensor([True, True])}},
        "{a} {b}",
        "MismatchError",
        ["tensor 'mask' (BOOL) differs", "never averaged", "--exclude"],
    ),
    "an integer of the base that differs": Row(
        {"a": A, "b": B, "base": BASE | {models.BUFFER: torch.zeros(1, 16, dtype=torch.int64)}},
        "{a} {b} --base {base} --strategy ties",
        "MismatchError",
        ["tensor 'position_ids' (I64) differs from that of {base}"],
    ),
    # Quantised
    "packed codes": Row(
        {"a": A, "b": B | {"blocks.0.qweight": torch.ones(4, dtype=torch.int32)}},
        "{a} {b}",
        "CheckpointError",
        ["{b}: ", "quantised", "tensor 'blocks.0.qweight'", "then quantise"],
    ),
    "fp8": Row(
        {"a": A, "b": B | {"blocks.0.weight": torch.ones(30, 17).to(torch.float8_e4m3fn)}},
        "{a} {b}",
        "CheckpointError",
        ["{b}: ", "quantised", "tensor 'blocks.0.weight' of dtype F8_E4M3"],
    ),
    "fp8 scales": Row(
        {"a": A, "b": B | {"blocks.0.weight_scale_inv": torch.ones(1)}},
        "{a} {b}",
        "CheckpointError",
        ["{b}: ", "tensor 'blocks.0.weight_scale_inv'"],
    ),
    "a config that says quantised": Row(
        {"a": A, "b": lambda path: quantised(path, B)},
        "{a} {b}",
        "CheckpointError",
        ["{b}/config.json: ", "the key quantization_config"],
    ),
    "complex numbers": Row(
        {"a": A, "b": B | {"scale": torch.tensor(1j)}}, "{a} {b}", "CheckpointError", ["{b}: ", "'scale' of dtype C64"]
    ),
    # NaN and infinity
    "NaN": Row(
        {"a": A, "b": spoiled(B, (7, NAN), (9, INF), (500, -INF))},
        "{a} {b}",
        "NonFiniteError",
        ["{b}: tensor 'blocks.0.weight' holds 3 values that are NaN or infinite, the first at index 7", "--exclude"],
    ),
    "infinity in the base": Row(
        {"a": A, "b": B, "base": spoiled(BASE, (509, -INF))},
        "{a} {b} --base {base} --strategy ties",
        "NonFiniteError",
        ["{base}: tensor 'blocks.0.weight' holds 1 values", "index 509", "--allow-nonfinite"],
    ),
    "NaN in a base that is not used": Row(
        {"a": A, "b": B, "base": spoiled(BASE, (0, NAN))},
        "{a} {b} --base {base}",
        "NonFiniteError",
        ["{base}: tensor 'blocks.0.weight'"],
    ),
    "a scalar that is infinite": Row(
        {"a": A | {"scale": torch.tensor(INF)}, "b": B},
        "{a} {b}",
        "NonFiniteError",
        ["{a}: tensor 'scale' holds 1 values", "index 0"],
    ),
    "overflow of the output": Row(
        {"a": {"z": torch.tensor([1.0, 6e4, -6e4]).half()}, "b": {"z": torch.tensor([1.0, 5e4, -5e4]).half()}},
        "{a} {b} --strategy linear --set normalize=false",
        "NonFiniteError",
        ["tensor 'z': 2 merged values, the first at index 1, are too large for F16", "--dtype"],
    ),
    "overflow beyond the first stretch": Row(
        {"a": {"w": torch.ones(70), "z": torch.cat([torch.zeros(300_000), torch.tensor([3e38])])}},
        "{a} --strategy linear --set normalize=false --weight 2",
        "NonFiniteError",
        ["tensor 'z': 1 merged values, the first at index 300000, are too large for F32"],
    ),
    "overflow of a narrower output": Row(
        {"a": {"z": torch.tensor([1e6])}, "b": {"z": torch.tensor([1e6])}},
        "{a} {b} --dtype float16",
        "NonFiniteError",
        ["tensor 'z': 1 merged values", "F16", "--dtype"],
    ),
    # What is missing altogether
    "no base": Row(
        {"a": A, "b": B}, "{a} {b} --strategy ties", "NeedsError", ["strategy 'ties' needs a base", "--base"]
    ),
    "no base for what is missing": Row(
        {"a": A, "b": B}, "{a} {b} --missing base", "NeedsError", ["--missing base takes", "give it with --base"]
    ),
    "no base for slerp of differences": Row(
        {"a": A, "b": B}, "{a} {b} --strategy slerp --set space=task_vectors", "NeedsError", ["needs a base"]
    ),
    "no such model": Row({"a": A}, "{a} {folder}/nowhere", "InputError", ["{folder}/nowhere: cannot be opened"]),
    "no such base": Row({"a": A}, "{a} --base {folder}/nowhere", "InputError", ["{folder}/nowhere: cannot be opened"]),
    # Directions
    "opposite directions": Row(
        {"a": {"w": torch.tensor([1.0, 2.0, 3.0])}, "b": {"w": torch.tensor([-1.0, -2.0, -3.0])}},
        "{a} {b} --strategy slerp",
        "MismatchError",
        ["tensor 'w'", "opposite directions", "cosine -1.000000", "--exclude", "--strategy linear"],
    ),
    # The request
    "an unknown strategy": Row(
        {"a": A}, "{a} --strategy tie", "UnknownStrategyError", ["'tie'", "Did you mean ties?", "slerp"]
    ),
    "an unknown parameter": Row(
        {"a": A, "base": BASE},
        "{a} --base {base} --strategy ties --set densty=0.3",
        "ParameterError",
        ["no parameter 'densty'", "Did you mean density?"],
    ),
    "a parameter out of range": Row(
        {"a": A, "base": BASE},
        "{a} --base {base} --strategy ties --set density=1.5",
        "ParameterError",
        ["density", "1.5", "less than or equal to 1"],
    ),
    "a percentage": Row(
        {"a": A, "base": BASE}, "{a} --base {base} --strategy ties --set density=30%", "ParameterError", ["'30%'"]
    ),
    "shares of some tensors of the whole model": Row(
        {"a": A, "base": BASE},
        "{a} --base {base} --strategy ties --set density@scale=0.5",
        "ParameterError",
        ["scope=model", "scope=tensor"],
    ),
    "a setting without a value": Row({"a": A}, "{a} --set density", "UsageError", ["--set density", "KEY=VALUE"]),
    "a setting for no tensors": Row({"a": A}, "{a} --set density@=1", "UsageError", ["--set density@=1", "KEY@GLOB"]),
    "a setting given twice": Row(
        {"a": A}, "{a} --set density=1 --set density=0.5", "UsageError", ["--set density is given twice", "1", "0.5"]
    ),
    "a dtype of no output": Row({"a": A}, "{a} --dtype int8", "UsageError", ["dtype = 'int8'", "bfloat16"]),
    "an unknown device": Row({"a": A}, "{a} --device tpu", "UsageError", ["device = 'tpu'", "cpu or cuda"]),
    "an unknown way with gaps": Row({"a": A}, "{a} --missing zero", "UsageError", ["'zero'", "base or skip"]),
    "a seed of no 64 bits": Row({"a": A}, "{a} --set seed=-1", "UsageError", ["seed = '-1'", "2^64"]),
}  # fmt: skip


def written(folder: Path, given: dict[str, models.State | Callable[[Path], Path]]) -> dict[str, Path]:
    paths = {"folder": folder}
    for who, tensors in given.items():
        paths[who] = tensors(folder / who) if callable(tensors) else models.save(folder / f"{who}.safetensors", tensors)
    return paths


def command(paths: dict[str, Path], options: str) -> list[str]:
    return ["merge", *(word.format(**paths) for word in options.split())]


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
@pytest.mark.parametrize("case", TABLE)
def test_what_does_not_fit_is_refused_with_a_sentence_and_leaves_nothing(case: str, out: str, tmp_path: Path) -> None:
    given, options, kind, words = TABLE[case]
    paths = written(tmp_path, given)
    before = models.tree(tmp_path)
    ran = here(*command(paths, options), "-o", tmp_path / out, "--json")
    assert models.tree(tmp_path) == before
    assert ran.code == 2
    message = ran.json["error"]["message"]
    assert ran.json == {"error": {"kind": kind, "message": message}}
    assert [word for word in words if word.format(**paths) not in message] == [], message
    assert ran.err == f"error: {message}\n"
    assert message.isprintable()


def test_a_refusal_without_json_is_one_line_on_stderr(tmp_path: Path) -> None:
    paths = written(tmp_path, {"a": A, "b": without(B, "scale")})
    ran = here(*command(paths, "{a} {b}"))
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize("case", ["integers against floats", "integers against floats with a dtype"])
def test_no_dtype_is_advised_where_none_would_help(case: str, tmp_path: Path) -> None:
    given, options, *_ = TABLE[case]
    message = here(*command(written(tmp_path, given), options), "--json").json["error"]["message"]
    assert "--dtype" not in message
    assert "--exclude" in message


def test_a_model_of_excluded_tensors_only_is_copied(tmp_path: Path) -> None:
    paths = written(tmp_path, {"a": A, "b": B})
    out = tmp_path / "out.safetensors"
    assert here(*command(paths, "{a} {b} --exclude *"), "-o", out).code == 0
    ids = {here("inspect", paths[who], "--json").json["id"]: held for who, held in (("a", A), ("b", B))}
    same(load_file(out), ids[min(ids)])


# What the options do


def same(found: dict[str, torch.Tensor], wanted: models.State) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        raw = (
            found[name].contiguous().reshape(-1).view(torch.uint8),
            tensor.contiguous().reshape(-1).view(torch.uint8),
        )
        assert torch.equal(*raw) if tensor.numel() else True, name


def merged(tmp_path: Path, given: dict[str, models.State], options: str) -> dict[str, torch.Tensor]:
    out = tmp_path / "out.safetensors"
    ran = here(*command(written(tmp_path, given), options), "-o", out)  # type: ignore[arg-type]
    assert ran.code == 0, ran.err
    found: dict[str, torch.Tensor] = load_file(out)
    assert here("verify", out).code == 0
    return found


def ints(*values: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


THREE = {
    "a": {"all": ints(1, 2), "some": ints(10, 20), "only a": ints(7)},
    "b": {"all": ints(3, 6), "some": ints(30, 60)},
    "c": {"all": ints(5, 1)},
    "base": {"all": ints(2, 2), "some": ints(2, 4), "only a": ints(1), "only base": ints(9)},
}


def test_missing_skip_merges_those_that_have_a_tensor(tmp_path: Path) -> None:
    given = {who: THREE[who] for who in "abc"}
    found = merged(tmp_path, given, "{a} {b} {c} --missing skip --weight 1 --weight 3 --weight 4")
    same(found, {"all": ints(30 / 8, 24 / 8), "some": ints(100 / 4, 200 / 4), "only a": ints(7)})


def test_missing_base_lets_the_base_stand_in_with_the_weight_of_who_lacks_it(tmp_path: Path) -> None:
    found = merged(tmp_path, THREE, "{a} {b} {c} --base {base} --missing base --weight 1 --weight 3 --weight 4")
    some = ints((10 + 90 + 8) / 8, (20 + 180 + 16) / 8)
    same(found, {"all": ints(30 / 8, 24 / 8), "some": some, "only a": ints((7 + 7) / 8), "only base": ints(9)})


@pytest.mark.parametrize("missing", ["base", "skip"])
def test_what_is_missing_has_no_difference_from_the_base(missing: str, tmp_path: Path) -> None:
    found = merged(tmp_path, THREE, f"{{a}} {{b}} {{c}} --base {{base}} --missing {missing} --strategy task_arithmetic")
    same(found, {"all": ints(5, 5), "some": ints(38, 76), "only a": ints(7), "only base": ints(9)})


def test_a_mean_of_differences_counts_who_lacks_a_tensor_only_with_missing_base(tmp_path: Path) -> None:
    options = "{a} {b} {c} --base {base} --strategy dare --set density=1 --set combine=mean --missing "
    for missing, count in (("base", 3), ("skip", 2)):
        folder = tmp_path / missing
        folder.mkdir()
        found = merged(folder, THREE, options + missing)
        assert found["some"].tolist() == [float(torch.tensor(2 + 36 / count)), float(torch.tensor(4 + 72 / count))]


def test_buffers_that_some_lack_are_kept_with_missing(tmp_path: Path) -> None:
    given = {"a": A, "b": without(B, models.BUFFER)}
    assert torch.equal(merged(tmp_path, given, "{a} {b} --missing skip")[models.BUFFER], A[models.BUFFER])


def test_types_are_merged_in_the_dtype_that_was_asked_for(tmp_path: Path) -> None:
    given = {
        "a": {"w": ints(1, 2, dtype=torch.bfloat16)},
        "b": {"w": ints(3, 4, dtype=torch.float64)},
        "c": {"w": ints(2, 9, dtype=torch.float16)},
    }
    same(merged(tmp_path, given, "{a} {b} {c} --dtype float32"), {"w": ints(2, 5)})


def test_a_model_is_rounded_once_to_a_narrower_dtype(tmp_path: Path) -> None:
    third = torch.tensor([1 / 3, 2 / 3, 1e-3], dtype=torch.float64)
    given = {"a": {"w": third}}
    same(merged(tmp_path, given, "{a} --dtype bfloat16"), {"w": third.float().to(torch.bfloat16)})


def test_excluded_tensors_are_copied_from_the_base(tmp_path: Path) -> None:
    given = {"a": A | {EMBED: MORE_WORDS}, "b": spoiled(B, (3, NAN)) | {EMBED: FEW_WORDS}}
    base = BASE | {EMBED: torch.zeros(31, 4, dtype=torch.bfloat16)}
    options = "{a} {b} --base {base} --strategy ties --exclude *embed* --exclude blocks.*.weight"
    found = merged(tmp_path, given | {"base": base}, options)
    same({name: found[name] for name in (EMBED, "blocks.0.weight")}, {n: base[n] for n in (EMBED, "blocks.0.weight")})
    assert not torch.equal(found["blocks.0.bias"], BASE["blocks.0.bias"])


def test_excluded_tensors_without_a_base_are_copied_from_the_first_in_canonical_order(tmp_path: Path) -> None:
    given = {"a": A, "b": B, "c": models.state("c")}
    found = merged(tmp_path, given, "{a} {b} {c} --exclude *bias")
    ids = {here("inspect", tmp_path / f"{who}.safetensors", "--json").json["id"]: who for who in given}
    assert torch.equal(found["blocks.0.bias"], given[ids[min(ids)]]["blocks.0.bias"])


# NaN and infinity, where they were asked for

ODD = {
    "a": spoiled(A, (1, NAN), (2, INF), (3, INF), (4, 0.0)),
    "b": spoiled(B, (1, 1.0), (2, 1.0), (3, -INF), (4, NAN)),
    "base": spoiled(BASE, (5, INF)),
}


@pytest.mark.parametrize("strategy", ["weight_average", "task_arithmetic", "ties", "dare", "dare_ties", "magmax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nonfinite_values_propagate_alike_however_it_runs(
    strategy: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {
        who: {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in held.items()}
        for who, held in ODD.items()
    }
    options = f"{{a}} {{b}} --base {{base}} --strategy {strategy} --allow-nonfinite"
    found = merged(tmp_path, given, options)
    paths = {who: tmp_path / f"{who}.safetensors" for who in given}
    digests = set()
    for kernels, order, threads in (("torch", "{a} {b}", 1), ("numba", "{b} {a}", 4), ("numba", "{a} {b}", 2)):
        monkeypatch.setenv("CRDTMERGE_KERNELS", kernels)
        ran = here(*command(paths, options.replace("{a} {b}", order)), "--threads", threads, "--json")
        digests.add(ran.json["output_digest"])
    assert len(digests) == 1
    weight = found["blocks.0.weight"].view(-1)
    assert not torch.isfinite(weight).all()
    assert torch.isfinite(weight[6:]).all()


def test_a_mean_with_nan_is_nan_and_every_nan_has_one_bit_pattern(tmp_path: Path) -> None:
    payload = A["blocks.0.weight"].clone().view(torch.int32)
    payload.view(-1)[:3] = torch.tensor([0x7FC00123, -0x3FFFFF, 0x7F800001], dtype=torch.int32)
    given = {"a": A | {"blocks.0.weight": payload.view(torch.float32)}, "b": spoiled(B, (3, INF), (4, -INF))}
    weight = merged(tmp_path, given, "{a} {b} --allow-nonfinite")["blocks.0.weight"].view(-1)
    assert weight[:3].view(torch.int32).tolist() == [0x7FC00000] * 3
    assert weight[3:5].tolist() == [INF, -INF]


def test_a_receipt_says_that_nonfinite_values_were_taken(tmp_path: Path) -> None:
    merged(tmp_path, {"a": A, "b": B}, "{a} {b} --allow-nonfinite")
    receipt = json.loads((tmp_path / "out.safetensors.receipt.json").read_bytes())
    assert receipt["recipe"]["allow_nonfinite"] is True


def test_an_output_that_overflows_may_do_so_where_it_was_asked_for(tmp_path: Path) -> None:
    given = {"a": {"z": ints(1, 6e4, -6e4, dtype=torch.float16)}, "b": {"z": ints(1, 5e4, -5e4, dtype=torch.float16)}}
    options = "{a} {b} --strategy linear --set normalize=false --allow-nonfinite"
    assert merged(tmp_path, given, options)["z"].tolist() == [2.0, INF, -INF]


def test_inputs_are_the_same_files_after_a_merge(tmp_path: Path) -> None:
    paths = written(tmp_path, {"a": A, "b": B, "base": BASE})
    before = models.tree(tmp_path)
    ran: Ran = here(*command(paths, "{a} {b} --base {base} --strategy ties"), "-o", tmp_path / "out")
    assert ran.code == 0
    after = models.tree(tmp_path)
    assert {name: after[name] for name in before} == before
    assert {name for name in after if name not in before and "out" not in name} == set()
