"""The door to Layer 2: from models and a recipe to a merged checkpoint and its receipt, and back again to verify it."""
