"""Layer 1: what a contribution is and how a set of them is named. No I/O."""
