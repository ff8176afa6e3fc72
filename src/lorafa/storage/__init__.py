"""Bytes on disk: atomic writes, tensors, the Hub, wheels, fingerprints; nothing of adapters."""
