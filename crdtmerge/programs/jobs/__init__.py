"""What is run on a program: one file a job, each a function of a ``Context``."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from crdtmerge.errors import UsageError
from crdtmerge.programs.context import Context, Result

JOBS = (
    "activations",
    "distillation",
    "entropy",
    "fisher",
    "fitness",
    "gram",
    "importance",
    "layer_gram",
    "rank_masks",
    "repair",
    "surgery",
    "symmetry",
    "unit_activations",
)


def job(name: str) -> Callable[[Context], Result]:
    """The function of a job. Raises UsageError."""
    if name not in JOBS:
        raise UsageError(f"no job is called {name!a}.")
    found: Callable[[Context], Result] = import_module(f"crdtmerge.programs.jobs.{name}").run
    return found
