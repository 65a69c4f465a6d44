"""All rules: importing this enters every family into the table."""

from __future__ import annotations

from crdtmerge.symmetry import elements, indexing, products, shapes
from crdtmerge.symmetry.table import POINTING, RULES

FAMILIES = (elements, products, shapes, indexing)
"""The modules whose import fills the table."""

__all__ = ["FAMILIES", "POINTING", "RULES"]
