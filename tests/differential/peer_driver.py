"""Run by the Python of .peers/mergekit: does the merges of a list and writes them beside each other.

    .peers/mergekit/bin/python tests/differential/peer_driver.py JOBS.json

JOBS.json is a list of {"config": a mergekit configuration, "out": a folder}. A merge that raises leaves the sentence
in OUT/error.txt instead. All run in one process, since importing mergekit takes longer than the merges.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path


def main(jobs: Path) -> None:
    """Do the merges."""
    configuration = importlib.import_module("mergekit.config").MergeConfiguration
    options = importlib.import_module("mergekit.options").MergeOptions
    run_merge = importlib.import_module("mergekit.merge").run_merge
    quiet = options(quiet=True, copy_tokenizer=False, write_model_card=False, random_seed=7)
    for job in json.loads(jobs.read_text()):
        out = Path(job["out"])
        out.mkdir(parents=True, exist_ok=True)
        try:
            run_merge(configuration.model_validate(job["config"]), str(out), options=quiet)
        except Exception as fault:  # noqa: BLE001  whatever mergekit raises is its answer
            (out / "error.txt").write_text(f"{type(fault).__name__}: {fault}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
