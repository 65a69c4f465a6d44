"""Recognising weights that cannot be merged because their bytes are codes: quantised, packed or complex.

The average of codes means nothing, and a merge of them would look like any other. So they are refused, by the dtype,
by the tensors that only quantised checkpoints have, or by what config.json says, naming the marker found.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from crdtmerge.errors import CheckpointError
from crdtmerge.weights.header import Entry

_LAST_PARTS = {
    *("qweight", "qzeros", "g_idx"),  # GPTQ and AWQ
    *("weight_scale", "weight_scale_inv", "weight_packed", "weight_zero_point"),  # fp8, compressed-tensors
    *("SCB", "absmax"),  # bitsandbytes
}
_CONFIG_KEYS = ("quantization_config", "compression_config")


def refuse_quantised_tensor(entry: Entry, where: str) -> None:
    """Raises CheckpointError for a tensor that only a quantised checkpoint has."""
    if entry.dtype.kind == "packed":
        _refuse(where, f"tensor {entry.name!a} of dtype {entry.dtype.name}")
    parts = entry.name.split(".")
    if parts[-1] in _LAST_PARTS or any(part.startswith("quant_state") for part in parts):
        _refuse(where, f"tensor {entry.name!a}")


def refuse_quantised_config(config: Mapping[str, Any], where: str) -> None:
    """Raises CheckpointError when a config.json says that the weights are quantised."""
    for key in _CONFIG_KEYS:
        if config.get(key):
            _refuse(where, f"the key {key}")


def _refuse(where: str, marker: str) -> NoReturn:
    raise CheckpointError(
        f"{where}: quantised or complex weights ({marker}): their codes have no linear structure to average. "
        "Merge the original weights, then quantise."
    )
