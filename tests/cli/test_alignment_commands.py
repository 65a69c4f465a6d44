"""Aligned merges on the command line: the symmetry as a file, plans without it, and the short way to say it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from crdtmerge.symmetry.groups import Axis, Group, Symmetry
from tests.resolve import models
from tests.resolve.running import here

AXES = (Axis("a.weight", 0), Axis("a.bias", 0), Axis("b.weight", 1, True))
SYMMETRY = Symmetry((Group(8, AXES),), {"a.weight": ((8,), (3,)), "a.bias": ((8,),), "b.weight": ((2,), (8,))})


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """The symmetry, a network, and the same in two other orders of its hidden units."""
    rng = np.random.default_rng(0)
    shapes = {"a.weight": (8, 3), "a.bias": (8,), "b.weight": (2, 8)}
    one = {name: torch.from_numpy(rng.standard_normal(shape)).float() for name, shape in shapes.items()}
    symmetry = tmp_path / "s.json"
    symmetry.write_bytes(SYMMETRY.encode())
    made = [symmetry, models.save(tmp_path / "m0.safetensors", one)]
    for i in (1, 2):
        p = rng.permutation(8)
        other = {"a.weight": one["a.weight"][p], "a.bias": one["a.bias"][p], "b.weight": one["b.weight"][:, p]}
        made.append(models.save(tmp_path / f"m{i}.safetensors", {name: x.contiguous() for name, x in other.items()}))
    return made


def test_copies_merge_into_one_of_them(files: list[Path], tmp_path: Path) -> None:
    symmetry, *copies = files
    out = tmp_path / "out.safetensors"
    ran = here("merge", *copies, "--strategy", "rebasin", "--input", f"symmetry={symmetry}", "-o", out, "--json")
    assert ran.code == 0
    assert ran.json["class"] == "E"
    found = load_file(out)
    assert any(all(torch.equal(found[name], x) for name, x in load_file(copy).items()) for copy in copies)


def test_align_is_the_short_way(files: list[Path], tmp_path: Path) -> None:
    symmetry, *copies = files
    given = ["--input", f"symmetry={symmetry}", "--json"]
    short = here("merge", *copies, "--strategy", "median", "--align", "weights", *given).json
    inside = ["--set", "inner=median", "--set", "method=weights"]
    assert short["merge_id"] == here("merge", *copies, "--strategy", "aligned", *inside, *given).json["merge_id"]
    assert short["strategy"] == "aligned"
    plan = tmp_path / "a.plan"
    assert here("plan", *copies, "--strategy", "median", "--align", "weights", "-o", plan, *given).code == 0
    applied = here("merge", *copies, "--strategy", "median", "--align", "weights", "--plan", plan, "--json").json
    assert applied["output_digest"] == short["output_digest"]


def test_a_pool_merges_aligned_models_with_nothing_but_what_travels(files: list[Path], tmp_path: Path) -> None:
    symmetry, first, *others = files
    base = models.save_folder(tmp_path / "base", load_file(first), {"symmetry.json": symmetry.read_text()})
    pool, out = tmp_path / "pool", tmp_path / "out"
    begun = here("init", pool, "--base", base, "--strategy", "linear", "--align", "weights", "--json").json
    assert begun["recipe"]["strategy"] == "aligned"
    assert begun["recipe"]["params"]["inner"] == "linear"
    for model in others:
        assert here("add", model, "-C", pool).code == 0
    linear = here("resolve", "-C", pool, "-o", out, "--json").json
    given = ["--base", base, "--align", "weights", "--json"]
    assert linear["merge_id"] == here("merge", *others, "--strategy", "linear", *given).json["merge_id"]
    changed = here("recipe", "task_arithmetic", "--align", "weights", "-C", pool, "--json").json
    assert (changed["strategy"], changed["params"]["inner"]) == ("aligned", "task_arithmetic")
    resolved = here("resolve", "-C", pool, "-o", out, "--json").json
    assert resolved["merge_id"] == here("merge", *others, "--strategy", "task_arithmetic", *given).json["merge_id"]
    assert all(torch.equal(x, load_file(first)[name]) for name, x in load_file(out / "model.safetensors").items())
    assert (out / "symmetry.json").read_bytes() == symmetry.read_bytes()
    assert here("verify", out).code == 0
    assert here("recipe", "--align", "weights", "-C", pool).code == 2
    assert here("init", tmp_path / "other", "--from", pool, "--align", "weights").code == 2


def test_what_is_missing_is_named(files: list[Path]) -> None:
    ran = here("merge", *files[1:], "--strategy", "rebasin")
    assert ran.code == 2
    assert "crdtmerge symmetry --program" in ran.err
    assert here("merge", *files[1:], "--align", "names", "--input", f"symmetry={files[0]}").code == 2
