"""Keys: files, signatures, points of small order."""
