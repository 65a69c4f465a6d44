"""``crdtmerge symmetry``: programs with open sizes, in a process of their own; the table, the file, the exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from crdtmerge.cli import app as cli
from crdtmerge.errors import InputError, OutputError
from crdtmerge.programs.runner import Ran, Runner
from crdtmerge.symmetry.derive import derived
from crdtmerge.symmetry.groups import Symmetry, decode
from crdtmerge.weights.carried import carried_files
from tests.resolve.models import save_folder
from tests.symmetry.families import FAMILIES, Flat


@pytest.fixture(scope="module")
def languages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied language model with open numbers of examples and of tokens."""
    path = tmp_path_factory.mktemp("programs") / "language.pt2"
    torch.manual_seed(0)
    family = FAMILIES["rope gqa"]
    sizes = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("tokens", min=2, max=9)}
    exported = torch.export.export(family.make().eval(), family.inputs(), dynamic_shapes=(sizes,))
    torch.export.save(exported, path)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("programs") / "flat.pt2"
    torch.export.save(torch.export.export(Flat().eval(), (torch.randn(3, 2, 8, 8),)), path)
    return path


def run(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(cli.app, ["symmetry", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


def test_a_language_model_with_open_sizes(languages: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.json"
    code, shown, _ = run("--program", languages, "-o", out, "--json")
    report = json.loads(shown)
    assert code == 0
    assert sorted(group["size"] for group in report["groups"]) == FAMILIES["rope gqa"].sizes
    assert report["change"] < 1e-5
    assert report["not_understood"] == report["failing"] == []
    assert report["tied"] == [["e.weight", "head.weight"]]
    found = decode(out.read_bytes(), str(out))
    assert found.digest.hex() == report["digest"]
    assert found == derived(torch.export.load(languages)).symmetry


def test_the_table_says_what_makes_and_what_consumes_and_the_file_replaces_a_symmetry(
    images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "s.json"
    out.write_bytes(Symmetry((), {}).encode())
    code, shown, _ = run("--program", images, "-o", out)
    lines = shown.splitlines()
    assert code == 0
    assert lines[0].split() == ["group", "size", "made", "by", "consumed", "by"]
    assert lines[1].split() == ["0", "5", "conv.weight[0],", "conv.bias[0]", "fc.weight[1.0]"]
    assert lines[2].split() == ["1", "8", "fc.weight[0],", "fc.bias[0]", "out.weight[1]"]
    assert lines[3].startswith("2 groups; random permutations change results by at most ")
    assert lines[4].startswith("digest ")
    assert decode(out.read_bytes(), str(out)) == derived(torch.export.load(images)).symmetry


def test_it_is_written_into_a_checkpoint_that_carries_it(images: Path, tmp_path: Path) -> None:
    out = save_folder(tmp_path / "base", {"w": torch.ones(2)}, {"config.json": "{}"}) / "symmetry.json"
    assert run("--program", images, "-o", out)[0] == 0
    assert sorted(path.name for path in out.parent.iterdir()) == ["config.json", "model.safetensors", "symmetry.json"]
    assert carried_files(out.parent)[0]["symmetry.json"] == out.read_bytes()


def test_a_file_that_is_no_symmetry_is_not_written_over(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.json"
    out.write_text("mine")
    with pytest.raises(OutputError, match="is no symmetry"):
        run("--program", images, "-o", out)
    with pytest.raises(OutputError, match="does not exist"):
        run("--program", images, "-o", tmp_path / "none" / "s.json")
    with pytest.raises(OutputError, match="is no symmetry"):
        run("--program", images, "-o", tmp_path)
    assert out.read_text() == "mine"


def answering(monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]) -> None:
    """A process that answers so."""
    monkeypatch.setattr(Runner, "__init__", lambda *_, **__: None)
    monkeypatch.setattr(Runner, "close", lambda *_: None)
    monkeypatch.setattr(Runner, "run", lambda *_, **__: Ran(values, {}))


def test_groups_that_change_a_result_are_named_and_not_written(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "s.json"
    text = derived(torch.export.load(images)).symmetry.encode().decode()
    values = {"symmetry": text, "frozen": ["aten.odd.default"], "change": None, "failing": [1]}
    answering(monkeypatch, values)
    code, shown, said = run("--program", images, "-o", out)
    assert code == 1
    assert "1 CHANGES" in shown
    assert "not understood, so not reordered: what aten.odd.default is given and gives" in shown
    assert "nothing was written" in said
    assert not out.exists()
    assert json.loads(run("--program", images, "-o", out, "--json")[1])["out"] is None


def test_what_a_process_answers_is_not_believed(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, {"symmetry": "{}", "frozen": [], "change": 0.0, "failing": []})
    with pytest.raises(InputError):
        run("--program", images)
