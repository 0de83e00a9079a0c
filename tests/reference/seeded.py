"""Deterministic tensors that depend only on a name and a shape (NumPy only)."""

import zlib

import numpy as np


def seeded_array(name, shape, seed=0):
    """float32 array for parameter `name` of `shape`; same bytes on every machine."""
    rng = np.random.Generator(np.random.PCG64([zlib.crc32(name.encode()), seed]))
    z = rng.standard_normal(tuple(shape), dtype=np.float64)
    leaf = name.rsplit(".", 1)[-1]
    if any(t in name for t in ("pos_embed", "cls_token", "position_embedding", "class_embedding", "query_embed")):
        out = 0.2 * z
    elif len(shape) == 0:
        out = 1.0 + 0.1 * z
    elif len(shape) == 1:
        out = 1.0 + 0.1 * z if leaf == "weight" else 0.2 * z
    else:
        fan_in = int(np.prod(shape[1:]))
        out = z / np.sqrt(max(fan_in, 1))
    return np.asarray(out, dtype=np.float32)


def seeded_input(name, shape, seed=0):
    """float32 standard-normal input tensor for a test case called `name`."""
    rng = np.random.Generator(np.random.PCG64([zlib.crc32(("input:" + name).encode()), seed]))
    return rng.standard_normal(tuple(shape), dtype=np.float64).astype(np.float32)
