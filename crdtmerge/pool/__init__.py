"""A replica on disk: the set of contributions of a pool in a folder, shared by every process that opens it."""
