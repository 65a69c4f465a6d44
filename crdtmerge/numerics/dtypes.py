"""The element types of stored tensors: their names in every spelling, their sizes, and the types we compute in.

Names are those of safetensors (``BF16``); ``torch_name`` is torch's and Hugging Face's (``bfloat16``).
Storage types that numpy lacks are handled as unsigned integers of the same size (``raw``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class DType:
    """One element type: ``kind`` is float, int, uint, bool, or packed (known, but not mergeable for now)."""

    name: str
    bits: int
    kind: str
    torch_name: str
    raw: np.dtype[np.generic]

    @property
    def itemsize(self) -> int:
        """Bytes an element, for types of whole bytes."""
        return self.bits // 8

    def nbytes(self, shape: Iterable[int]) -> int:
        """Bytes of a tensor.

        >>> DTYPES["F4"].nbytes((3, 2))
        3
        """
        bits = self.bits
        for size in shape:
            bits *= size
        return bits // 8

    @property
    def floating(self) -> bool:
        """Whether tensors of this type are merged (others must be equal in all inputs)."""
        return self.kind == "float"


def _table(*rows: tuple[str, int, str, str, str]) -> dict[str, DType]:
    return {name: DType(name, bits, kind, torch_name, np.dtype(raw)) for name, bits, kind, torch_name, raw in rows}


DTYPES = _table(
    ("F64", 64, "float", "float64", "<f8"),
    ("F32", 32, "float", "float32", "<f4"),
    ("BF16", 16, "float", "bfloat16", "<u2"),
    ("F16", 16, "float", "float16", "<u2"),
    ("I64", 64, "int", "int64", "<i8"),
    ("I32", 32, "int", "int32", "<i4"),
    ("I16", 16, "int", "int16", "<i2"),
    ("I8", 8, "int", "int8", "i1"),
    ("U64", 64, "uint", "uint64", "<u8"),
    ("U32", 32, "uint", "uint32", "<u4"),
    ("U16", 16, "uint", "uint16", "<u2"),
    ("U8", 8, "uint", "uint8", "u1"),
    ("BOOL", 8, "bool", "bool", "u1"),
    ("C64", 64, "packed", "complex64", "<u8"),
    ("F8_E4M3", 8, "packed", "float8_e4m3fn", "u1"),
    ("F8_E5M2", 8, "packed", "float8_e5m2", "u1"),
    ("F8_E8M0", 8, "packed", "float8_e8m0fnu", "u1"),
    ("F8_E4M3FNUZ", 8, "packed", "float8_e4m3fnuz", "u1"),
    ("F8_E5M2FNUZ", 8, "packed", "float8_e5m2fnuz", "u1"),
    ("F4", 4, "packed", "float4_e2m1fn_x2", "u1"),
    ("F6_E2M3", 6, "packed", "", "u1"),
    ("F6_E3M2", 6, "packed", "", "u1"),
)
"""Every dtype a safetensors header may name."""

FLOATS = {name: dtype for name, dtype in DTYPES.items() if dtype.floating}
"""The dtypes that are merged, and that an output may have."""

BY_TORCH_NAME = {dtype.torch_name: dtype for dtype in DTYPES.values() if dtype.torch_name}


def float_named(text: str) -> DType | None:
    """The float dtype meant by any common spelling, or None.

    >>> float_named("bfloat16").name, float_named("F32").name, float_named("torch.float16").name
    ('BF16', 'F32', 'F16')
    """
    short = text.removeprefix("torch.").lower()
    aliases = {
        "bf16": "BF16",
        "fp16": "F16",
        "half": "F16",
        "fp32": "F32",
        "float": "F32",
        "fp64": "F64",
        "double": "F64",
    }
    aliases |= {dtype.torch_name: name for name, dtype in FLOATS.items()} | {name.lower(): name for name in FLOATS}
    return FLOATS.get(aliases.get(short, ""))
