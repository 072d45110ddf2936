"""Tensors outside a device's memory: in pinned memory of the host, or in files."""
