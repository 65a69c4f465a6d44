"""Every bound on what is read from outside, each with its reason. Sizes are in bytes."""

from __future__ import annotations

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

HEADER_BYTES_MAX = 100 * 1000 * 1000
"""A safetensors header: the library's own bound, so that every file it reads we read too."""

HEADER_DEPTH_MAX = 4
"""Nesting in a header: {name: {shape: [..]}} needs three; deeper is an attack on the parser."""

TENSORS_MAX = 1_000_000
"""Tensors of one checkpoint: the largest mixtures of experts have some 100,000."""

TENSOR_NAME_BYTES_MAX = 512
"""A tensor's name in UTF-8: real ones stay below 200."""

RANK_MAX = 8
"""Dimensions of a tensor: weights have at most 5; numpy itself stops at 64."""

INDEX_BYTES_MAX = 16 * MIB
"""model.safetensors.index.json: 100,000 tensors take about 12 MB."""

SHARDS_MAX = 10_000
"""Files of one checkpoint."""

CARRIED_FILES_BYTES_MAX = 64 * MIB
"""Configuration and tokenizer files carried with a model, together: the largest vocabularies take 35 MB."""

RECEIPT_BYTES_MAX = 512 * MIB
"""A receipt holds a line of about 200 bytes for each tensor."""

RECIPE_BYTES_MAX = 1 * MIB
"""A recipe written by a person."""

SHARD_BYTES = 5 * 1000 * 1000 * 1000
"""Output files are split above this many bytes of tensors, as the Hugging Face hub does."""

PIECE_BYTES = 1 * MIB
"""A tensor's digest is built from digests of pieces of this size. Part of the format: never change it."""

KERNEL_BYTES_MIN = 64 * MIB
"""Merges that read less than this never wait for a compiler."""

CONTRIBUTIONS_MAX = 10_000
"""Contributions of one merge: the pairwise dot products of slerp grow with the square."""

OP_BYTES_MAX = 64 * KIB
"""A signed operation: real ones take 300 bytes; 256 parents and a long recipe fit."""

TREE_BYTES_MAX = 64 * MIB
"""The digests of a tensor's pieces: 32 bytes for each MiB, so tensors up to 2 TiB."""

PARENTS_MAX = 256
"""Operations that one operation refers to directly: heads of a set that grew in parallel, dots it removes."""

NOTE_BYTES_MAX = 1 * KIB
"""A note or a reason: a paragraph."""

NAMED_MAX = 64
"""Statistics or files of one contribution: the allow-list of files has some 30 names."""

NAME_BYTES_MAX = 128
"""The name of a task, a statistic or a carried file."""

MANIFEST_BYTES_MAX = 64 * MIB
"""A manifest or a genesis record: some 150 bytes for each tensor."""

BUNDLE_OPS_MAX = 10_000_000
"""Operations of one exported state: 3 GB of them."""

CURATORS_MAX = 64
"""Curators named in a genesis record: people, not machines."""
