"""What strategies share that hold another one: which, with which settings, and which tensors go together.

A strategy inside another is named by ``inner`` and set by ``settings``: a map, or text such as
``density=0.3,scope=tensor``. What it needs, the outer one needs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field

from crdtmerge.errors import ParameterError
from crdtmerge.strategies import registry
from crdtmerge.strategies.parameters import Filled, Parameters
from crdtmerge.strategies.protocol import Needs, Strategy, View

P = TypeVar("P", bound=Parameters)

INPUTS = ("program", "data")
"""What strategies read that run a model."""


def _settings(value: Any) -> Any:
    """Text as a map; a map as it is."""
    if not isinstance(value, str):
        return value
    parts = [[word.strip() for word in part.split("=", 1)] for part in value.split(",") if part.strip()]
    if not all(len(part) == 2 and part[0] for part in parts):
        raise ValueError(f"settings {value!r} are written as NAME=VALUE,NAME=VALUE")
    return {part[0]: part[1] for part in parts}


Settings = Annotated[dict[str, Any], BeforeValidator(_settings)]


class WithInner(Parameters):
    """Parameters of strategies that hold another one."""

    inner: str = Field("task_arithmetic", description="the strategy inside")
    settings: Settings = Field(default_factory=dict, description="its parameters: NAME=VALUE,NAME=VALUE, or a map")

    def canonical(self) -> dict[str, Any]:
        return super().canonical() | {"settings": self.filled().canonical}

    def strategy(self) -> Strategy[Any]:
        """The strategy inside. Raises UnknownStrategyError."""
        return registry.get(self.inner)

    def filled(self) -> Filled[Any]:
        """Its parameters. Raises ParameterError."""
        strategy = self.strategy()
        if isinstance(strategy.Params, type) and issubclass(strategy.Params, WithInner):
            raise ParameterError(f"inner = {self.inner!r}: holds a strategy itself; give one that does not.")
        return Filled(self.inner, strategy.Params, self.settings)

    def inner_needs(self) -> Needs:
        """What it needs for these settings."""
        return self.strategy().needs(self.filled().general)


@lru_cache(4096)
def _at(strategy: str, written: str) -> Any:
    return Filled(strategy, registry.get(strategy).Params, json.loads(written)).general


def parameters_of(strategy: str, settings: Mapping[str, Any]) -> Any:
    """The parameters that settings for one tensor give, made once."""
    return _at(strategy, json.dumps(dict(settings), sort_keys=True, default=str))


def the_same(view: View, p: Callable[[str], P], strategy: str) -> P:
    """The parameters that hold for all tensors. Raises ParameterError where there are rules for some."""
    chosen = [p(name) for name in view.names]
    if any(one != chosen[0] for one in chosen[1:]):
        raise ParameterError(
            f"strategy '{strategy}': its plan is made of the whole model at once; parameters for some tensors have no "
            "meaning. Give one value for all."
        )
    return chosen[0]


def size_of(shape: Sequence[int]) -> int:
    """How many elements a shape has.

    >>> size_of((2, 3)), size_of(())
    (6, 1)
    """
    count = 1
    for length in shape:
        count *= length
    return count


Granularity = Literal["model", "layer", "tensor"]


def layers(names: Sequence[str], granularity: Granularity) -> dict[str, int]:
    """Which tensors go together, as an index for each: all of them, those of a block, or each by itself.

    Blocks are told by the first number in a name (``model.layers.17.mlp.weight``); what has none is a block too.

    >>> layers(["a.0.w", "a.1.w", "a.1.b", "head"], "layer")
    {'a.0.w': 0, 'a.1.w': 1, 'a.1.b': 1, 'head': 2}
    """
    if granularity == "model":
        return dict.fromkeys(names, 0)
    if granularity == "tensor":
        return {name: index for index, name in enumerate(names)}
    blocks = {name: re.match(r"(?:.*?\.)??\d+(?=\.|$)", name) for name in names}
    index: dict[str, int] = {}
    return {name: index.setdefault(found.group() if found else "", len(index)) for name, found in blocks.items()}
