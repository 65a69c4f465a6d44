"""What a job gets and gives back, in the process that runs the program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from crdtmerge.errors import NeedsError
from crdtmerge.programs.exported import Batches, Program

if TYPE_CHECKING:
    from torch import Tensor


class Result(NamedTuple):
    """What a job found: JSON values, and tensors by name."""

    values: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


class Saved(NamedTuple):
    """A job's state between two steps."""

    step: int
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Context:
    """A program, batches by task, groups of tensors by name, parameters; ways to say how far it is and to save."""

    program: Program
    data: Mapping[str, Batches]
    groups: Mapping[str, Mapping[str, Tensor]]
    params: Mapping[str, Any]
    progress: Callable[[int, int], None] = lambda done, total: None
    save: Callable[[int, Mapping[str, Tensor]], None] = lambda step, tensors: None
    resumed: Saved | None = None
    rest: Mapping[str, Tensor] = field(default_factory=dict)

    def one_task(self) -> Batches:
        """The data where there is one task alone. Raises NeedsError."""
        if len(self.data) > 1:
            raise NeedsError(
                f"the data holds the tasks {', '.join(self.data)}; give those of one, called inputs, labels."
            )
        return next(iter(self.data.values()))

    def of_task(self, task: str) -> Batches:
        """The data of a task. Raises NeedsError."""
        if task in self.data:
            return self.data[task]
        raise NeedsError(
            f"the data lacks {task + '.inputs'!a}, the examples of a model's task; it has the tasks "
            f"{', '.join(map(ascii, self.data))}."
        )


def labels_of(batch: Batches) -> Tensor:
    """Whole-numbered labels, one an example. Raises NeedsError."""
    if batch.labels is None or batch.labels.dim() != 1 or batch.labels.is_floating_point():
        where = f"{batch.task}.labels" if batch.task else "labels"
        raise NeedsError(f"the data needs {where!a}: one whole number (int64) for each example.")
    return batch.labels.long()
