"""--stats, --input and --plan of `merge`, `add` and `resolve`: what they mean, and what is refused with a sentence."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from tests.cli.folders import document, refused, told
from tests.resolve import models
from tests.resolve.running import here
from tests.resolve.tiny_strategies import register, saved


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    register(monkeypatch)
    saved(tmp_path, "a", "b", "c")
    monkeypatch.chdir(tmp_path)


def stats(*said: str) -> list[str]:
    return [part for one in said for part in ("--stats", one)]


A, B = "a.safetensors", "b.safetensors"
CA, CB = "a.curvature.safetensors", "b.curvature.safetensors"
MERGE = ("merge", A, B, "--strategy", "weighed")


def test_statistics_in_the_order_of_the_models_and_bound_by_path_are_the_same() -> None:
    found = {
        here("merge", *order, "--strategy", "weighed", *stats(*said), "--json").json["merge_id"]
        for order, said in (
            ((A, B), (f"curvature={CA}", f"curvature={CB}")),
            ((B, A), (f"curvature={CB}", f"curvature={CA}")),
            ((A, B), (f"{B}:curvature={CB}", f"{A}:curvature={CA}")),
            ((f"./{A}", B, A), (f"{B}:curvature={CB}", f"{A}:curvature={CA}")),
        )
    }
    assert len(found) == 1
    swapped = here(*MERGE, *stats(f"curvature={CB}", f"curvature={CA}"), "--json")
    assert document(swapped)["merge_id"] not in found


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ((), ("needs the statistic 'curvature' of every model", "--stats")),
        ((f"curvature={CA}",), ("--stats curvature: 1 files for 2 models",)),
        ((f"curvature={CA}",) * 3, ("--stats curvature: 3 files for 2 models",)),
        ((f"{A}:curvature={CA}",), (f"that of {B} is missing",)),
        ((f"{A}:curvature={CA}", f"curvature={CB}"), ("also as MODEL:curvature",)),
        ((f"{A}:curvature={CA}",) * 2, (f"--stats {A}:curvature is given twice",)),
        ((f"z:curvature={CA}",), ("z is none of the models", A)),
        (("curvature",), ("--stats curvature: write it as NAME=FILE",)),
        (("curvature=",), ("write it as NAME=FILE",)),
        ((f"={CA}",), ("write it as NAME=FILE",)),
        ((f":curvature={CA}",), ("write it as NAME=FILE",)),
        (("curvature=no", "curvature=no"), ("cannot be opened",)),
        ((f"../x={CA}",) * 2, ("cannot name statistics",)),
    ],
    ids=str,
)
def test_statistics_that_are_said_wrong_are_refused(said: tuple[str, ...], words: tuple[str, ...]) -> None:
    refused(here(*MERGE, *stats(*said)), *words)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (("--input", "anchor"), "--input anchor: write it as NAME=PATH"),
        (("--input", "anchor=c.safetensors", "--input", "anchor=x"), "--input anchor is given twice"),
        (("--input", "x=y"), "has no input 'x'. It has: anchor, shift"),
        (("--input", "anchor=c.safetensors"), "needs the input 'shift': give it with --input shift=PATH"),
        (("--plan", "no.plan"), "no.plan"),
    ],
    ids=str,
)
@pytest.mark.parametrize("command", ["merge", "resolve"])
def test_inputs_that_are_said_wrong_are_refused(command: str, said: tuple[str, ...], words: str) -> None:
    if command == "merge":
        refused(here("merge", A, B, "--strategy", "anchored", *said), words)
        return
    assert here("init", "pool", "--like", A, "--strategy", "anchored").code == 0
    assert here("add", A, "-C", "pool").code == 0
    refused(here("resolve", "-C", "pool", "-o", "out", *said), words)
    assert not Path("out").exists()


@pytest.mark.parametrize("option", ["--stats", "--input", "--plan"])
def test_an_output_never_replaces_what_is_read(option: str, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    one = models.save(tmp_path / "one/x.safetensors", models.state("z"))
    said = {"--stats": f"curvature={one}", "--input": f"anchor={one}", "--plan": str(one)}[option]
    ran = here("merge", A, "--strategy", "linear", option, said, "-o", one)
    refused(ran, "would replace the input")
    assert one.exists()


def test_add_says_the_statistics_it_keeps_and_status_is_unharmed() -> None:
    told(here("init", "pool", "--like", A, "--strategy", "weighed"))
    digest = hashlib.sha256(Path(CA).read_bytes()).hexdigest()
    told(here("add", A, "-C", "pool", *stats(f"curvature={CA}")), f"curvature {digest[:12]}")
    refused(here("add", B, "-C", "pool", *stats("curvature=x", "curvature=y")), "--stats curvature is given twice")
    refused(here("add", B, "-C", "pool", *stats("curvature")), "write it as NAME=PATH")
    refused(here("add", B, "-C", "pool", *stats(f"../x={CB}")), "no plain name")
    refused(here("resolve", "-C", "pool", "-o", "pool/out"), "lies in the replica")
    document(here("add", B, "-C", "pool", *stats(f"curvature={CB}"), "--json"))
    Path(CA).unlink()
    Path(CB).unlink()
    told(here("resolve", "-C", "pool", "-o", "out"), "weighed of 2 models")
    told(here("verify", "out"), "same")
    hints = json.loads(Path("out/inputs.json").read_bytes())
    assert {path for held in hints["stats"].values() for path in held.values()} == {str(Path("pool").resolve())}
    assert here("status", "-C", "pool", "--json").code == 0
    told(here("resolve", "-C", "pool", "-o", "out"), "unchanged")


def test_verify_needs_the_statistics_again() -> None:
    assert here(*MERGE, *stats(f"curvature={CA}", f"curvature={CB}"), "-o", "out").code == 0
    Path(CB).rename("moved")
    ran = here("verify", "out", "--json")
    assert (ran.code, ran.json["answer"]) == (2, "unknown")
    assert "the curvature of" in ran.json["reason"]
    against = [part for path in (A, "moved", CA, B) for part in ("--against", path)]
    assert here("verify", "out", *against).code == 0


def test_a_planned_merge_by_the_commands() -> None:
    Path("shift").write_text("0.5")
    said = ("--strategy", "anchored", "--input", "anchor=c.safetensors", "--input", "shift=shift")
    told(here("plan", A, B, *said, "-o", "a.plan"))
    plain = document(here("merge", A, B, *said, "--json"))
    planned = document(here("merge", B, A, *said, "--plan", "a.plan", "-o", "out", "--json"))
    assert planned["output_digest"] == plain["output_digest"]
    assert planned["merge_id"] != plain["merge_id"]
    refused(here("merge", A, *said, "--plan", "a.plan"), "is the plan of merge", plain["merge_id"], "this is merge")
    told(here("verify", "out"), "same")
    Path("a.plan").rename("moved")
    assert here("verify", "out").code == 2
    everything = [part for path in (A, B, "c.safetensors", "moved") for part in ("--against", path)]
    assert here("verify", "out", *everything).code == 0
