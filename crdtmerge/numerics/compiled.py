"""Which kernels this machine has compiled before, so that using them again waits for no compiler.

numba keeps compiled code in ``__pycache__`` beside the package, for one processor and one version of the sources. A
list of the kernels that were compiled and proven lies beside that code, under a name made of the same things, and goes
when it goes. Where the package's folder cannot be written there is no list, and small merges use torch.
"""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from crdtmerge import limits

SOURCE = Path(__file__).with_name("kernels.py")
SOURCES = (SOURCE, SOURCE.with_name("rotations.py"))


def known(key: str) -> bool:
    """Whether a kernel (``affine/BF16/BF16``) was compiled and proven here before."""
    return key in _listed()


def note(key: str) -> None:
    """Remember that a kernel is compiled and proven; a folder that cannot be written is no error."""
    if known(key):
        return
    _listed().add(key)
    try:
        with _path().open("a") as file:
            file.write(f"{key}\n")
    except OSError:
        return


@cache
def _listed() -> set[str]:
    try:
        with _path().open() as file:
            return set(file.read(limits.RECIPE_BYTES_MAX).split())
    except (OSError, ValueError):
        return set()


def _path() -> Path:
    return SOURCE.parent / "__pycache__" / f"{SOURCE.stem}.{_fingerprint()}.proven"


@cache
def _fingerprint() -> str:
    """A name for these sources, these versions and this processor."""
    stats = [source.stat() for source in SOURCES]
    parts = [str(number) for stat in stats for number in (stat.st_mtime_ns, stat.st_size)]
    parts += [platform.python_version(), _processor()]
    for package in ("numba", "llvmlite", "numpy"):
        try:
            parts.append(version(package))
        except PackageNotFoundError:
            parts.append("")
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _processor() -> str:
    """What tells one processor's compiled code from another's."""
    try:
        with Path("/proc/cpuinfo").open() as file:
            lines = file.read(8192).split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return "\n".join(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part")))
