"""Run as a program: mutates valid models and outputs, and gives them to merge, inspect and verify under a memory limit.

    python -m tests.cli.mutation_driver FOLDER FIRST_SEED COUNT

Exit status 0: every command ended in order, with 0, 1 or 2. Everything else is a finding; the seed is printed.
"""

from __future__ import annotations

import random
import resource
import shutil
import sys
import traceback
from pathlib import Path

from tests.resolve import models
from tests.resolve.running import Ran, here

FRAGMENTS = (
    *(b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\\u0000", b"\\ud800", b"\0", b"\xff", b" ", b"\n", b"-", b"0"),
    *(b"1e999", b"NaN", b"Infinity", b"true", b"null", b"18446744073709551616", b"9" * 5000, b"[" * 500, b"-1", b"1.5"),
    *(b'"__metadata__"', b'"dtype"', b'"F4"', b'"BOOL"', b'"I64"', b'"shape"', b'"../x"', b"\x80\x02", b"GGUF"),
    *(b'"root"', b'"base"', b'"ties"', b'"slerp"', b'"path"', b"/dev/zero", b"/proc/self/mem", b"\x1b[31m"),
)  # fmt: skip

ADDRESS_SPACE = 3 << 30


def mutated(data: bytes, chosen: random.Random) -> bytes:
    """Bytes flipped, cut off, taken out, put in, or exchanged."""
    for _ in range(chosen.randint(1, 4)):
        at = chosen.randrange(len(data) + 1)
        what = chosen.choice(("flip", "flip", "cut", "remove", "insert", "overwrite", "fragment", "digit"))
        some = chosen.randbytes(chosen.randint(1, 12))
        if what == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << chosen.randrange(8)]) + data[at + 1 :]
        elif what == "cut" and chosen.random() < 0.3:
            data = data[:at]
        elif what == "remove":
            data = data[:at] + data[at + len(some) :]
        elif what == "insert":
            data = data[:at] + some + data[at:]
        elif what == "overwrite":
            data = data[:at] + some + data[at + len(some) :]
        elif what == "fragment":
            data = data[:at] + chosen.choice(FRAGMENTS) + data[at + chosen.choice((0, 0, 1, 5)) :]
        elif what == "digit":
            digits = [i for i in range(len(data)) if 48 <= data[i] < 58]
            if digits:
                i = chosen.choice(digits)
                data = data[:i] + str(chosen.randrange(10)).encode() + data[i + 1 :]
    return data


def mutate_file(path: Path, chosen: random.Random) -> None:
    """Mutate a file; of weights mostly the header, whose length then mostly is told right."""
    data = path.read_bytes()
    if path.suffix != ".safetensors" or chosen.random() < 0.2:
        path.write_bytes(mutated(data, chosen))
        return
    length = int.from_bytes(data[:8], "little")
    header = mutated(data[8 : 8 + length], chosen)
    told = len(header) if chosen.random() < 0.8 else length
    path.write_bytes(told.to_bytes(8, "little") + header + data[8 + length :])


def prepared(folder: Path) -> Path:
    """A base, a model in shards, one in a folder, one in a file, and an output of them."""
    given = folder / "given"
    given.mkdir()
    shapes = {"w": (3, 5), "b": (7,), "scale": (), "empty": (0, 4)}
    config = '{"architectures": ["Llama"], "torch_dtype": "float32", "eps": 1e-05}'
    models.save_folder(given / "base", models.state("base", shapes=shapes), {"config.json": config})
    models.save_shards(given / "a", models.state("a", shapes=shapes), 2)
    (given / "a" / "config.json").write_text(config)
    models.save(given / "b.safetensors", models.state("b", shapes=shapes))
    command = ["merge", given / "a", given / "b.safetensors", "--base", given / "base", "--strategy", "ties"]
    assert here(*command, "-o", given / "out").code == 0
    assert here(*command, "-o", given / "out.safetensors").code == 0
    return given


def commands(given: Path) -> list[list[object]]:
    """What is asked of a mutated folder."""
    a, b, base, out = given / "a", given / "b.safetensors", given / "base", given / "out"
    return [
        ["inspect", a],
        ["inspect", b, "--json"],
        ["merge", a, b, "--base", base, "--strategy", "ties", "-o", given / "new", "--json"],
        ["merge", b, a, "--strategy", "slerp", "--missing", "skip", "--dtype", "bf16", "--allow-nonfinite"],
        ["merge", a, b, "-o", out],
        ["verify", out, "--json"],
        ["verify", given / "out.safetensors"],
    ]


def in_order(ran: Ran) -> bool:
    """Whether a command ended as commands may end."""
    return ran.code in (0, 1) or (ran.code == 2 and (ran.err.startswith("error: ") or "unknown" in ran.out))


def one(folder: Path, pristine: Path, seed: int) -> int:
    """Try one seed; how many commands refused."""
    chosen = random.Random(seed)
    given = folder / "given"
    shutil.rmtree(given)
    shutil.copytree(pristine, given)
    files = sorted(path for path in given.rglob("*") if path.is_file())
    for path in chosen.sample(files, chosen.choice((1, 1, 2))):
        mutate_file(path, chosen)
    asked = commands(given)
    refused = 0
    for arguments in chosen.sample(asked, 3):
        ran = here(*arguments)
        assert in_order(ran), (arguments, ran)
        refused += ran.code == 2
    return refused


def main(folder: Path, first: int, count: int) -> int:
    """Try seeds until one fails; the exit status."""
    pristine = prepared(folder).rename(folder / "pristine")
    shutil.copytree(pristine, folder / "given")
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ADDRESS_SPACE, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    refused = 0
    for seed in range(first, first + count):
        try:
            refused += one(folder, pristine, seed)
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
            print(f"seed {seed}", file=sys.stderr)
            return 1
    print(refused)
    return 0


if __name__ == "__main__":
    _, where, start, many = sys.argv
    sys.exit(main(Path(where), int(start), int(many)))
