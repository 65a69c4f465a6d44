"""Benchmarks: crdtmerge beside plain torch, mergekit and crdt-merge, measured in the same run on the same machine."""
