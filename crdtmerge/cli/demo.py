"""``crdtmerge demo``: placeholder until the real one."""


def demo() -> None:
    """Not yet."""
