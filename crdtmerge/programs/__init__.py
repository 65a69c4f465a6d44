"""Programs: exported models (``torch.export``), run in a process of their own for statistics and adaptive plans."""
