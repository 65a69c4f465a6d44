"""Arithmetic with portable bits: the same inputs give the same bytes on every machine, whatever runs them.

``reduction`` sums in a fixed order, ``selection`` finds order statistics on bit patterns, ``philox`` draws random bits
by counter, ``scalars`` rounds transcendental functions correctly, ``rounding`` leads back to storage types. All of
these are definitions in torch; ``fused`` runs the same as kernels.
"""
