"""A replica on disk: operations in SQLite, tensors as blobs under their digest."""
