"""Parameters of a strategy: typed, bounded, exact, and per tensor where the author of a recipe wants it.

Numbers are exact decimals (0.1 is a tenth). Names are the same in every strategy: fractions, never percent;
``density`` is the share kept and ``drop`` is read as 1 - density; ``lambda`` (``lambda_`` in Python) scales the merged
task vector. Any parameter may be a list of {filter: glob, value: ...} items: the first whose glob matches the
tensor's name counts, an item without filter is the default for the rest.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping
from decimal import Decimal
from functools import cached_property
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from crdtmerge.canonical import complement, decimal, decimal_text
from crdtmerge.errors import ParameterError

Number = Annotated[Decimal, BeforeValidator(decimal)]
Share = Annotated[Number, Field(gt=0, le=1)]


class Parameters(BaseModel):
    """Base of every strategy's parameters: immutable, unknown names refused, defaults filled in."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, validate_default=True)

    def canonical(self) -> dict[str, Any]:
        """Name to value, decimals as their one spelling: what a recipe id is computed over."""
        fields = self.model_dump(by_alias=True)
        return {name: decimal_text(v) if isinstance(v, Decimal) else v for name, v in fields.items()}


class WithLambda(Parameters):
    """Parameters of strategies that scale a merged task vector."""

    lambda_: Number = Field(Decimal(1), alias="lambda", description="scale of the merged task vector")


P = TypeVar("P", bound=Parameters)


class Filled(Generic[P]):
    """The parameters of a recipe with all defaults filled in: ``at(tensor name)`` gives those for one tensor."""

    def __init__(self, strategy: str, kind: type[P], asked: Mapping[str, Any]) -> None:
        self._strategy, self._kind = strategy, kind
        self._rules: list[tuple[str, str, Any]] = []
        general: dict[str, Any] = {}
        for said, value in asked.items():
            name, default, rules = _density_for_drop(strategy, kind, said, *_split(strategy, said, value))
            if name in general or any(name == other for other, _, _ in self._rules):
                raise ParameterError(f"strategy '{strategy}': {name} is said twice, also as {said}; give one of them.")
            self._rules += [(name, pattern, special) for pattern, special in rules]
            general |= {} if default is _UNSAID else {name: default}
        self.general: P = self._validated(general)
        self._asked = general
        self._known: dict[tuple[Any, ...], P] = {}
        for name, _, special in self._rules:
            self._validated(general | {name: special})

    def at(self, tensor: str) -> P:
        """The parameters that hold for a tensor."""
        chosen: dict[str, Any] = {}
        for name, pattern, special in self._rules:
            if name not in chosen and fnmatch.fnmatchcase(tensor, pattern):
                chosen[name] = special
        if not chosen:
            return self.general
        key = tuple(sorted((name, str(value)) for name, value in chosen.items()))
        if key not in self._known:
            self._known[key] = self._validated(self._asked | chosen)
        return self._known[key]

    def variants(self) -> list[P]:
        """The general parameters, and those of each rule for some tensors."""
        return [self.general] + [self._validated(self._asked | {name: special}) for name, _, special in self._rules]

    @cached_property
    def canonical(self) -> dict[str, Any]:
        """All parameters, spelled canonically; those with rules as {value, where: [[glob, value], ...]}."""
        filled = self.general.canonical()
        for name, pattern, special in self._rules:
            own = self._field(name)
            if not isinstance(filled[own], dict):
                filled[own] = {"value": filled[own], "where": []}
            value = self._validated(self._asked | {name: special}).canonical()[own]
            filled[own]["where"].append([pattern, value])
        return filled

    def varies(self, name: str) -> bool:
        """Whether a parameter has rules of its own for some tensors."""
        return any(self._field(rule) == name for rule, _, _ in self._rules)

    def _field(self, name: str) -> str:
        fields = self._kind.model_fields
        return (fields[name].alias or name) if name in fields else name

    def _validated(self, values: Mapping[str, Any]) -> P:
        try:
            return self._kind.model_validate(dict(values))
        except ValidationError as error:
            raise ParameterError(_sentence(self._strategy, self._kind, error)) from None


_UNSAID = object()


Rules = list[tuple[str, Any]]


def _split(strategy: str, name: str, value: Any) -> tuple[Any, Rules]:
    """A parameter as asked for -> (its general value, rules for tensors)."""

    def refuse(item: object) -> ParameterError:
        return ParameterError(f"strategy '{strategy}': {name} takes items of filter and value, not {item!r}.")

    if isinstance(value, Mapping) and set(value) == {"value", "where"}:
        where = value["where"]
        if not (isinstance(where, list) and all(isinstance(rule, list) and len(rule) == 2 for rule in where)):
            raise refuse(where)
        return value["value"], [(str(pattern), special) for pattern, special in where]
    if not (isinstance(value, list) and any(isinstance(item, Mapping) for item in value)):
        return value, []
    rules: Rules = []
    for item in value:
        if not isinstance(item, Mapping) or not set(item) <= {"filter", "value"} or "value" not in item:
            raise refuse(item)
        if item.get("filter") in (None, "*"):
            return item["value"], rules
        rules.append((str(item["filter"]), item["value"]))
    return _UNSAID, rules


def _density_for_drop(
    strategy: str, kind: type[Parameters], name: str, default: Any, rules: Rules
) -> tuple[str, Any, Rules]:
    """``drop`` read as 1 - density, where a strategy has a density; everything else as it is."""
    if name != "drop" or "drop" in kind.model_fields or "density" not in kind.model_fields:
        return name, default, rules
    try:
        kept = default if default is _UNSAID else complement(decimal(default))
        return "density", kept, [(pattern, complement(decimal(special))) for pattern, special in rules]
    except ValueError as error:
        raise ParameterError(f"strategy '{strategy}': drop: {error}.") from None


def _sentence(strategy: str, kind: type[Parameters], error: ValidationError) -> str:
    """A validation error as one sentence: which parameter, the value, what is allowed."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = [field.alias or name for name, field in kind.model_fields.items()]
        near = difflib.get_close_matches(name, known, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        return f"strategy '{strategy}' has no parameter {name!r}.{hint} It has: {', '.join(known) or 'none'}."
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return (
        f"strategy '{strategy}': {name} = {first.get('input')!r}: must be {message}."
        if "should" in first["msg"]
        else f"strategy '{strategy}': {name}: {message}."
    )
