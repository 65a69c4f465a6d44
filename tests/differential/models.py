"""Tiny Llama-shaped models with the same bits on every machine: a base, three fine-tunes of it, three strangers.

A fine-tune is the base, plus what all fine-tunes share, plus its own: so their task vectors have a cosine of about one
half, as those of real fine-tunes of one model do. A stranger has nothing in common with anything.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

State = dict[str, torch.Tensor]

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
WORDS = {"F32": "float32", "BF16": "bfloat16"}

BASE_STD = 0.02
TUNE_STD = 7e-4
TUNE_NORM_STD = 7e-3

HIDDEN, FFN, KV, LAYERS, VOCAB = 64, 176, 32, 4, 103

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

NAMES = ("base", "ft1", "ft2", "ft3", "far1", "far2", "far3")


def shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of a model."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for number in range(LAYERS):
        layer = f"model.layers.{number}"
        found |= {
            f"{layer}.input_layernorm.weight": (HIDDEN,),
            f"{layer}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{layer}.self_attn.k_proj.weight": (KV, HIDDEN),
            f"{layer}.self_attn.v_proj.weight": (KV, HIDDEN),
            f"{layer}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{layer}.post_attention_layernorm.weight": (HIDDEN,),
            f"{layer}.mlp.gate_proj.weight": (FFN, HIDDEN),
            f"{layer}.mlp.up_proj.weight": (FFN, HIDDEN),
            f"{layer}.mlp.down_proj.weight": (HIDDEN, FFN),
        }
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


def numbers(seed: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Nearly normal numbers of mean 0 and variance 1: sums of eight 16-bit integers, scaled."""
    count = math.prod(shape)
    raw = np.frombuffer(hashlib.shake_256(seed.encode()).digest(16 * count), "<i2").astype(np.int64)
    sums: NDArray[np.float64] = raw.reshape(count, 8).sum(1).astype(np.float64).reshape(shape)
    return sums * (math.sqrt(1.5) / 2.0**16)


def state(who: str, dtype: str) -> State:
    """One model."""
    return {name: _tensor(who, dtype, name, shape) for name, shape in shapes().items()}


def _tensor(who: str, dtype: str, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    is_norm = name.endswith("norm.weight")
    origin = who if who.startswith("far") else "base"
    values = float(is_norm) + BASE_STD * numbers(f"{origin}/{name}", shape)
    if who.startswith("ft"):
        base = torch.from_numpy(values).to(DTYPES[dtype]).double().numpy()
        noise = numbers(f"shared/{name}", shape) + numbers(f"{who}/{name}", shape)
        values = base + (TUNE_NORM_STD if is_norm else TUNE_STD) * noise
    return torch.from_numpy(values).to(DTYPES[dtype])


def write(place: Path, tensors: Mapping[str, torch.Tensor], dtype: str) -> None:
    """A model as a checkpoint folder."""
    place.mkdir(parents=True)
    save_file(dict(tensors), place / "model.safetensors", metadata={"format": "pt"})
    (place / "config.json").write_text(json.dumps(CONFIG | {"torch_dtype": WORDS[dtype]}))
