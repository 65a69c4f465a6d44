"""Replicas meet: reconciliation, node, HTTP transport, folders and buckets."""
