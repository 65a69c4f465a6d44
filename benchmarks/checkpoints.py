"""Builds the Llama-shape checkpoints that the benchmarks merge: a base and its fine-tunes, the same on every call.

RULES
- Every tensor comes from a generator seeded by (size, model, tensor name), so one can be built without the others.
- base = N(0, 0.02), norms 1 + N(0, 0.02); a fine-tune = base + N(0, 1e-3), on norms N(0, 1e-2); all rounded to bf16.
- One shard in memory at a time. A checkpoint appears under its name only when it is whole; what exists is left alone.

Example: python -m benchmarks.checkpoints --size mid
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent / ".bench"
BASE_STD = 0.02
TUNE_STD = 1e-3
TUNE_NORM_STD = 1e-2
DISK_MARGIN_BYTES = 2 << 30  # left free for the outputs of the runs

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Size:
    """The dimensions of one Llama-shape model and the number of files it is cut into."""

    name: str
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    shards: int

    def tensors(self) -> dict[str, Shape]:
        """Return names and shapes in the order of the layers."""
        rows: dict[str, Shape] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for layer in range(self.layers):
            rows |= {f"model.layers.{layer}.{name}": shape for name, shape in self._layer().items()}
        return rows | {"model.norm.weight": (self.hidden,), "lm_head.weight": (self.vocab, self.hidden)}

    def _layer(self) -> dict[str, Shape]:
        kv_width = self.hidden // self.heads * self.kv_heads
        return {
            "input_layernorm.weight": (self.hidden,),
            "self_attn.q_proj.weight": (self.hidden, self.hidden),
            "self_attn.k_proj.weight": (kv_width, self.hidden),
            "self_attn.v_proj.weight": (kv_width, self.hidden),
            "self_attn.o_proj.weight": (self.hidden, self.hidden),
            "post_attention_layernorm.weight": (self.hidden,),
            "mlp.gate_proj.weight": (self.ffn, self.hidden),
            "mlp.up_proj.weight": (self.ffn, self.hidden),
            "mlp.down_proj.weight": (self.hidden, self.ffn),
        }

    def total_bytes(self) -> int:
        """Return the bytes of all tensors in bf16."""
        return sum(2 * int(np.prod(shape)) for shape in self.tensors().values())

    def config(self) -> dict[str, object]:
        """Return what config.json says of this model."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": 2048,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "bfloat16",
        }


SIZES = {
    size.name: size
    for size in (
        Size("big", hidden=1536, ffn=4096, layers=20, heads=12, kv_heads=4, vocab=32000, shards=4),
        Size("mid", hidden=1536, ffn=4096, layers=5, heads=12, kv_heads=4, vocab=8000, shards=1),
        Size("tiny", hidden=64, ffn=176, layers=4, heads=4, kv_heads=2, vocab=104, shards=2),
    )
}


def build(size: Size, models: int, root: Path = ROOT) -> None:
    """Build the base and ft1..ftN of a size under `root`, leaving out what is there."""
    folder = root / size.name
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in ["base", *(f"ft{i + 1}" for i in range(models))] if not (folder / name).exists()]
    _require_disk(folder, len(missing) * size.total_bytes())
    for name in missing:
        _build_one(size, folder, name)
        print(f"checkpoints: {size.name}/{name}, {size.total_bytes() / 1e9:.3f} GB", file=sys.stderr)


def _require_disk(folder: Path, need_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if need_bytes and need_bytes + DISK_MARGIN_BYTES > free_bytes:
        raise SystemExit(
            f"{folder}: {need_bytes / 1e9:.1f} GB of checkpoints and {DISK_MARGIN_BYTES / 1e9:.1f} GB for outputs do "
            f"not fit into the {free_bytes / 1e9:.1f} GB that are free. Free some, or ask for fewer --models."
        )


def _build_one(size: Size, folder: Path, model: str) -> None:
    partial = folder / f"{model}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    weight_map: dict[str, str] = {}
    for file_name, names in _shards(size):
        tensors = {name: _tensor(size, folder, model, name, file_name) for name in names}
        save_file(tensors, partial / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file_name)
    (partial / "config.json").write_text(json.dumps(size.config(), indent=2) + "\n")
    if size.shards > 1:
        index = {"metadata": {"total_size": size.total_bytes()}, "weight_map": weight_map}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    partial.rename(folder / model)


def _shards(size: Size) -> Iterator[tuple[str, list[str]]]:
    """Yield file names with the tensors of each, cut where an equal share of the bytes is passed."""
    groups: list[list[str]] = [[] for _ in range(size.shards)]
    done_bytes, share_bytes = 0, size.total_bytes() / size.shards
    for name, shape in size.tensors().items():
        groups[min(int(done_bytes / share_bytes), size.shards - 1)].append(name)
        done_bytes += 2 * int(np.prod(shape))
    for number, names in enumerate(groups, start=1):
        file_name = f"model-{number:05d}-of-{size.shards:05d}.safetensors" if size.shards > 1 else "model.safetensors"
        yield file_name, names


def _tensor(size: Size, folder: Path, model: str, name: str, file_name: str) -> torch.Tensor:
    is_norm = name.endswith("norm.weight")
    noise = torch.from_numpy(_normal(f"{size.name}/{model}/{name}", size.tensors()[name]))
    if model == "base":
        noise.mul_(BASE_STD).add_(1.0 if is_norm else 0.0)
    else:
        noise.mul_(TUNE_NORM_STD if is_norm else TUNE_STD).add_(_base_tensor(folder, name, file_name))
    return noise.to(torch.bfloat16)


def _normal(key: str, shape: Shape) -> np.ndarray[Shape, np.dtype[np.float32]]:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    return np.random.Generator(np.random.PCG64(seed)).standard_normal(shape, dtype=np.float32)


def _base_tensor(folder: Path, name: str, file_name: str) -> torch.Tensor:
    with safe_open(str(folder / "base" / file_name), framework="pt") as reader:
        tensor: torch.Tensor = reader.get_tensor(name)
    return tensor


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the checkpoints of the benchmarks.")
    parser.add_argument("--size", choices=sorted(SIZES), action="append", help="which size; may be given again (mid)")
    parser.add_argument("--tiny", action="store_const", const=["tiny"], dest="size", help="the same as --size tiny")
    parser.add_argument("--models", type=int, default=3, help="number of fine-tunes (3)")
    arguments = parser.parse_args()
    for name in arguments.size or ["mid"]:
        build(SIZES[name], arguments.models)


if __name__ == "__main__":
    main()
