"""Strategies whose coefficients a model finds on examples: ada_merging, dam, adarank, representation_surgery.

Each is plan and apply: the plan runs a program (``torch.export``) on data in a process of its own and is class P; what
it learns, on a grid of 1/4096, is applied in exact arithmetic, so that the same plan gives the same bytes everywhere.
With ``steps=0`` nothing is run and nothing is needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from crdtmerge.errors import MismatchError, NeedsError, ParameterError
from crdtmerge.numerics.lazy import torch
from crdtmerge.numerics.products import Matrix
from crdtmerge.numerics.programs import Program
from crdtmerge.numerics.scalars import nearest
from crdtmerge.strategies import stages
from crdtmerge.strategies.dense import Exact, Lapack, as_matrix
from crdtmerge.strategies.inside import INPUTS, Granularity, WithInner, layers, size_of, the_same
from crdtmerge.strategies.linear import divided, divisor_of, total
from crdtmerge.strategies.parameters import Number, Parameters, Share
from crdtmerge.strategies.protocol import EMPTY, Inner, Meta, Needs, Plan, Rng, Strategy, Unit, View

if TYPE_CHECKING:
    from torch import Tensor

GRID = 4096
"""Learnt coefficients are whole multiples of 1 / GRID away from where they began."""


class Learning(Parameters):
    """Parameters of strategies that learn their coefficients."""

    steps: int = Field(500, ge=0, le=10_000_000, description="steps of Adam; 0 runs no model and leaves the beginning")
    lr: Number = Field(Number("0.001"), gt=0, description="learning rate")
    batch: int = Field(16, ge=1, description="examples of each task in a step, in the order of the data")


class AdaMergingParameters(Learning):
    """Parameters of ada_merging."""

    granularity: Granularity = Field("tensor", description="what has a coefficient of its own, in each model")
    init: Number = Field(Number("0.3"), description="every coefficient at the beginning")
    lower: Number = Field(Number("0"), description="coefficients are clamped from below where they are used")
    upper: Number = Field(Number("1"), description="and from above")
    tau_preprocess: Literal["none", "ties"] = Field("none", description="ties: trim and elect first (AdaMerging++)")
    density: Share = Field(Number("0.2"), description="share of a task vector that ties keeps, of the whole model")


class AdaMerging(Strategy[AdaMergingParameters]):
    """AdaMerging: coefficients that make the merged model sure of itself on unlabelled examples.

        theta(L) = theta_0 + sum_i w_i L_i^l tau_i^l
        L        = argmin sum_tasks mean_x H(softmax f_theta(L)(x)),   by Adam, clamped to [lower, upper] at use

    l is a tensor, a layer or the whole model. ``tau_preprocess=ties`` is AdaMerging++: each task vector is trimmed to
    its largest elements and loses those that disagree with the elected sign. Batches are taken in the order of the
    data. Claimed weights, which the paper has not, scale the task vectors; at 1 it is the paper's.

    Needs the inputs ``program`` and ``data`` (TASK.inputs). With steps=0 it is task arithmetic with lambda init.

    Properties: commutative; neither associative nor idempotent.
    """

    name, version, family = "ada_merging", 1, "adaptive"
    reference = "Yang et al., ICLR 2024, arXiv:2310.02575"
    Params = AdaMergingParameters

    def needs(self, p: AdaMergingParameters) -> Needs:
        scan: Literal["scan", "none"] = "scan" if p.tau_preprocess == "ties" and p.density < 1 else "none"
        return Needs(
            base="required", inputs=INPUTS if p.steps else (), plan="model" if p.steps else scan, compute="double"
        )

    def plan(self, view: View, p: Callable[[str], AdaMergingParameters], rng: Rng) -> Plan:
        data: dict[str, Any] = {}
        if not view.names:
            return EMPTY
        one = the_same(view, p, self.name)
        _check_bounds(one.lower, one.upper, self.name)
        if one.tau_preprocess == "ties" and one.density < 1:
            data["cuts"] = view.cuts(lambda name: one.density, whole_model=True)
        if one.steps:
            layer = layers(view.names, one.granularity)
            params = learning(one) | {
                "models": _contributions(view, self.name),
                "layer": layer,
                "init": nearest(one.init),
                "clamp": [nearest(one.lower), nearest(one.upper)],
            }
            cuts = Plan(data)
            ran = view.run("entropy", params, lambda u: _deltas(u, self.taus(u, cuts, one)), rng)
            data["coefficients"] = _of_tensors(ran.values["coefficients"], layer)
        return Plan(data) if data else EMPTY

    def taus(self, u: Unit, plan: Plan, p: AdaMergingParameters) -> list[Tensor]:
        """The task vectors, preprocessed, times their claimed weights."""
        taus = u.task_vectors()
        if p.tau_preprocess == "ties":
            if p.density < 1:
                taus = [stages.trim(tau, cut, u.start) for tau, cut in zip(taus, plan["cuts"][u.name], strict=True)]
            agree = stages.agreeing(taus, stages.elect(stages.weighted(taus, u.weights()), "sum"))
            taus = [torch.where(kept, tau, torch.zeros_like(tau)) for tau, kept in zip(taus, agree, strict=True)]
        return taus

    def apply(self, u: Unit, plan: Plan, p: AdaMergingParameters, rng: Rng) -> Tensor:
        offsets = plan.data.get("coefficients", {}).get(u.name)
        taus = stages.weighted(self.taus(u, plan, p), coefficients(u.meta, offsets, p.init))
        assert u.base is not None
        return u.base + total(taus)


class DamParameters(Learning):
    """Parameters of dam."""

    steps: int = Field(1000, ge=0, le=10_000_000, description="steps; 0 runs no model and leaves the average")
    batch: int = Field(1, ge=1, description="examples of each model in a step, in the order of the data")
    temperature: Number = Field(Number("2"), gt=0, description="of the predictions that are compared")
    lambda_cos: Number = Field(Number("0.01"), ge=0, description="how much likeness of two models' coefficients costs")
    share: Share = Field(Number("0.3"), description="share of the coefficients that move in a step (MoFO); 1 moves all")


class Dam(Strategy[DamParameters]):
    """Differentiable adaptive merging: a coefficient for every input column of every model's matrices.

        theta = sum_i theta_i diag(c_i),       c_i = w_i / sum w + d_i
        d     = argmin sum_i T^2 KL(softmax(z_i(x_i)/T) || softmax(z(x_i)/T)) + lambda_cos mean cos(c_i, c_j)

    Columns are those of dimension 1 of matrices, embeddings and convolutions; vectors have a coefficient an element,
    those called ``bias`` and scalars one. x_i is the data of the task claimed for model i, or all data where no task
    is claimed. Of the published regularisers only the cosine is there, and none of the non-linearities.

    Needs the inputs ``program`` and ``data``. With steps=0 it is weight_average.

    Properties: commutative; neither associative nor, for learnt d, idempotent.
    """

    name, version, family = "dam", 1, "adaptive"
    reference = "Gauthier-Caron et al., arXiv:2410.08371"
    Params = DamParameters

    def needs(self, p: DamParameters) -> Needs:
        return Needs(
            base="unused", inputs=INPUTS if p.steps else (), plan="model" if p.steps else "none", compute="double"
        )

    def plan(self, view: View, p: Callable[[str], DamParameters], rng: Rng) -> Plan:
        for name in view.names:
            divisor_of(view.meta(name))
        if not view.names or not (one := the_same(view, p, self.name)).steps:
            return EMPTY
        _contributions(view, self.name)
        meta = view.meta(view.names[0])
        divisor = divisor_of(meta)
        params = learning(one) | {
            "shares": [nearest(m.weight) / divisor for m in meta],
            "tasks": [m.task for m in meta],
            "columns": {name: columns(name, view.whole(name).shape)[0] for name in view.names},
            "temperature": nearest(one.temperature),
            "lambda_cos": nearest(one.lambda_cos),
            "share": nearest(one.share),
        }
        ran = view.run("distillation", params, lambda u: _numbered("x", u, u.xs), rng)
        return Plan({"offsets": _checked_offsets(ran.values["offsets"], params["columns"], len(meta))})

    def apply(self, u: Unit, plan: Plan, p: DamParameters, rng: Rng) -> Tensor:
        mean = divided(total(stages.weighted(u.xs, u.weights())), divisor_of(u.meta))
        if "offsets" not in plan.data:
            return mean
        count, inner = columns(u.name, u.shape)
        at = torch.arange(u.start, u.stop, dtype=torch.int64, device=mean.device)
        column = torch.div(at, inner, rounding_mode="floor") % max(count, 1)
        acc = mean
        for x, offsets in zip(u.xs, plan["offsets"][u.name], strict=True):
            d = torch.tensor([n / GRID for n in offsets], dtype=x.dtype, device=x.device)
            acc = acc + x * d[column]
        return acc


def columns(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """(coefficients of a tensor, elements that lie together in one column).

    >>> columns("fc.weight", (3, 4)), columns("conv.weight", (2, 5, 3, 3)), columns("fc.bias", (3,)), columns("n", (3,))
    ((4, 1), (5, 9), (1, 3), (3, 1))
    """
    if len(shape) > 1:
        return shape[1], max(size_of(shape[2:]), 1)
    if not shape or name.rpartition(".")[2] == "bias":
        return 1, max(size_of(shape), 1)
    return shape[0], 1


class AdaRankParameters(Learning):
    """Parameters of adarank."""

    steps: int = Field(10_000, ge=0, le=10_000_000, description="steps; 0 runs no model and leaves the beginning")
    variant: Literal["ta", "cart"] = Field("ta", description="around the base, or around the average of the models")
    init: Number | None = Field(None, description="every coefficient at the beginning; 0.3 for ta, 2.3 for cart")
    rank_ratio: Share | None = Field(None, description="share of components at the beginning; 1 for ta, 0.16 for cart")
    lower: Number = Field(Number("0"), description="coefficients are clamped from below where they are used")
    upper: Number = Field(Number("10"), description="and from above")
    logit: Number = Field(Number("0.1"), gt=0, description="a mask's logit at the beginning: plus, or minus")
    temperature: Number = Field(Number("10"), gt=0, description="what logits are divided by")
    dense: Literal["exact", "lapack"] = Field(
        "exact", description="singular values with the same bits everywhere, or the library's: fast, of any size"
    )

    @property
    def start(self) -> Number:
        """The coefficient at the beginning."""
        return self.init if self.init is not None else Number("0.3" if self.variant == "ta" else "2.3")

    def rank(self, components: int) -> int:
        """How many components there are at the beginning, at least one."""
        ratio = self.rank_ratio if self.rank_ratio is not None else Number("1" if self.variant == "ta" else "0.16")
        top, bottom = ratio.as_integer_ratio()
        return max(1, top * components // bottom)


class AdaRank(Strategy[AdaRankParameters]):
    """AdaRank: which singular components of each task vector are kept, and coefficients, found at test time.

        tau_i = U_i S_i V_i^T (matrices)
        theta = theta_0' + sum_i w_i L_i^l U_i (B_i * S_i) V_i^T        others: theta_0' + sum_i w_i L_i^l tau_i

    B_i in {0, 1} and L are learnt by Adam on the entropy of predictions on unlabelled examples, B through its sigmoid's
    gradient. ``variant=cart`` takes the weighted average of the models as theta_0'. The plan holds a digest of each
    spectrum, so that its bits never come to mean other components. Every matrix is decomposed: which of them belong to
    attention and which to other layers, as in the paper, an exported program does not say.

    Needs the inputs ``program`` and ``data``. With steps=0 it is task arithmetic on task vectors of truncated rank.

    Properties: commutative; neither associative nor idempotent.
    """

    name, version, family = "adarank", 1, "adaptive"
    reference = "Lee et al., ICLR 2026, arXiv:2503.22178"
    Params = AdaRankParameters

    def needs(self, p: AdaRankParameters) -> Needs:
        return Needs(
            base="required",
            inputs=INPUTS if p.steps else (),
            plan="model" if p.steps else "none",
            unit="tensor",
            exact=p.dense == "exact",
            compute="double",
        )

    def plan(self, view: View, p: Callable[[str], AdaRankParameters], rng: Rng) -> Plan:
        if not view.names or not (one := the_same(view, p, self.name)).steps:
            return EMPTY
        _check_bounds(one.lower, one.upper, self.name)
        k, layer = _contributions(view, self.name), layers(view.names, "tensor")
        spectra: dict[str, bytes] = {}
        rank: dict[str, int] = {}

        def groups(u: Unit) -> dict[str, Tensor]:
            middle, taus = _centred(u, one)
            parts = _deltas(u, taus, middle)
            found = [_factors(u, tau, one) for tau in taus] if _is_matrix(u.shape) else []
            if found:
                spectra[u.name] = _spectrum(found)
                width = max(len(s) for _, s, _ in found)
                for i, (left, s, right) in enumerate(found):
                    weight = nearest(u.meta[i].weight)
                    parts |= {f"u.{i}": _padded(left, width), f"v.{i}": _padded(right.T, width)}
                    parts |= {f"s.{i}": _padded(s[None, :] * weight, width)[0]}
            return parts

        for name in view.names:
            shape = view.whole(name).shape
            if _is_matrix(shape):
                rank[name] = one.rank(min(shape[0], size_of(shape[1:])))
        params = learning(one) | {
            "models": k,
            "layer": layer,
            "init": nearest(one.start),
            "clamp": [nearest(one.lower), nearest(one.upper)],
            "rank": rank,
            "logit": nearest(one.logit),
            "temperature": nearest(one.temperature),
        }
        ran = view.run("rank_masks", params, groups, rng)
        masks = {name: list(bits) for name, bits in ran.values["masks"].items() if name in spectra}
        if set(masks) != set(spectra) or any(set(bit) - {"0", "1"} for bits in masks.values() for bit in bits):
            raise MismatchError("the program's process answered other masks than it was asked for.")
        found = _of_tensors(ran.values["coefficients"], layer)
        return Plan({"coefficients": found, "masks": masks, "spectra": spectra})

    def apply(self, u: Unit, plan: Plan, p: AdaRankParameters, rng: Rng) -> Tensor:
        middle, taus = _centred(u, p)
        scale = coefficients(u.meta, plan.data.get("coefficients", {}).get(u.name), p.start)
        if _is_matrix(u.shape):
            factors = [_factors(u, tau, p) for tau in taus]
            masks = plan.data.get("masks", {}).get(u.name)
            if masks is not None and plan["spectra"][u.name] != _spectrum(factors):
                raise MismatchError(
                    f"tensor {u.name!a}: its singular values are not those that the plan's masks were made for. Apply "
                    "a plan to the models it was made of, and with dense=exact on another machine."
                )
            algebra = Exact(u.name) if p.dense == "exact" else Lapack(u.name)
            width = min(u.shape[0], size_of(u.shape[1:]))
            taus = []
            for i, (left, s, right) in enumerate(factors):
                bits = np.array([float(bit) for bit in masks[i]]) if masks else _first(p.rank(width), width)
                kept = left * (s * bits[: len(s)])
                taus.append(torch.from_numpy(np.ascontiguousarray(algebra.product(kept, right)).reshape(-1)).to(middle))
        return middle + total(stages.weighted(taus, scale))


def _centred(u: Unit, p: AdaRankParameters) -> tuple[Tensor, list[Tensor]]:
    """(theta_0', the task vectors from it)."""
    assert u.base is not None
    if p.variant == "ta":
        return u.base, u.task_vectors()
    middle = divided(total(stages.weighted(u.xs, u.weights())), divisor_of(u.meta))
    return middle, [x - middle for x in u.xs]


def _is_matrix(shape: tuple[int, ...]) -> bool:
    return len(shape) > 1 and size_of(shape) > 0


def _factors(u: Unit, tau: Tensor, p: AdaRankParameters) -> tuple[Matrix, Matrix, Matrix]:
    """U, S, V^T of a task vector. Raises NonFiniteError."""
    algebra = Exact(u.name) if p.dense == "exact" else Lapack(u.name)
    return algebra.triplets(as_matrix(tau, u.shape))


def _spectrum(factors: Sequence[tuple[Matrix, Matrix, Matrix]]) -> bytes:
    """A digest of decompositions: which components the bits of masks mean."""
    found = hashlib.sha256()
    for part in (part for factor in factors for part in factor):
        found.update(str(part.shape).encode() + np.ascontiguousarray(part).astype("<f8").tobytes())
    return found.digest()


def _padded(m: Matrix, width: int) -> Tensor:
    """Columns of zeros up to a width: a numerical rank below another's."""
    wide = np.zeros((m.shape[0], width))
    wide[:, : m.shape[1]] = m
    return torch.from_numpy(wide)


def _first(count: int, width: int) -> Matrix:
    return np.array([1.0] * count + [0.0] * (width - count))


class SurgeryParameters(WithInner):
    """Parameters of representation_surgery."""

    steps: int = Field(500, ge=0, le=10_000_000, description="steps of Adam; 0 trains no adapters and writes none")
    lr: Number = Field(Number("0.001"), gt=0, description="learning rate")
    batch: int = Field(16, ge=1, description="examples of each task in a step, in the order of the data")
    rank: int = Field(16, ge=1, le=65_536, description="width of the adapters")
    layer: str | None = Field(None, description="weight of the linear layer that is adapted; the last by default")


class RepresentationSurgery(Strategy[SurgeryParameters]):
    """Representation surgery: adapters beside a merged model that give each task its own representation back.

        theta = inner(theta_1, ..., theta_k), unchanged
        Z'    = Z - W_up ReLU(W_down Z),    W = argmin mean |Z' - Z_i| on the data of task i

    The adapters are tensors of the output, ``surgery.TASK.down`` [rank, width] and ``surgery.TASK.up`` [width, rank];
    who runs the model for a task applies them to what goes into its last linear layer (or into ``layer``). Each
    contribution claims its task, and the data has its examples.

    Needs the inputs ``program`` and ``data``, and what the inner strategy needs. With steps=0 it is the inner strategy.
    """

    name, version, family = "representation_surgery", 1, "adaptive"
    reference = "Yang et al., ICML 2024, arXiv:2402.02705"
    Params = SurgeryParameters

    def needs(self, p: SurgeryParameters) -> Needs:
        inner = p.inner_needs()
        if not p.steps:
            return inner
        return inner._replace(inputs=(*inner.inputs, *INPUTS), plan="model")

    def plan(self, view: View, p: Callable[[str], SurgeryParameters], rng: Rng) -> Plan:
        if not view.names:
            return EMPTY
        one = the_same(view, p, self.name)
        inner = Inner(one.inner, one.settings)
        data: dict[str, Any] = {"inner": dict(view.planned(inner, rng).data)}
        if one.steps:
            _contributions(view, self.name)
            tasks = _tasks(view.meta(view.names[0]), self.name)
            params = learning(one) | {"tasks": tasks, "rank": one.rank, "weight": one.layer, "seed": rng.seed.hex()}
            ran = view.run("surgery", params, lambda u: _numbered("x", u, u.xs), rng, {"merged": inner})
            data["adapters"] = {name: _frozen(x) for name, x in sorted(ran.tensors.items())}
        return Plan(data)

    def apply(self, u: Unit, plan: Plan, p: SurgeryParameters, rng: Rng) -> Tensor:
        return p.strategy().apply(u, Plan(plan["inner"]), p.filled().at(u.name), rng)

    def extras(self, plan: Plan) -> Mapping[str, Tensor]:
        return {name: _thawed(entry) for name, entry in plan.data.get("adapters", {}).items()}

    def program(self, name: str, meta: tuple[Meta, ...], plan: Plan, p: SurgeryParameters, rng: Rng) -> Program | None:
        return p.strategy().program(name, meta, Plan(plan["inner"]), p.filled().at(name), rng)


def _tasks(meta: Sequence[Meta], strategy: str) -> list[str]:
    """The task of each contribution, all different. Raises NeedsError."""
    tasks = [m.task or "" for m in meta]
    if not all(tasks) or any(task in tasks[:i] for i, task in enumerate(tasks)):
        raise NeedsError(
            f"strategy '{strategy}' needs to know what each model is for: claim a task of its own for each "
            "(--task NAME, once for each model), and give data with TASK.inputs."
        )
    return tasks


def _frozen(x: Tensor) -> dict[str, Any]:
    """A tensor as a value of a plan."""
    data = x.detach().to(torch.float32).contiguous().numpy().astype("<f4").tobytes()
    return {"shape": list(x.shape), "float32": data}


def _thawed(entry: Mapping[str, Any]) -> Tensor:
    """A tensor of a value of a plan. Raises MismatchError."""
    shape = tuple(entry["shape"])
    if len(entry["float32"]) != 4 * size_of(shape):
        raise MismatchError("an adapter of the plan has another size than its shape says.")
    found: Tensor = torch.from_numpy(np.frombuffer(entry["float32"], "<f4").astype(np.float32).reshape(shape))
    return found


def learning(p: Any) -> dict[str, Any]:
    """The parameters of learning, as a job takes them."""
    return {"steps": p.steps, "lr": nearest(p.lr), "batch": p.batch}


def coefficients(meta: Sequence[Meta], offsets: Sequence[int] | None, init: Number) -> tuple[float, ...]:
    """w_i (init + n_i / 4096), each rounded once."""
    chosen = offsets if offsets is not None else [0] * len(meta)
    return tuple(
        nearest(Fraction(m.weight) * (Fraction(init) + Fraction(n, GRID))) for m, n in zip(meta, chosen, strict=True)
    )


def _deltas(u: Unit, taus: Sequence[Tensor], base: Tensor | None = None) -> dict[str, Tensor]:
    """The groups ``base`` and ``tau.i`` of a job; task vectors times their claimed weights."""
    middle = u.base if base is None else base
    assert middle is not None
    scaled = stages.weighted(taus, u.weights())
    return {"base": middle.reshape(u.shape).cpu()} | _numbered("tau", u, scaled)


def _numbered(group: str, u: Unit, xs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Groups ``x.0``, ``x.1``, ... of a job."""
    return {f"{group}.{i}": x.reshape(u.shape).cpu() for i, x in enumerate(xs)}


def _contributions(view: View, strategy: str) -> int:
    """How many contributions there are. Raises MismatchError unless each has every tensor."""
    expected = [m.id for m in view.meta(view.names[0])]
    for name in view.names:
        if [m.id for m in view.meta(name)] != expected:
            raise MismatchError(
                f"strategy '{strategy}' runs whole models; tensor {name!a} is missing in some. Use --missing base, or "
                "leave it out with --exclude."
            )
    return len(expected)


def _of_tensors(rows: Sequence[Sequence[int]], layer: Mapping[str, int]) -> dict[str, list[int]]:
    """For each tensor the offsets of its contributions, of those of each contribution's layers."""
    return {name: [int(row[index]) for row in rows] for name, index in layer.items()}


def _checked_offsets(found: Any, counts: Mapping[str, int], k: int) -> dict[str, list[list[int]]]:
    """Offsets of columns as they must be. Raises MismatchError."""
    offsets = {name: [[int(n) for n in row] for row in found[name]] for name in counts}
    if any(len(rows) != k or any(len(row) != counts[name] for row in rows) for name, rows in offsets.items()):
        raise MismatchError("the program's process answered other coefficients than it was asked for.")
    return offsets


def _check_bounds(lower: Number, upper: Number, strategy: str) -> None:
    if lower > upper:
        raise ParameterError(f"strategy '{strategy}': lower = {lower} lies above upper = {upper}.")


STRATEGIES = (AdaMerging, Dam, AdaRank, RepresentationSurgery)
