"""Jobs for alignment: units' activations, repaired layers and BatchNorm, made-up inputs; against hooks on modules."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from crdtmerge.errors import MismatchError, NeedsError, UsageError
from crdtmerge.numerics import philox
from crdtmerge.programs.context import Context, Result
from crdtmerge.programs.exported import Program
from crdtmerge.programs.jobs import job
from crdtmerge.programs.jobs.unit_activations import COLUMNS
from crdtmerge.programs.probes import normals, probe
from crdtmerge.programs.runner import Runner
from crdtmerge.resolve import inner
from crdtmerge.strategies.protocol import Rng
from crdtmerge.symmetry.groups import Symmetry, decode
from tests.programs.conftest import Loaded, around, normal

SEED = "00" * 32
State = Mapping[str, torch.Tensor]


class Images(torch.nn.Module):
    """Convolutions, one of them with BatchNorm and one over a line, flattened into linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Conv2d(2, 4, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(4)
        self.two = torch.nn.Conv2d(4, 5, 3, stride=2)
        self.line = torch.nn.Conv1d(5, 3, 1)
        self.plain = torch.nn.BatchNorm1d(3, affine=False)
        self.full = torch.nn.Linear(12, 6)
        self.head = torch.nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.one(x)))
        x = torch.relu(self.two(x)).flatten(2)
        x = torch.relu(self.full(torch.relu(self.plain(self.line(x))).flatten(1)))
        logits: torch.Tensor = self.head(x)
        return logits


