"""``python -m crdtmerge``."""

from crdtmerge.cli import main

main()
