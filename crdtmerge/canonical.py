"""The one byte form of values, and hashing in separate domains.

Values are None, bool, int, str, bytes, lists and maps with string keys. Their byte form is MessagePack in its
shortest encoding with map keys sorted by their UTF-8 bytes; floats are refused, numbers that are not integers
travel as exact decimal strings (``decimal_text``). Two equal values have one byte form on every machine.

>>> pack({"b": 1, "a": [True, "x"]}) == pack({"a": [True, "x"], "b": 1})
True
>>> digest("example", {"a": 1}).hex()[:16]
'd5245a08781f4fb2'
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation, localcontext
from typing import Any

import msgpack

DECIMAL_DIGITS_MAX = 40
"""Digits of a number in a recipe or claim, without zeros at either end: a float has at most 17."""

DECIMAL_EXPONENT_MAX = 300
"""The largest power of ten, in size, of such a number: within what a float64 holds."""


_SIMPLE = frozenset({type(None), bool, int, str, bytes})


def _plain(value: Any) -> Any:
    """The value with its maps in order: code points sort as their UTF-8 bytes do."""
    if type(value) in _SIMPLE:
        return value
    if isinstance(value, list | tuple):
        return [item if type(item) in _SIMPLE else _plain(item) for item in value]
    if isinstance(value, Mapping):
        assert all(isinstance(key, str) for key in value), "canonical maps have string keys"
        return {key: _plain(value[key]) for key in sorted(value)}
    raise TypeError(f"{type(value).__name__} has no canonical byte form")


def pack(value: Any) -> bytes:
    """The canonical bytes of a value. Raises TypeError for floats and other types without such a form."""
    packed: bytes = msgpack.packb(_plain(value), use_bin_type=True)
    return packed


DEPTH_MAX = 32
"""Levels of lists and maps in canonical bytes that are read: ours have at most eight. A bound of our own, since the
interpreter's depends on how deep the caller stands."""


def unpack(data: bytes) -> Any:
    """The value of canonical bytes. Raises ValueError for any others: values have one byte form.

    >>> unpack(pack({"a": [1, None]}))
    {'a': [1, None]}
    """
    try:
        value = msgpack.unpackb(data)
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as fault:
        raise ValueError(f"no MessagePack, or not of our kinds ({type(fault).__name__})") from None
    _check_plain(value)
    if pack(value) != data:
        raise ValueError("not in canonical form")
    return value


def _check_plain(value: Any) -> None:
    """Raise ValueError for kinds of values without canonical form, or for too many levels of them."""
    level = [value]
    for _ in range(DEPTH_MAX):
        below: list[Any] = []
        for item in level:
            if isinstance(item, list):
                below += item
            elif isinstance(item, dict):
                if not all(isinstance(key, str) for key in item):
                    raise ValueError("a map has keys that are no text")
                below += item.values()
            elif item is not None and not isinstance(item, bool | int | str | bytes):
                raise ValueError(f"{type(item).__name__} has no canonical byte form")
        if not below:
            return
        level = below
    raise ValueError(f"more than {DEPTH_MAX} levels of lists and maps")


def digest(domain: str, value: Any) -> bytes:
    """SHA-256 of a value's canonical bytes within a domain, 32 bytes.

    The domain string stops bytes hashed for one purpose from being replayed for another.
    """
    return hashlib.sha256(f"crdtmerge/{domain}/1\0".encode() + pack(value)).digest()


def decimal(value: Any) -> Decimal:
    """A number as the exact decimal its writer meant: floats through their shortest repr, never their bits.

    Raises ValueError for what is no finite number or is longer than any number a person writes.

    >>> decimal(0.1), decimal("1e-3"), decimal(3)
    (Decimal('0.1'), Decimal('0.001'), Decimal('3'))
    """
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a number of numpy or torch
        value = value.item()
    if isinstance(value, bool):
        raise ValueError(f"{value!r} is not a number")
    try:
        number = (
            value if isinstance(value, Decimal) else Decimal(value if isinstance(value, int | str) else repr(value))
        )
    except (InvalidOperation, ValueError):
        raise ValueError(f"{value!r} is not a number") from None
    if not number.is_finite():
        raise ValueError(f"{value!r} is not a finite number")
    written = "".join(map(str, number.as_tuple().digits)).strip("0")
    if len(written) > DECIMAL_DIGITS_MAX or abs(number.adjusted()) > DECIMAL_EXPONENT_MAX:
        raise ValueError(f"a number of more than {DECIMAL_DIGITS_MAX} digits or beyond 1e{DECIMAL_EXPONENT_MAX}")
    return Decimal(decimal_text(number))


def decimal_text(number: Decimal) -> str:
    """The one spelling of a decimal: no exponent, no trailing zeros, no minus zero.

    >>> decimal_text(Decimal("1.50")), decimal_text(Decimal("1E+2")), decimal_text(Decimal("-0.0"))
    ('1.5', '100', '0')
    """
    text = format(number, "f")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def complement(number: Decimal) -> Decimal:
    """1 - number, exactly.

    >>> complement(Decimal("0.3"))
    Decimal('0.7')
    """
    with localcontext(prec=2 * (DECIMAL_DIGITS_MAX + DECIMAL_EXPONENT_MAX)):
        return 1 - number
