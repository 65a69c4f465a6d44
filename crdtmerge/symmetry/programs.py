"""The permutation groups of a module or an exported program, tried before they are given out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree

from crdtmerge.errors import InputError, NeedsError
from crdtmerge.symmetry.check import lifted
from crdtmerge.symmetry.check import verify as verified
from crdtmerge.symmetry.derive import derived

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.nn import Module

    from crdtmerge.symmetry.groups import Symmetry

SEEDS = 2
"""How often groups are reordered at random before they are given out."""


def permutation_groups(
    program: Module | ExportedProgram, example_inputs: Sequence[Any] | None = None, verify: bool = True
) -> Symmetry:
    """What of a network's parameters may be reordered together without changing what it computes.

        f(turned(theta), x) = f(theta, x)    for every permutation of every group

    A module is exported in evaluation mode with the example inputs. With ``verify`` the groups are reordered at random
    and the results compared, on the example inputs or those that the program was exported with. For a file (.pt2), use
    `crdtmerge symmetry`, which opens it in a process of its own.

    Raises NeedsError without inputs to try it with, InputError for a module that cannot be exported, MismatchError
    where reordering changes a result.

    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    >>> [(group.size, len(group.axes)) for group in permutation_groups(net, (torch.randn(4, 2),)).groups]
    [(3, 3)]

    Source: the splitting and uniting of dimensions, and the check, are ours; groups as in Ainsworth et al., ICLR 2023,
    arXiv:2209.04836.
    """
    exported = _exported(program, example_inputs) if isinstance(program, torch.nn.Module) else program
    found = derived(exported).symmetry
    if verify and found.groups:
        given = (tuple(example_inputs), {}) if example_inputs is not None else exported.example_inputs
        if given is None:
            raise NeedsError("trying the groups needs inputs: give example_inputs, or verify=False.")
        inputs = _pytree.tree_leaves(given)
        for seed in range(SEEDS):
            verified(lifted(exported), exported.state_dict, found, inputs, seed)
    return found


def _exported(module: Module, inputs: Sequence[Any] | None) -> ExportedProgram:
    """A module in evaluation mode as a program; it is left in the mode that it was in."""
    if inputs is None:
        raise NeedsError("a module is exported with example inputs: give example_inputs, a tuple of them.")
    modes = [(part, part.training) for part in module.modules()]
    try:
        return torch.export.export(module.eval(), tuple(inputs))
    except (RuntimeError, TypeError, ValueError, AssertionError, AttributeError, NotImplementedError) as fault:
        said = str(fault).strip().splitlines() or [type(fault).__name__]
        raise InputError(
            f"torch.export cannot follow the module ({said[0][:200]}); rewrite what it stops at."
        ) from fault
    finally:
        for part, training in modes:
            part.training = training
