"""Permutation symmetries of networks: what may be reordered without changing what a network computes.

``groups`` is what a symmetry is, as values and as a file; ``derive`` finds it in a program, ``check`` tries it.
"""
