"""Every error this package raises for bad input, in one tree.

    CrdtMergeError
    ├── UsageError            the request itself is wrong: unknown name, bad parameter, contradiction
    │   ├── ParameterError    a strategy parameter: unknown, out of range, of the wrong type
    │   └── UnknownStrategyError
    ├── InputError            something read from outside is not what it must be
    │   ├── HeaderError       a safetensors header
    │   ├── CheckpointError   a checkpoint folder: index, shards, links, unsupported formats
    │   ├── ChangedError      a file changed while it was read
    │   ├── NonFiniteError    NaN or infinity in weights
    │   ├── ReceiptError      a receipt that cannot be read
    │   ├── KeyFileError      a key file that cannot be read
    │   ├── OpError           a signed operation that breaks a rule of its pool
    │   ├── BundleError       an exported state that cannot be read
    │   └── ReplicaError      a replica's folder: missing, damaged, of another kind
    │       └── DatabaseError its database, or a row of it, cannot be read any more
    ├── MismatchError         inputs that do not fit each other: names, shapes, dtypes, buffers
    │   └── PoolMismatchError replicas or states of different pools
    ├── NotAllowedError       the pool gives this key no right to do that
    ├── NeedsError            a strategy lacks an input that it needs
    ├── OutputError           the output cannot be written there
    ├── StorageError          a replica's disk: full, over its quota, failing
    ├── PeerError             a peer or bucket cannot be reached, or refuses
    │   └── FalsePeerError    it answers what no honest one does: wrong bytes, another pool's, malformed
    └── PlatformError         this machine or process cannot promise the same bytes

Rules: a message says what, where, the values and what to do. Bad input raises one of these; a broken
invariant of ours is an ``assert`` with a sentence.
"""

from __future__ import annotations


class CrdtMergeError(Exception):
    """Base of every error that crdtmerge raises on purpose."""


class UsageError(CrdtMergeError):
    """The request itself cannot be carried out as written."""


class ParameterError(UsageError):
    """A strategy parameter is unknown, out of range or of the wrong type."""


class UnknownStrategyError(UsageError):
    """No registered strategy bears this name."""


class InputError(CrdtMergeError):
    """Something read from outside is not what it must be."""


class HeaderError(InputError):
    """A file's safetensors header is malformed."""


class CheckpointError(InputError):
    """A checkpoint folder or file cannot be used: index, shards, links, formats."""


class ChangedError(InputError):
    """A file changed while it was being read."""


class NonFiniteError(InputError):
    """Weights hold NaN or infinity."""


class ReceiptError(InputError):
    """A receipt or the list of inputs beside it cannot be read."""


class KeyFileError(InputError):
    """A key file cannot be read."""


class OpError(InputError):
    """A signed operation is malformed or breaks a rule of its pool."""


class BundleError(InputError):
    """An exported state cannot be read, or its parts contradict each other."""


class ReplicaError(InputError):
    """A replica's folder is missing, damaged or of another kind."""


class DatabaseError(ReplicaError):
    """The database of a replica, or a row of it, cannot be read any more."""


class UnknownOpError(DatabaseError, KeyError):
    """An operation that is referred to is not here."""

    def __str__(self) -> str:
        return Exception.__str__(self)


class MismatchError(CrdtMergeError):
    """Inputs do not fit each other: names, shapes, dtypes or integer buffers."""


class PoolMismatchError(MismatchError):
    """Replicas or states belong to different pools and cannot be joined."""


class NotAllowedError(CrdtMergeError):
    """The pool gives this key no right to do that."""


class NeedsError(CrdtMergeError):
    """A strategy lacks an input it needs; it never substitutes a proxy."""


class OutputError(CrdtMergeError):
    """The output cannot be written where it was asked for."""


class StorageError(CrdtMergeError):
    """A replica cannot be written: its disk is full or failing, or its quota is reached."""


class PeerError(CrdtMergeError):
    """A peer or a bucket cannot be reached, or refuses; another try may succeed."""


class FalsePeerError(PeerError):
    """A peer answers what no honest one does."""


class PlatformError(CrdtMergeError):
    """This machine or process cannot promise the same bytes as others."""


def some(names: list[str] | tuple[str, ...], shown: int = 5) -> str:
    """The first names, quoted so that no name can forge terminal output, and how many more.

    >>> some(["a", "b"])
    "'a', 'b'"
    >>> some(["a", "b", "c"], shown=2)
    "'a', 'b' and 1 more"
    """
    listed = ", ".join(ascii(name) for name in names[:shown])
    more = len(names) - shown
    return listed if more <= 0 else f"{listed} and {more} more"
