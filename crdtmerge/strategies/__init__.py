"""Layer 2: merge strategies, pure functions over contributions in canonical order. One file a family, one registry."""