class Words(torch.nn.Module):
    """A transformer's block over embedded words."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 8)
        self.before = torch.nn.LayerNorm(8)
        self.q, self.k, self.v, self.o = (torch.nn.Linear(8, 8) for _ in range(4))
        self.middle = torch.nn.LayerNorm(8)
        self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)
        self.head = torch.nn.Linear(8, 11, bias=False)

    def forward(self, i: torch.Tensor) -> torch.Tensor:
        x = self.embed(i)
        z = self.before(x)
        q, k, v = (layer(z).view(*i.shape, 2, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(*i.shape, 8))
        x = x + self.down(torch.nn.functional.gelu(self.up(self.middle(x))))
        logits: torch.Tensor = self.head(x)
        return logits


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    torch.manual_seed(5)
    return Loaded(Images(), [torch.zeros(2, 2, 6, 6)], tmp_path_factory.mktemp("images") / "model.pt2")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    torch.manual_seed(6)
    example = [torch.zeros(2, 5, dtype=torch.int64)]
    return Loaded(Words(), example, tmp_path_factory.mktemp("words") / "model.pt2")


def ran(name: str, loaded: Loaded, groups: Mapping[str, State], **params: Any) -> Result:
    """A job that makes up its inputs."""
    return job(name)(Context(loaded.program, {}, groups, {"probe": "noise", "seed": SEED, **params}))


def noise(loaded: Loaded, **params: Any) -> torch.Tensor:
    """What such a job runs on."""
    context = Context(loaded.program, {}, {}, {"probe": "noise", "seed": SEED, **params})
    return torch.cat([part.inputs[0] for part in probe(context)])


def given_out(loaded: Loaded, state: State, layer: str, x: torch.Tensor) -> torch.Tensor:
    """What a layer of the module gives out, by a hook."""
    module: Any = loaded.module
    seen: list[torch.Tensor] = []
    hook = module.get_submodule(layer).register_forward_hook(lambda module, args, out: seen.append(out))
    cast = {name: t.to(loaded.state[name].dtype) for name, t in state.items()}
    with torch.no_grad():
        torch.func.functional_call(module, cast, (x,))
    hook.remove()
    return seen[0]


def moments(z: torch.Tensor, dimension: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = z.double().movedim(dimension, 0).flatten(1)
    return rows.mean(1), rows.std(1, correction=0)


def mean_of(states: list[State], weights: list[float]) -> dict[str, torch.Tensor]:
    return {
        name: sum(w * s[name].double() for w, s in zip(weights, states, strict=True)) if x.is_floating_point() else x
        for name, x in states[0].items()
    }


MLP = {"0": -1}
CONVOLUTIONS = {"two": 1, "full": -1}
BLOCK = {"q": -1, "k": -1, "v": -1, "o": -1, "up": -1, "down": -1}


@pytest.mark.parametrize(("which", "layers"), [("deep", MLP), ("images", CONVOLUTIONS), ("words", BLOCK)])
def test_rescaled_layers_have_the_mean_and_spread_of_the_endpoints(
    which: str, layers: Mapping[str, int], request: pytest.FixtureRequest
) -> None:
    """On the probe, per unit: sum_i w_i mean_i and sum_i w_i std_i; logits and what BatchNorm follows stay."""
    loaded = request.getfixturevalue(which)
    weights = [0.25, 0.75]
    ends = [around(loaded.state, 20), around(loaded.state, 50)]
    merged = mean_of(ends, weights)
    groups = {"merged": merged, "0": ends[0], "1": ends[1]}
    found = ran("repair", loaded, groups, kind="rescale", weights=weights, examples=150)
    assert found.values["layers"] == [f"{layer}.weight" for layer in layers]
    assert set(found.tensors) == {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    x = noise(loaded, examples=150)
    assert len(x) == 150
    changed = {**merged, **found.tensors}
    for layer, dimension in layers.items():
        of_ends = [moments(given_out(loaded, end, layer, x), dimension) for end in ends]
        now = moments(given_out(loaded, changed, layer, x), dimension)
        before = moments(given_out(loaded, merged, layer, x), dimension)[1]
        for j in range(2):
            wanted = 0.25 * of_ends[0][j] + 0.75 * of_ends[1][j]
            assert torch.allclose(now[j], wanted, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(before, wanted, rtol=1e-3, atol=1e-3)
        scale = torch.tensor(found.values["scales"][f"{layer}.weight"], dtype=torch.float64)
        old = merged[f"{layer}.weight"]
        assert torch.equal(found.tensors[f"{layer}.weight"], old * scale.view(-1, *[1] * (old.dim() - 1)))


def test_units_without_spread_keep_their_weights(deep: Loaded) -> None:
    """A factor would be infinite; the bias moves the mean where it belongs."""
    ends = [around(deep.state, 20), around(deep.state, 50)]
    merged = mean_of(ends, [0.5, 0.5])
    merged["0.weight"][2] = 0
    found = ran("repair", deep, {"merged": merged, "0": ends[0], "1": ends[1]}, kind="rescale", weights=[0.5, 0.5])
    assert bool((found.tensors["0.weight"][2] == 0).all())
    x = noise(deep)
    wanted = sum(float(moments(given_out(deep, end, "0", x), -1)[0][2]) for end in ends) / 2
    assert float(found.tensors["0.bias"][2]) == pytest.approx(wanted, rel=1e-12)


def test_reset_statistics_are_those_of_a_run_in_training_mode(images: Loaded) -> None:
    merged = mean_of([around(images.state, 20), around(images.state, 50)], [0.5, 0.5])
    found = ran("repair", images, {"merged": merged}, kind="reset", examples=192)
    module: Any = copy.deepcopy(images.module)
    module.load_state_dict(merged)
    for norm in (module.norm, module.plain):
        norm.momentum = None
        norm.reset_running_stats()
    with torch.no_grad():
        for part in noise(images, examples=192).split(64):
            module.train()(part)
    names = [f"{norm}.running_{what}" for norm in ("norm", "plain") for what in ("mean", "var")]
    assert set(found.tensors) == set(names)
    assert all(torch.allclose(found.tensors[n].float(), module.state_dict()[n], rtol=1e-6, atol=1e-7) for n in names)
    assert found.values["layers"] == ["norm.running_mean", "plain.running_mean"]


def test_tensors_that_are_not_merged_stay(images: Loaded) -> None:
    """They are run with all the same."""
    kept = {name: x for name, x in images.state.items() if name.partition(".")[0] in ("full", "norm")}
    ends = [{name: x for name, x in around(images.state, seed).items() if name not in kept} for seed in (20, 50)]
    groups = {"merged": mean_of(ends, [0.5, 0.5]), "0": ends[0], "1": ends[1]}
    made: dict[str, Any] = {"probe": "noise", "seed": SEED}
    for params, layers in (({"kind": "rescale", "weights": [0.5, 0.5]}, ["two"]), ({"kind": "reset"}, ["plain"])):
        found = job("repair")(Context(images.program, {}, groups, made | params, rest=kept)).tensors
        assert {name.partition(".")[0] for name in found} == set(layers)


def test_batch_norm_of_one_value_a_channel_is_refused(tmp_path: Path) -> None:
    layers = [torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU(), torch.nn.Linear(4, 2)]
    loaded = Loaded(torch.nn.Sequential(*layers), [torch.zeros(2, 3)], tmp_path / "model.pt2")
    with pytest.raises(NeedsError, match="two examples or more"):
        ran("repair", loaded, {"merged": loaded.state}, kind="reset", examples=1)
    assert ran("repair", loaded, {"merged": loaded.state}, kind="reset", examples=65).values["layers"]


def group_of(ran: Result, name: str, position: int) -> tuple[int, Symmetry]:
    """The index of the group that has an axis."""
    symmetry = decode(ran.values["groups"].encode(), "the groups")
    axes = [[(axis.tensor, axis.position) for axis in group.axes] for group in symmetry.groups]
    return next(i for i, held in enumerate(axes) if (name, position) in held), symmetry


def correlations(rows: torch.Tensor) -> Any:
    return np.nan_to_num(np.corrcoef(rows.double().numpy()))


@pytest.mark.filterwarnings("ignore:invalid value")
def test_units_give_out_what_hooks_see(deep: Loaded, images: Loaded, words: Loaded) -> None:
    """Rows correlate as the values after the nonlinearity do, over examples, positions and other factors."""
    oracles = [
        (deep, "0.weight", "1", lambda z: z.T),
        (images, "one.weight", "norm", lambda z: torch.relu(z).movedim(1, 0).flatten(1)),
        (images, "two.weight", "two", lambda z: torch.relu(z).movedim(1, 0).flatten(1)),
        (images, "line.weight", "plain", lambda z: torch.relu(z).movedim(1, 0).flatten(1)),
        (words, "up.weight", "up", lambda z: torch.nn.functional.gelu(z).flatten(0, 1).T),
    ]
    for loaded, tensor, layer, rows in oracles:
        found = ran("unit_activations", loaded, {"0": loaded.state}, examples=70)
        index, symmetry = group_of(found, tensor, 0)
        a = found.tensors[f"0.{index}"]
        assert a.dtype == torch.float64
        assert a.shape[0] == symmetry.groups[index].size
        wanted = correlations(rows(given_out(loaded, loaded.state, layer, noise(loaded, examples=70))))
        assert np.allclose(a @ a.T, wanted, atol=1e-5)
        alive = a.norm(dim=1) > 0
        assert torch.allclose(a[alive].norm(dim=1), torch.ones(1, dtype=torch.float64))
        assert float(a.mean(dim=1).abs().max()) < 1e-12


def test_heads_are_compared_over_their_width(words: Loaded) -> None:
    found = ran("unit_activations", words, {"0": words.state}, examples=40)
    index, symmetry = group_of(found, "v.weight", 0)
    assert symmetry.groups[index].size == 2
    module: Any = words.module
    seen: list[torch.Tensor] = []
    hook = module.o.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        module(noise(words, examples=40))
    hook.remove()
    a = found.tensors[f"0.{index}"]
    assert np.allclose(a @ a.T, correlations(seen[0].reshape(-1, 2, 4).movedim(1, 0).flatten(1)), atol=1e-5)


@pytest.mark.parametrize("which", ["deep", "images", "words"])
def test_reordered_models_have_reordered_rows(which: str, request: pytest.FixtureRequest) -> None:
    """One group at a time: a unit that is a head has values along its width, which is another group."""
    loaded = request.getfixturevalue(which)
    symmetry = decode(ran("unit_activations", loaded, {}).values["groups"].encode(), "the groups")
    rng = np.random.default_rng(1)
    models = {"0": loaded.state}
    orders = []
    for at, group in enumerate(symmetry.groups):
        one = symmetry.identities()
        one[at] = rng.permutation(group.size)
        orders.append(one[at])
        models[str(at + 1)] = {name: symmetry.turned(name, x, one) for name, x in loaded.state.items()}
    found = ran("unit_activations", loaded, models, examples=300).tensors
    for at, p in enumerate(orders):
        assert found[f"0.{at}"].shape[1] <= COLUMNS + 64
        assert torch.allclose(found[f"{at + 1}.{at}"], found[f"0.{at}"][p], atol=1e-5)


def test_chosen_columns_correlate_as_all_do(images: Loaded) -> None:
    found = ran("unit_activations", images, {"0": images.state}, examples=512)
    index, _ = group_of(found, "one.weight", 0)
    a = found.tensors[f"0.{index}"]
    z = torch.relu(given_out(images, images.state, "norm", noise(images, examples=512))).movedim(1, 0).flatten(1)
    assert z.shape[1] > 4 * a.shape[1]
    assert np.allclose(a @ a.T, correlations(z), atol=0.05)


def test_units_that_are_dead_or_constant_are_zeros(deep: Loaded, images: Loaded) -> None:
    state = {name: x.clone() for name, x in deep.state.items()}
    state["0.weight"][1], state["0.bias"][1] = 0, 0.7
    found = ran("unit_activations", deep, {"0": state}).tensors["0.0"]
    assert found.norm(dim=1).round(decimals=6).tolist() == [1, 0, 1, 1, 1]
    state = {name: x.clone() for name, x in images.state.items()}
    state["full.bias"][3] = -1e3
    ran_ = ran("unit_activations", images, {"0": state})
    index, _ = group_of(ran_, "full.weight", 0)
    assert not ran_.tensors[f"0.{index}"][3].any()


def test_data_is_looked_at_evenly(deep: Loaded) -> None:
    x = normal(8, 30, 3, dtype=torch.float64)
    ten = deep.run("unit_activations", {"inputs": x}, {"0": deep.state}, {"probe": "data", "examples": 10}).tensors
    same = deep.run("unit_activations", {"inputs": x[::3]}, {"0": deep.state}, {"probe": "data"}).tensors
    assert torch.equal(ten["0.0"], same["0.0"])
    assert ten["0.0"].shape == (5, 10)


def test_noise_is_the_same_twice_and_another_with_another_seed(images: Loaded, words: Loaded) -> None:
    x = noise(images, examples=100)
    assert torch.equal(x, noise(images, examples=100))
    assert not torch.equal(x, noise(images, examples=100, seed="01" * 32))
    assert x.shape == (100, 2, 6, 6)
    assert abs(float(x.mean())) < 0.05
    assert abs(float(x.std()) - 1) < 0.05
    i = noise(words, examples=100)
    assert i.shape == (100, 5)
    assert set(i.unique().tolist()) == set(range(11))


def test_normal_numbers_are_those_of_box_and_muller() -> None:
    s = philox.stream(b"seed", "noise", b"", "x")
    u = [(2 * word + 1) / 2**33 for word in philox.words(s, 0, 1000).tolist()]
    wanted = [
        math.sqrt(-2 * math.log(a)) * turn(2 * math.pi * b)
        for a, b in zip(u[::2], u[1::2], strict=True)
        for turn in (math.cos, math.sin)
    ]
    assert np.allclose(normals(s, 999).double(), wanted[:999], rtol=2e-7, atol=1e-12)
    assert torch.equal(normals(s, 999)[:7], normals(s, 7))
    assert hashlib.sha256(normals(s, 999).numpy().tobytes()).hexdigest()[:16] == "43921cf52d05e1ed"


def test_a_program_of_a_fixed_number_of_examples_gets_that_many(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(torch.nn.Linear(3, 2).eval(), (torch.zeros(4, 3),)), path)
    program = Program(str(path), hashlib.sha256(path.read_bytes()).hexdigest())
    parts = probe(Context(program, {}, {}, {"probe": "noise", "seed": SEED, "examples": 10}))
    assert [part.size for part in parts] == [4, 4, 4]


@pytest.mark.parametrize(
    ("which", "name", "params", "kind", "said"),
    [
        ("deep", "repair", {"kind": "all"}, UsageError, "must be rescale or reset"),
        ("deep", "repair", {"kind": "reset"}, NeedsError, "no BatchNorm"),
        ("classifier", "repair", {"kind": "rescale", "weights": [1]}, NeedsError, "no merged layer can be rescaled"),
        ("deep", "unit_activations", {"probe": "dreams"}, UsageError, "must be data or noise"),
        ("images", "repair", {"kind": "reset", "examples": 0}, UsageError, "examples"),
    ],
)
def test_what_cannot_be_done_is_refused(
    which: str, name: str, params: dict[str, Any], kind: type[Exception], said: str, request: pytest.FixtureRequest
) -> None:
    loaded = request.getfixturevalue(which)
    with pytest.raises(kind, match=said):
        ran(name, loaded, {"merged": loaded.state, "0": loaded.state}, **params)


def test_models_that_overflow_are_refused(deep: Loaded) -> None:
    state = {name: x * 1e308 for name, x in deep.state.items()}
    with pytest.raises(MismatchError, match="not finite"):
        ran("repair", deep, {"merged": deep.state, "0": state}, kind="rescale", weights=[1.0])
    state = {name: x * math.inf for name, x in deep.state.items()}
    with pytest.raises(MismatchError, match="model 0 gives values"):
        ran("unit_activations", deep, {"0": state})


def test_a_process_without_data_runs_on_noise_alone(deep: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    here = ran("unit_activations", deep, {"0": deep.state}).tensors["0.0"]
    params = {"probe": "noise", "seed": SEED}
    with Runner(deep.path, deep.digest) as runner:
        monkeypatch.setattr(inner, "Runner", lambda program, digest, **how: runner)
        view: Any = SimpleNamespace(device="cpu")
        programs = inner.Programs([], view, inner.Running(), {"program": deep.path})
        found = programs.run("unit_activations", params, {"0": deep.state}, Rng(b""), {})
        assert torch.equal(found.tensors["0.0"], here)
        with pytest.raises(NeedsError, match="needs the input 'data'"):
            programs.run("gram", {}, {"model": deep.state}, Rng(b""), {})
        with pytest.raises(NeedsError, match="the data is empty"):
            runner.run("gram", {}, ["0"])
