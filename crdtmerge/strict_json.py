"""JSON from outside, read so that no two parsers can disagree about it.

RULES
1. UTF-8 without a byte order mark, beginning with ``{``; nothing but spaces after the closing brace.
2. Brackets nest at most ``depth`` deep. This is checked before parsing, so that no input exhausts the stack.
3. No key appears twice in one map, at any level.
4. No lone surrogates, no NaN or Infinity, no fractions unless ``fractions`` is set, no integer of more than 100 digits.
5. Every fault raises the error class that the caller names; the message begins with ``where``.

>>> from crdtmerge.errors import CheckpointError
>>> parse(b'{"a": [1, 2]}', "x.json", CheckpointError)
{'a': [1, 2]}
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NoReturn

from crdtmerge.errors import InputError

Refuse = Callable[[str], NoReturn]
"""Raises the caller's error class for a fault, which completes the sentence begun by ``where``."""

DIGITS_MAX = 100
"""Digits of an integer: tokenizers write a model_max_length of 31; Python itself stops at 4300."""

_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+\\?+"?+', re.DOTALL)  # an unterminated one runs to the end
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_ROUND = bytes.maketrans(b"[]", b"{}")
_ODD_NUMBER = re.compile(rb"-|[0-9]{%d}" % (DIGITS_MAX + 1))
_SURROGATE = re.compile("[\ud800-\udfff]")


def parse(
    data: bytes,
    where: str,
    error: type[InputError],
    *,
    what: str = "file",
    depth: int = 8,
    marks_max: int | None = None,
    fractions: bool = False,
    negatives: bool = False,
) -> dict[str, Any]:
    """The map that ``data`` holds. ``what`` names it in messages.

    ``marks_max`` bounds quotes, commas and brackets, each, and so the memory that parsing takes.
    """

    def refuse(fault: str) -> NoReturn:
        raise error(f"{where}: {what} {fault}.")

    text = _decoded(data, refuse)
    _check_marks(data, marks_max, refuse)
    bare = _STRING.sub(b"", data)
    _check_nesting(bare, depth, refuse)
    hooks = _hooks(fractions, refuse)
    if _ODD_NUMBER.search(bare):  # only then are integers worth a call each
        hooks["parse_int"] = lambda digits: _integer(digits, negatives, refuse)
    try:
        value = json.loads(text, **hooks)
    except json.JSONDecodeError as fault:
        _refuse_syntax(fault, refuse)
    if b"\\u" in data:
        _check_surrogates(value, refuse)
    assert isinstance(value, dict), "text that begins with { is a map"
    return value


def _hooks(fractions: bool, refuse: Refuse) -> dict[str, Any]:
    def not_a_number(digits: str) -> NoReturn:
        refuse(f"holds {digits[:40]}, not a whole number")

    return {
        "object_pairs_hook": lambda pairs: _unique(pairs, refuse),
        "parse_float": float if fractions else not_a_number,
        "parse_constant": float if fractions else not_a_number,
    }


def _decoded(data: bytes, refuse: Refuse) -> str:
    if not data.startswith(b"{"):
        refuse(f"must begin with {{; it begins with {ascii(data[:8])[2:-1]}" if data else "is empty")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as fault:
        refuse(f"is not UTF-8 at byte {fault.start}")


def _check_marks(data: bytes, marks_max: int | None, refuse: Refuse) -> None:
    for mark in b'",{[' if marks_max is not None else b"":
        count = data.count(mark)
        if count > (marks_max or 0):
            refuse(f"holds {count} of {chr(mark)}; the limit is {marks_max}")


def _check_nesting(bare: bytes, depth: int, refuse: Refuse) -> None:
    """``bare`` is the text without its strings."""
    skeleton = bare.translate(_ROUND, delete=_NOT_BRACKETS)
    for _ in range(depth):
        skeleton = skeleton.replace(b"{}", b"")
    if len(skeleton) > depth:
        refuse(f"is nested deeper than {depth}, or its brackets do not match")


def _unique(pairs: list[tuple[str, Any]], refuse: Refuse) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        refuse(f"has {twice[:200]!a} twice")
    return found


def _check_surrogates(value: Any, refuse: Refuse) -> None:
    text = json.dumps(value, ensure_ascii=False)
    half = _SURROGATE.search(text)
    if half:
        refuse(f"holds half a surrogate pair: {text[max(0, half.start() - 40) : half.end()]!a}")


def _integer(digits: str, negatives: bool, refuse: Refuse) -> int:
    if len(digits) > DIGITS_MAX:
        refuse(f"holds an integer of {len(digits)} digits")
    if digits.startswith("-") and not negatives:
        refuse(f"holds the negative number {digits}")
    return int(digits)


def _refuse_syntax(fault: json.JSONDecodeError, refuse: Refuse) -> NoReturn:
    at = len(fault.doc[: fault.pos].encode())
    if fault.pos >= len(fault.doc.rstrip()) or fault.msg.startswith("Unterminated"):
        refuse(f"is not complete JSON (ends at byte {len(fault.doc.encode())})")
    refuse(f"is not JSON: {fault.msg[:1].lower()}{fault.msg[1:]} at byte {at}")
