"""Messages between this process and the one that runs a program: a JSON head, then tensors as safetensors bytes.

    8 bytes: length of the head | head | safetensors bytes, as many as the head's ``nbytes`` says

Nothing is ever pickled. Both sides read no more than they are promised, and memory grows only with what arrives.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING, Any

from crdtmerge.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

LENGTH_BYTES = 8

HEAD_BYTES_MAX = 64 << 20
"""A head: parameters of a job, names of tensors, coefficients."""

TENSORS_BYTES_MAX = 1 << 40
"""Tensors of one message: those of a whole model fit."""

_STEP = 1 << 24


def send(stream: IO[bytes], head: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
    """Write a message. Raises OSError where nobody reads any more."""
    body = packed(tensors) if tensors else b""
    text = json.dumps(dict(head) | {"nbytes": len(body)}, allow_nan=False).encode()
    stream.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
    stream.write(body)
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Read a message; None where there is none any more. Raises InputError for what is no message."""
    prefix = _exactly(stream, LENGTH_BYTES)
    if prefix is None:
        return None
    text = _exactly(stream, _bounded(int.from_bytes(prefix, "little"), HEAD_BYTES_MAX))
    try:
        head = json.loads(text) if text is not None else None
        nbytes = head.pop("nbytes") if isinstance(head, dict) else None
        if not isinstance(head, dict) or type(nbytes) is not int or nbytes < 0:
            raise ValueError("no map with a length")
    except (ValueError, KeyError, RecursionError) as fault:
        raise InputError(f"a message between processes is malformed ({fault}).") from None
    body = _exactly(stream, _bounded(nbytes, TENSORS_BYTES_MAX))
    if body is None:
        return None
    return head, (unpacked(body) if body else {})


def packed(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as safetensors bytes."""
    from safetensors.torch import save

    written: bytes = save({name: x.detach().cpu().contiguous() for name, x in tensors.items()})
    return written


def unpacked(data: bytes) -> dict[str, Tensor]:
    """Tensors of safetensors bytes. Raises InputError."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        found: dict[str, Tensor] = load(data)
    except (SafetensorError, ValueError, KeyError) as fault:
        raise InputError(f"tensors between processes are malformed ({fault}).") from None
    return found


def _bounded(length: int, most: int) -> int:
    if length > most:
        raise InputError(f"a message between processes says it has {length} bytes; at most {most} are read.")
    return length


def _exactly(stream: IO[bytes], count: int) -> bytes | None:
    """So many bytes, None if the stream ends before."""
    if count <= _STEP:
        read = stream.read(count)
        return read if len(read) == count else None
    parts = bytearray()
    while len(parts) < count:
        step = stream.read(min(_STEP, count - len(parts)))
        if not step:
            return None
        parts += step
    return bytes(parts)
