"""What is asked of a merge: the strategy and its parameters, base, output dtype, seed; canonical bytes and id.

A recipe says everything a merge depends on besides the set of contributions. It is written by a person in short
form, and *complete* once the strategy's version, every default and the base's content id are filled in; only a complete
recipe has an id, so that 1, 1.0 and a default left out give one id.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from crdtmerge.canonical import digest, pack
from crdtmerge.errors import UsageError

Missing = Literal["base", "skip"]

SEED_MAX = 1 << 64

_KINDS: dict[str, tuple[type, ...]] = {
    "version": (int,),
    "params": (dict,),
    "base": (str, type(None)),
    "dtype": (str, type(None)),
    "seed": (str, int),
    "missing": (str, type(None)),
    "exclude": (list,),
    "allow_nonfinite": (bool,),
}
_INPUTS = "inputs"
PLAN = "plan"
"""The name among a recipe's inputs of the plan that it applies."""


class Recipe:
    """A merge as asked for.

    ``seed`` is ``"root"`` (drawn from the Merkle root of the contributions) or an integer in [0, 2^64). ``dtype`` is
    the output's (a safetensors name) or None for the inputs' own. ``missing`` says what to do with tensors that some
    inputs lack, ``exclude`` holds globs of tensors that are copied instead of merged. ``inputs`` names what else is
    read, by digest: further models, programs, batches, a plan. With ``align`` (weights or activations) the strategy is
    that inside ``aligned``, which brings the units of all models into one order first.

    >>> Recipe("ties", density=0.2).params
    {'density': 0.2}
    >>> Recipe("ties", density=0.2, align="weights")
    Recipe('aligned', inner='ties', settings={'density': 0.2}, method='weights')
    """

    def __init__(
        self,
        strategy: str,
        *,
        version: int | None = None,
        base: bytes | None = None,
        dtype: str | None = None,
        seed: str | int = "root",
        missing: Missing | None = None,
        exclude: Sequence[str] = (),
        allow_nonfinite: bool = False,
        inputs: Mapping[str, bytes] | None = None,
        align: str | None = None,
        **params: Any,
    ) -> None:
        if align is not None:
            strategy, params = "aligned", {"inner": strategy, "settings": params, "method": align}
        self.inputs: dict[str, bytes] = dict(sorted((inputs or {}).items()))
        self.strategy, self.version, self.base, self.dtype = strategy, version, base, dtype
        self.seed = _seed(seed)
        self.missing, self.exclude, self.allow_nonfinite = missing, tuple(sorted(set(exclude))), allow_nonfinite
        for name, found in self.inputs.items():
            if not isinstance(name, str) or not isinstance(found, bytes) or len(found) != 32:
                raise UsageError(f"inputs: {name!a:.80} is {found!a:.80}; a name with a digest of 32 bytes is needed.")
        if missing not in (None, "base", "skip"):
            raise UsageError(f"missing = {missing!r}: must be base or skip.")
        self.params: dict[str, Any] = params

    @classmethod
    def of(cls, strategy: str, params: Mapping[str, Any], **options: Any) -> Recipe:
        """The same with the strategy's parameters apart from the recipe's own options, so that no name can clash."""
        recipe = cls(strategy, **options)
        if options.get("align") is not None:
            recipe.params["settings"] = dict(params)
        else:
            recipe.params = dict(params)
        return recipe

    def completed(
        self,
        version: int,
        params: Mapping[str, Any],
        base: bytes | None,
        inputs: Mapping[str, bytes] | None = None,
    ) -> Recipe:
        """The same recipe with the strategy's version, canonical parameters, the base's content id, inputs' digests."""
        return Recipe.of(
            self.strategy,
            params,
            version=version,
            base=base,
            dtype=self.dtype,
            seed=self.seed,
            missing=self.missing,
            exclude=self.exclude,
            allow_nonfinite=self.allow_nonfinite,
            inputs=self.inputs | dict(inputs or {}),
        )

    def with_dtype(self, dtype: str) -> Recipe:
        """The same recipe with another output dtype."""
        other = copy.copy(self)
        other.dtype = dtype
        return other

    def planned(self, plan: bytes | None) -> Recipe:
        """The same recipe, applying the plan with this digest; with None, making its own."""
        other = copy.copy(self)
        other.inputs = {name: found for name, found in self.inputs.items() if name != PLAN}
        other.inputs = dict(sorted((other.inputs | ({PLAN: plan} if plan else {})).items()))
        return other

    def canonical(self) -> dict[str, Any]:
        """The recipe as a value of strings, integers, lists and maps, ids in hexadecimal; inputs where it has any."""
        assert self.version is not None, "only a complete recipe has a canonical form"
        inputs = {name: found.hex() for name, found in self.inputs.items()}
        return ({_INPUTS: inputs} if inputs else {}) | {
            "strategy": self.strategy,
            "version": self.version,
            "params": self.params,
            "base": self.base.hex() if self.base else None,
            "dtype": self.dtype,
            "seed": self.seed,
            "missing": self.missing,
            "exclude": list(self.exclude),
            "allow_nonfinite": self.allow_nonfinite,
        }

    @classmethod
    def from_canonical(cls, value: Mapping[str, Any]) -> Recipe:
        """The complete recipe of a canonical form. Raises ValueError, KeyError or UsageError for anything else."""
        strategy, params, exclude = value["strategy"], value["params"], value["exclude"]
        for field, kinds in _KINDS.items():
            if type(value[field]) not in kinds:
                raise ValueError(f"recipe.{field} is {value[field]!r}")
        if set(value) - {_INPUTS} != {"strategy", *_KINDS} or not isinstance(strategy, str):
            raise ValueError("not the fields of a recipe")
        if not all(isinstance(glob, str) for glob in exclude):
            raise ValueError(f"recipe.exclude is {exclude!r}")
        inputs = _inputs(value[_INPUTS]) if _INPUTS in value else {}
        base = bytes.fromhex(value["base"]) if value["base"] else None
        options = {field: value[field] for field in ("version", "dtype", "seed", "missing", "allow_nonfinite")}
        return cls.of(strategy, params, base=base, exclude=exclude, inputs=inputs, **options)

    def excludes(self, name: str) -> bool:
        """Whether a tensor is left out of the merge."""
        return any(fnmatch.fnmatchcase(name, glob) for glob in self.exclude)

    @property
    def id(self) -> bytes:
        """SHA-256 over the canonical form, 32 bytes."""
        return digest("recipe", self.canonical())

    def seed_for(self, root: bytes) -> bytes:
        """The seed of a merge of the set with this root, 32 bytes."""
        return digest("seed", root if self.seed == "root" else self.seed)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(self.strategy)

    def __repr__(self) -> str:
        said = ", ".join(f"{name}={value!r}" for name, value in self.params.items())
        return f"Recipe({self.strategy!r}{', ' if said else ''}{said})"


def _inputs(value: object) -> dict[str, bytes]:
    """The inputs of a canonical form, where it has any. Raises ValueError."""
    said = dict(value) if isinstance(value, Mapping) else {}
    spelled = all(isinstance(name, str) and _is_digest(found) for name, found in said.items())
    if not said or not spelled:
        raise ValueError(f"recipe.inputs is {value!a:.200}")
    return {name: bytes.fromhex(found) for name, found in said.items()}


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _seed(value: str | int) -> str | int:
    text = str(value)
    if text == "root":
        return "root"
    if isinstance(value, bool) or not text.isdecimal() or int(text) >= SEED_MAX:
        raise UsageError(f"seed = {value!r}: must be 'root' or an integer from 0 to 2^64 - 1.")
    return int(text)


def recipe_bytes(recipe: Recipe) -> bytes:
    """The canonical bytes of a complete recipe."""
    return pack(recipe.canonical())
