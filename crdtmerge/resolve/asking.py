"""What is said by position, in Python or on the command line, as claims and a recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from crdtmerge.canonical import complement, decimal
from crdtmerge.errors import NeedsError, OpError, UsageError
from crdtmerge.numerics.dtypes import float_named
from crdtmerge.recipe import PLAN, Recipe
from crdtmerge.replica.contribution import ROLES, Claim, named
from crdtmerge.strategies import registry
from crdtmerge.strategies.parameters import Filled
from crdtmerge.strategies.protocol import Needs


def claims(
    count: int,
    *,
    weights: Sequence[object] | None = None,
    t: object = None,
    roles: Sequence[str] | None = None,
    tasks: Sequence[str | None] | None = None,
) -> list[Claim]:
    """The claims of ``count`` models from what was said by position. Raises UsageError for wrong numbers of them."""
    exact = [_weight(weight) for weight in weights or []]
    if t is not None:
        exact = list(pair_weights(_weight(t), count, bool(weights)))
    for said, what in ((exact, "weights"), (roles or [], "roles"), (tasks or [], "tasks")):
        if said and len(said) != count:
            raise UsageError(f"{len(said)} {what} for {count} models: give one for each model, or none.")
    return [
        Claim(
            exact[i] if exact else Decimal(1),
            roles[i] if roles else "task",
            tasks[i] if tasks else None,
        )
        for i in range(count)
    ]


def _weight(value: object) -> Decimal:
    try:
        return decimal(value)
    except ValueError as fault:
        raise UsageError(f"weight: {fault}.") from None


def said_weight(weight: object) -> Decimal | None:
    """A weight as the exact decimal that was meant, None if it is unsaid. Raises UsageError."""
    return None if weight is None else _weight(weight)


def said_role(role: str | None) -> str | None:
    """A role, if it is one. Raises UsageError."""
    if role is not None and role not in ROLES:
        raise UsageError(f"role = {role!r}: must be one of {', '.join(ROLES)}.")
    return role


def said_stats(stats: Mapping[str, Any] | None) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Statistics by name: those that are announced by their digests, and those that are here. Raises UsageError."""
    wanted = "a table of names with files, mappings of names to arrays, or digests of 32 bytes is needed"
    if stats is None:
        return {}, {}
    if not isinstance(stats, Mapping):
        raise UsageError(f"stats = {stats!a:.80}: {wanted}.")
    held = {name: value for name, value in stats.items() if isinstance(value, str | Path | Mapping)}
    try:
        said = named({name: bytes(32) if name in held else value for name, value in stats.items()}, "stats")
    except (OpError, TypeError) as fault:
        raise UsageError(f"{fault}: {wanted}.") from None
    return {name: digest for name, digest in said.items() if name not in held}, held


def said_text(what: str, text: str | None, bytes_max: int) -> str | None:
    """A short text, None if it is unsaid. Raises UsageError."""
    try:
        nbytes = len((text or "").encode())
    except (AttributeError, UnicodeEncodeError):
        raise UsageError(f"{what}: {text!a:.80} is no text.") from None
    if nbytes > bytes_max:
        raise UsageError(f"{what}: {nbytes} bytes; at most {bytes_max} are taken. Say it shorter.")
    return text or None


def recipe_of(strategy: str, params: Mapping[str, Any], **options: Any) -> tuple[Recipe, Any]:
    """A recipe from a strategy's name and parameters; ``seed``, ``t`` and ``align`` are not the strategy's own."""
    own = dict(params)
    if "lambda_" in own:
        if "lambda" in own:
            raise UsageError("lambda is said twice, also as lambda_: give one of them.")
        own["lambda"] = own.pop("lambda_")
    seed, t = own.pop("seed", "root"), own.pop("t", None)
    align = own.pop("align", None)
    options["align"] = options.get("align") or align
    if options.get("dtype"):
        named = float_named(str(options["dtype"]))
        options["dtype"] = named.name if named else options["dtype"]
    return Recipe.of(strategy, own, seed=seed, **options), t


def completed(recipe: Recipe, base: bytes | None) -> Recipe:
    """The recipe with version, all parameters and the base's content id. Raises UsageError, NeedsError."""
    recipe = with_dtype_named(recipe)
    strategy = registry.get(recipe.strategy)
    params: Filled[Any] = Filled(recipe.strategy, strategy.Params, recipe.params)
    needs = [strategy.needs(p) for p in params.variants()]
    refuse_other_inputs(recipe.inputs.keys() - {PLAN}, needs, recipe.strategy)
    if base is None and any(one.base == "required" for one in needs):
        raise NeedsError(f"strategy '{recipe.strategy}' needs a base: the model from which all were fine-tuned.")
    return recipe.completed(strategy.version, params.canonical, base)


def refuse_other_inputs(names: Iterable[str], needs: Iterable[Needs], strategy: str) -> None:
    """Raise UsageError for an input that the strategy does not have."""
    takes = sorted({name for one in needs for name in (*one.models, *one.inputs)})
    unknown = sorted(set(map(str, names)) - {*takes})
    if unknown:
        raise UsageError(
            f"strategy '{strategy}' has no input {unknown[0]!a:.80}. It has: {', '.join(takes) or 'none'}."
        )


def refuse_dtype(recipe: Recipe) -> None:
    """Raise UsageError unless the output dtype is one."""
    if recipe.dtype is not None and float_named(recipe.dtype) is None:
        raise UsageError(f"dtype = {recipe.dtype!r}: must be float64, float32, bfloat16 or float16.")


def with_dtype_named(recipe: Recipe) -> Recipe:
    """The recipe with its output dtype by safetensors' name, where torch's was said. Raises UsageError."""
    refuse_dtype(recipe)
    named = float_named(recipe.dtype or "")
    return recipe if named is None or named.name == recipe.dtype else recipe.with_dtype(named.name)


def refuse_version(recipe: Recipe) -> None:
    """Raise UsageError unless this program has the strategy of a complete recipe in the same version."""
    version = registry.get(recipe.strategy).version
    if version != recipe.version:
        raise UsageError(
            f"the recipe names version {recipe.version} of {recipe.strategy}; this program has version {version}, "
            "whose bytes differ. Use a program with that version, or give the pool another recipe."
        )


def pair_weights(t: Decimal, count: int, weighted: bool) -> tuple[Decimal, Decimal]:
    """``t`` for two models as weights (1-t, t) in the order given. Raises UsageError for anything else."""
    if weighted:
        raise UsageError("t and weights say the same thing twice: give one of them.")
    if count != 2:
        raise UsageError(f"t is for two models, not {count}; give weights instead.")
    if not 0 <= t <= 1:
        raise UsageError(f"t = {t}: must be from 0 to 1.")
    return complement(t), t
