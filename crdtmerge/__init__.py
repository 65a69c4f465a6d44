"""crdtmerge: the same set of models and the same recipe give the same merged bytes, on any machine."""

__version__ = "0.1.0"
