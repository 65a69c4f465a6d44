"""Run as a program: throws mutated files at the reader under a memory limit; any error but ours ends it.

Exit status 0: every input was read or refused with one of our errors. Everything else is a finding.
"""

from __future__ import annotations

import resource
import sys
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crdtmerge.errors import CrdtMergeError, InputError
from crdtmerge.numerics.workers import Workers
from crdtmerge.strict_json import parse
from crdtmerge.weights.carried import carried_files
from crdtmerge.weights.checkpoint import Checkpoint
from crdtmerge.weights.digests import digest_checkpoint
from crdtmerge.weights.tensorfile import TensorFile
from tests.attacks.malformed_bytes import valid_file

VALID = valid_file().replace(b"\7", b"\1")
INDEX = b'{"metadata": {"total_size": 32}, "weight_map": {"layers.0.weight": "model-00001-of-00001.safetensors"}}'
FRAGMENTS = (
    *(b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\\u0000", b"\\ud800", b"\0", b"\xff", b" ", b"\n", b"-", b"0"),
    *(
        b"1e999",
        b"NaN",
        b"Infinity",
        b"true",
        b"null",
        b"18446744073709551616",
        b"9" * 5000,
        b"[" * 500,
        b'{"a":' * 500,
    ),
    *(b'"__metadata__"', b'"dtype"', b'"F4"', b'"BOOL"', b'"shape"', b'"../x"', b"\x80\x02", b"GGUF", b"PK\3\4"),
)

edits = st.tuples(
    st.integers(0, len(VALID)), st.integers(0, 40), st.one_of(st.binary(max_size=12), st.sampled_from(FRAGMENTS))
)
mutations = st.lists(edits, min_size=1, max_size=6)
restated = st.booleans()


def mutated(data: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    for at, length, new in changes:
        data = data[:at] + new + data[at + length :]
    return data


def with_true_length(data: bytes) -> bytes:
    """The file with a header length that ends at its last brace, so that mutations reach the parser."""
    end = data.rfind(b"}") + 1
    return max(0, end - 8).to_bytes(8, "little") + data[8:]


def check_message(refused: CrdtMergeError) -> None:
    """No input may forge terminal output through a message."""
    assert str(refused).isprintable(), repr(refused)


def limited(many: int) -> settings:
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=many, deadline=None, print_blob=True, database=None, suppress_health_check=checks)


def main(folder: Path, workers: Workers) -> None:
    @limited(1500)
    @given(mutations, restated)
    def files(changes: list[tuple[int, int, bytes]], restate: bool) -> None:
        data = mutated(VALID, changes)
        path = folder / "file.safetensors"
        path.write_bytes(with_true_length(data) if restate else data)
        try:
            with Checkpoint.open(path) as checkpoint:
                digest_checkpoint(checkpoint, workers)
            TensorFile.open(path).close()
        except CrdtMergeError as refused:
            check_message(refused)

    @limited(800)
    @given(mutations, st.sampled_from(["model.safetensors.index.json", "config.json", "tokenizer_config.json"]))
    def folders(changes: list[tuple[int, int, bytes]], name: str) -> None:
        model = folder / "model"
        model.mkdir(exist_ok=True)
        for old in model.iterdir():
            old.unlink()
        (model / "model-00001-of-00001.safetensors").write_bytes(VALID)
        (model / "model.safetensors.index.json").write_bytes(INDEX)
        (model / name).write_bytes(mutated(INDEX, changes))
        try:
            carried_files(model)
            Checkpoint.open(model).close()
        except CrdtMergeError as refused:
            check_message(refused)

    @limited(500)
    @given(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)))
    def texts(data: bytes) -> None:
        try:
            parse(b"{" + data, "x", InputError, fractions=True)
        except CrdtMergeError as refused:
            check_message(refused)

    files()
    folders()
    texts()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch, Workers(1) as pool:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        used = pages * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        main(Path(scratch), pool)
    sys.exit(0)
