"""Models and replicas on disk for the tests of the command line, and what must hold of every answer and every refusal.

pool = begun(tmp_path)                       a pool of two models, made by the commands themselves
told(pool.run("status"))                     an answer for people: exit code 0, nothing on stderr
document(pool.run("status", "--json"))       the one document on stdout
refused(pool.run("show", "zz"), "zz")        one line on stderr that holds these words, exit code 2
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tests.resolve import models
from tests.resolve.running import Ran, here

HEX = set("0123456789abcdef")
WHO = ("a", "b", "c", "base")


class Pool(NamedTuple):
    """A replica's folder beside the models that are for it, and the content ids of those that were added."""

    folder: Path
    models: Mapping[str, Path]
    a: str
    b: str

    def run(self, *arguments: object) -> Ran:
        """A command on it."""
        return here(*arguments, "-C", self.folder)

    @property
    def status(self) -> Any:
        """What `status --json` says."""
        return document(self.run("status", "--json"))

    @property
    def visible(self) -> list[str]:
        """The ids of the visible contributions."""
        return [one["id"] for one in self.status["visible"]]

    @property
    def ops(self) -> list[Any]:
        """What `log --json` says."""
        ops: list[Any] = document(self.run("log", "--json"))
        return ops


def saved(folder: Path) -> dict[str, Path]:
    """Three models and their base, each a file with a name of its own."""
    return {who: models.save(folder / f"{who}.safetensors", models.state(who)) for who in WHO}


def begun(folder: Path, *options: object) -> Pool:
    """A new pool of a and b; by default it merges by ties, from a base."""
    found = saved(folder)
    asked = options or ("--base", found["base"], "--strategy", "ties")
    assert here("init", folder / "pool", *asked).code == 0
    a, b = (document(here("add", found[who], "-C", folder / "pool", "--json"))["id"] for who in "ab")
    return Pool(folder / "pool", found, a, b)


def told(ran: Ran, *words: str) -> str:
    """An answer for people; these words are in it."""
    assert (ran.code, ran.err) == (0, ""), ran
    assert all(word in ran.out for word in words), ran.out
    return ran.out


def document(ran: Ran, code: int = 0) -> Any:
    """The one document on stdout; stderr has nothing."""
    assert (ran.code, ran.err) == (code, ""), ran
    found = json.loads(ran.out)
    assert ran.out in (json.dumps(found, indent=2) + "\n", json.dumps(found) + "\n")
    return found


def refused(ran: Ran, *words: str) -> str:
    """The one line that says why; stdout has nothing, or with --json the same as a document."""
    assert ran.code == 2, ran
    assert ran.err.startswith("error: "), ran
    assert ran.err.count("\n") == 1, ran
    if ran.out:
        error = ran.json["error"]
        assert list(ran.json) == ["error"]
        assert sorted(error) == ["kind", "message"]
        assert f"error: {error['message']}\n" == ran.err
    assert all(word in ran.err for word in words), ran.err
    return ran.err


def is_id(value: object) -> bool:
    """Whether a value is 32 bytes in hexadecimal."""
    return isinstance(value, str) and len(value) == 64 and set(value) <= HEX


def files(folder: Path) -> set[str]:
    """The names of all files below a folder; SQLite's own, which come and go, are left out."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.name.endswith(("-wal", "-shm"))}
