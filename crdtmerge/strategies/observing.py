"""What units are told apart by, where contributions are matched: their weights, or what they do on a probe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field

from crdtmerge.errors import MismatchError
from crdtmerge.strategies.matching import Array, standing_for
from crdtmerge.strategies.parameters import Parameters
from crdtmerge.strategies.protocol import Rng, Unit, View
from crdtmerge.symmetry.groups import SYMMETRY_BYTES_MAX, Symmetry, decode

if TYPE_CHECKING:
    from torch import Tensor

BASE = "base"
"""What a job calls the base among the models by number."""


class ObservingParameters(Parameters):
    """How units are told apart."""

    method: Literal["weights", "activations"] = Field("weights", description="what units are told by")
    probe: Literal["data", "noise"] = Field("data", description="what activations are of: the data, or seeded noise")
    examples: int | None = Field(
        None, ge=2, le=1 << 20, description="how many examples of the probe: all data, 512 of noise unless given"
    )

    @property
    def runs(self) -> bool:
        """Whether a program is run."""
        return self.method == "activations"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The inputs that are read."""
        of_program = ("program", "data") if self.probe == "data" else ("program",)
        return ("symmetry", *of_program) if self.runs else ("symmetry",)

    def probing(self, rng: Rng) -> dict[str, Any]:
        """The parameters of a job that looks at a probe."""
        seed = {"seed": rng.seed.hex()} if self.probe == "noise" else {}
        return {"probe": self.probe, "examples": self.examples} | seed


class Observed(NamedTuple):
    """Tensors by which units are matched, of each contribution and of the base; ``like`` is what reorders them."""

    like: Symmetry
    models: list[dict[str, Array]]
    base: dict[str, Array] | None


def symmetry_of(view: View) -> Symmetry:
    """The symmetry that is given, without tied tensors that are not merged. Raises InputError, MismatchError."""
    return _fitted(view, decode(*view.input("symmetry", SYMMETRY_BYTES_MAX)))


def _fitted(view: View, symmetry: Symmetry) -> Symmetry:
    shapes = {name: view.whole(name).shape for name in view.names if name in symmetry.tensors}
    return symmetry.fitted(shapes, "this merge")


def everyone(view: View, symmetry: Symmetry) -> list[bytes]:
    """The contributions, in canonical order. Raises MismatchError where one lacks a tensor of the symmetry."""
    ids = sorted({m.id for name in view.names for m in view.meta(name)})
    for name in symmetry.tensors:
        lacking = set(ids) - {m.id for m in view.meta(name)}
        if lacking:
            raise MismatchError(
                f"tensor {name!a}: contribution {min(lacking).hex()[:16]} lacks it, and the symmetry reorders it: its "
                "units cannot be told. Say --missing base, or leave that contribution out."
            )
    return ids


def observed(
    view: View, symmetry: Symmetry, ids: Sequence[bytes], p: ObservingParameters, rng: Rng, *, with_base: bool = False
) -> Observed:
    """Weights as they are, or standardised activations. Raises MismatchError for the symmetry of another program."""
    return (_activations if p.method == "activations" else _weights)(view, symmetry, ids, p, rng, with_base)


def _weights(
    view: View, symmetry: Symmetry, ids: Sequence[bytes], p: ObservingParameters, rng: Rng, with_base: bool
) -> Observed:
    models: list[dict[str, Array]] = [{} for _ in ids]
    base: dict[str, Array] = {}
    for name in symmetry.tensors:
        u = view.whole(name)
        for meta, x in zip(u.meta, u.xs, strict=True):
            models[ids.index(meta.id)][name] = _array(x, u.shape)
        if with_base and u.base is not None:
            base[name] = _array(u.base, u.shape)
    return Observed(symmetry, models, base if with_base else None)


def _array(x: Tensor, shape: tuple[int, ...]) -> Array:
    found: Array = x.double().cpu().numpy().reshape(shape)
    return found


def _activations(
    view: View, symmetry: Symmetry, ids: Sequence[bytes], p: ObservingParameters, rng: Rng, with_base: bool
) -> Observed:
    """Their products are correlations."""
    numbers = {content: str(i) for i, content in enumerate(ids)}

    def models(u: Unit) -> dict[str, Tensor]:
        found = {numbers[m.id]: x.reshape(u.shape).cpu() for m, x in zip(u.meta, u.xs, strict=True)}
        if with_base and u.base is not None:
            found[BASE] = u.base.reshape(u.shape).cpu()
        return found

    ran = view.run("unit_activations", p.probing(rng), models, rng)
    seen = _fitted(view, decode(str(ran.values["groups"]).encode(), "the program"))
    places = {group: index for index, group in enumerate(seen.groups)}
    if not set(symmetry.groups) <= set(places):
        raise MismatchError(
            "the symmetry has groups that the program has not: it was derived from another program. Derive it from "
            "this one (crdtmerge symmetry --program P.pt2)."
        )
    rows = [
        [ran.tensors[f"{model}.{places[group]}"].numpy() for group in symmetry.groups]
        for model in (*numbers.values(), *([BASE] if with_base else []))
    ]
    like, found = standing_for(symmetry, rows)
    return Observed(like, found[: len(ids)], found[-1] if with_base else None)
