"""What one reading of a tensor says of it, and the refusal of values that are no numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from crdtmerge.errors import NonFiniteError


class Facts(NamedTuple):
    """What pass 1 learns of a tensor: its digest (32 bytes); for floats, (count, first index) of NaN and infinity."""

    digest: bytes
    nonfinite: tuple[int, int] | None


MERGE_ANYWAY = "leave the tensor out with --exclude, or use --allow-nonfinite."
POOL_ANYWAY = "or leave the tensor out: only a pool that was begun with --exclude or --allow-nonfinite takes it."


def refuse_nonfinite(
    facts: Mapping[str, Facts], excludes: Callable[[str], bool], where: Callable[[str], str], way_out: str
) -> None:
    """Raise NonFiniteError if any tensor that is not left out holds NaN or infinity; ``where`` names its file."""
    for name, fact in facts.items():
        if fact.nonfinite and not excludes(name):
            count, first = fact.nonfinite
            raise NonFiniteError(
                f"{where(name)}: tensor {name!a} holds {count} values that are NaN or infinite, the first at index "
                f"{first}. One of them spoils every mean. Repair the model, {way_out}"
            )
