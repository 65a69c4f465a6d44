"""One order of units for all peers: matched once before they mix, or into each peer's own at every merge.

    once:   P_1, ..., P_n = MergeMany of all first contributions;  peer i goes on with P_i theta_i
            who comes later: P = match(mean of those who are aligned, theta)
    every:  x_i <- sum_j w_ij P_ij x_j,  P_ij the permutations that bring x_j into the order of x_i      (DIMAT)

Once is better: where the units already correspond, to match again adds noise. All of it is a function of the set of
contributions alone, so that peers with equal sets need not talk about it.

Source: Saadati et al., "DIMAT: Decentralized Iterative Merging-And-Training", CVPR 2024, arXiv:2404.08079; Ainsworth,
Hayase, Srinivasa, "Git Re-Basin", ICLR 2023, arXiv:2209.04836, algorithm 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from crdtmerge.errors import UsageError
from crdtmerge.strategies.matching import match_many, match_to, standing_for
from crdtmerge.symmetry.groups import Permutation, Symmetry
from crdtmerge.train.pool import State

if TYPE_CHECKING:
    from torch import Tensor

Watch = Callable[[State], Sequence[NDArray[np.float64]]]
"""What the units of each group give out on some inputs that all peers have: float64 [size, samples] for each group."""


@dataclass(frozen=True)
class Alignment:
    """How models are matched: by their weights, or by what their units do.

    Args:
        symmetry: which axes of which tensors may be reordered together.
        when: ``once`` before mixing, or at ``every`` merge into one's own order.
        watch: activations to match by instead of weights.
    """

    symmetry: Symmetry
    when: Literal["once", "every"] = "once"
    watch: Watch | None = None

    def __post_init__(self) -> None:
        if self.when not in ("once", "every"):
            raise UsageError(f"when = {self.when!r}: must be once or every.")

    def together(self, models: Sequence[State]) -> list[list[Permutation]]:
        """The permutations that bring all models together, none of them being the measure."""
        symmetry, tensors = self._matched(models)
        return match_many(symmetry, tensors)

    def onto(self, reference: State, model: State) -> list[Permutation]:
        """The permutations that bring a model's units into the order of the reference's."""
        symmetry, (ours, theirs) = self._matched([reference, model])
        return match_to(symmetry, ours, theirs)

    def turned(self, model: State, permutations: Sequence[Permutation]) -> dict[str, Tensor]:
        """The model reordered."""
        return {name: self.symmetry.turned(name, x, permutations) for name, x in model.items()}

    def _matched(self, models: Sequence[State]) -> tuple[Symmetry, list[dict[str, Any]]]:
        """What is matched: the weights, or activations as tensors of which each has one group."""
        symmetry = self.symmetry
        for number, model in enumerate(models):
            symmetry = symmetry.fitted({name: x.shape for name, x in model.items()}, f"model {number + 1}")
        if self.watch is None:
            named = symmetry.of_tensor
            return symmetry, [{name: model[name].double().cpu().numpy() for name in named} for model in models]
        return standing_for(self.symmetry, [[_standardised(x) for x in self.watch(model)] for model in models])


def _standardised(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows with mean 0 and length 1, so that products are correlations; those of dead units are 0."""
    centred = np.asarray(x, np.float64)
    centred = centred - centred.mean(axis=1, keepdims=True)
    length = np.sqrt((centred * centred).sum(axis=1, keepdims=True))
    found: NDArray[np.float64] = np.divide(centred, length, out=np.zeros_like(centred), where=length > 0)
    return found
