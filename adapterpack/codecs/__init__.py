"""Bytes to bytes, for the pack."""
