"""Recognising weights that cannot be merged as they are: quantised, packed or complex ones, and low-rank adapters.

The average of codes means nothing, nor does that of the two factors of an adapter taken apart, and a merge of them
would look like any other. So they are refused, by the dtype, by the tensors that only such checkpoints have, or by
what config.json says, naming the marker found.
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
_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
_CONFIG_KEYS = ("quantization_config", "compression_config")


def refuse_tensor(entry: Entry, where: str) -> None:
    """Raises CheckpointError for a tensor that only a quantised checkpoint or an adapter has."""
    if entry.dtype.kind == "packed":
        _refuse(where, f"tensor {entry.name!a} of dtype {entry.dtype.name}")
    parts = entry.name.split(".")
    if parts[-1] in _LAST_PARTS or any(part.startswith("quant_state") for part in parts):
        _refuse(where, f"tensor {entry.name!a}")
    if any(part in _FACTORS for part in parts):
        raise CheckpointError(
            f"{where}: a low-rank adapter (tensor {entry.name!a}): the mean of its factors is not the mean of its "
            "products. Merge it into its base first (PEFT's merge_and_unload) and give the result."
        )


def refuse_config(config: Mapping[str, Any], where: str) -> None:
    """Raises CheckpointError when a config.json says that the weights are quantised."""
    for key in _CONFIG_KEYS:
        if config.get(key):
            _refuse(where, f"the key {key}")


def _refuse(where: str, marker: str) -> NoReturn:
    raise CheckpointError(
        f"{where}: quantised or complex weights ({marker}): their codes have no linear structure to average. "
        "Merge the original weights, then quantise."
    )
