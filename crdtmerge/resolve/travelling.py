"""Inputs that travel with the models: found among the files that the base or the contributions carry.

RULES
1. What is given by hand comes first, and then what the recipe names by its digest, whoever carries it.
2. Else it is the base's file; else that of the contributions that have one, which must have the same.

So the input is a function of the set and the recipe: neither the order of the models nor the machine enters, and its
digest enters the recipe as that of a file given by hand does. In a pool to which anyone contributes it belongs with the
base, which nobody can change: a contribution with another one would stop the merge.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import chain

from crdtmerge.errors import MismatchError
from crdtmerge.resolve.sources import Source
from crdtmerge.strategies.protocol import InputFile

TRAVELLING = {"symmetry": "symmetry.json"}
"""Inputs that travel, and the carried files that they are."""


def carried_input(name: str, asked: bytes | None, models: Sequence[Source], base: Source | None) -> InputFile | None:
    """The input with this name, of the digest that is asked for if one is; None where nobody carries it.

    Raises MismatchError where contributions carry different ones, NeedsError where one is announced and not here.
    """
    of_base, of_models = (_carried(TRAVELLING[name], sources) for sources in ([base] if base else [], models))
    if asked is not None:
        return next((one for one in chain(of_base, of_models) if hashlib.sha256(one.data).digest() == asked), None)
    first = next(of_base, None)
    if first is not None:
        return first
    first = next(of_models, None)
    for other in of_models:
        if first is not None and other.data != first.data:
            raise MismatchError(
                f"{first.where} and {other.where} differ, and the base has none: this merge has no one {name}. Give "
                f"one with --input {name}=PATH, or leave out the contributions that carry another."
            )
    return first


def _carried(file: str, sources: Sequence[Source]) -> Iterator[InputFile]:
    for source in sources:
        data = source.carried_file(file)
        if data is not None:
            yield InputFile(data, f"the {file} of {source.label}")
