"""The documents keep their word: what the README shows runs and prints what it says; examples in docstrings run."""

from __future__ import annotations

import doctest
import importlib
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import crdtmerge
from tests.house.cli_page import page

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def sessions(block: str) -> list[tuple[str, str]]:
    """(command, printed) of a console block."""
    parts = re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
    return [(command, printed) for command, _, printed in (part.partition("\n") for part in parts)]


def matches(wanted: str, got: str) -> bool:
    """Line by line; '...' stands for anything within a line, and on a line of its own for any lines."""
    pattern = "".join(
        r"(?:.*\n)*" if line.strip() == "..." else ".*".join(map(re.escape, line.split("..."))) + r"[ ]*\n"
        for line in wanted.splitlines()
    )
    return re.fullmatch(pattern, got) is not None


def test_the_readme_runs_and_prints_what_it_says(tmp_path: Path) -> None:
    environment = os.environ | {"CRDTMERGE_CACHE": str(tmp_path / "cache"), "XDG_STATE_HOME": str(tmp_path / "state")}
    ran = 0
    for block in blocks("console"):
        for command, wanted in sessions(block):
            program, *arguments = shlex.split(command)
            assert program == "crdtmerge", "the README shows this program"
            done = subprocess.run(
                [sys.executable, "-m", program, *arguments],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            assert matches(wanted, done.stdout), f"{command}\nREADME:\n{wanted}\nprinted:\n{done.stdout}"
            ran += 1
    for code in blocks("python"):
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True)
        ran += 1
    assert ran >= 4


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_the_readme_links_to_what_is_there(link: str) -> None:
    assert (ROOT / link).exists()


def modules() -> list[str]:
    found = pkgutil.walk_packages(crdtmerge.__path__, "crdtmerge.")
    return [module.name for module in found if not module.name.endswith("__main__")]


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings_run(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


def test_every_file_begins_by_saying_what_it_is() -> None:
    for name in modules():
        text = importlib.import_module(name).__doc__
        assert text, name
        assert text.strip().splitlines()[0], name


def test_the_page_on_the_command_line_is_what_help_prints() -> None:
    assert (ROOT / "docs" / "cli.md").read_text() == page(), "run `make docs`"


def test_nothing_in_the_repository_is_private_to_a_machine() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a checkout")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.is_file() and not path.is_symlink():
            assert path.stat().st_size <= 1_000_000, name
            text = path.read_text(errors="replace")
            assert not re.search(r"(?<![\w.])/(?:home|root|Users)/\w", text), name
