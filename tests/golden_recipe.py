"""Variables and inputs of the golden cases, rebuilt from seeds (numpy's legacy RandomState is a frozen stream).

The values in tests/golden/*.npz were made by running the authors' unmodified TensorFlow graph on exactly these arrays.
"""

import zlib

import numpy as np

CASES = {"fc_5w1s": (5, 1, 4), "fc_5w5s": (5, 5, 3)}  # ways, shot, episodes
SIDE, GRID = 32, 4
NORMALISE = np.float32(113.77), np.float32(70.1899)


def _random(key: str) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(f"lgm-golden-v1:{key}".encode()) & 0x7FFFFFFF)


def _uniform(fan_in: int, fan_out: int):
    limit = np.sqrt(6.0 / (fan_in + fan_out))
    return lambda r, shape: r.uniform(-limit, limit, shape)


def _normal(mean: float, std: float):
    return lambda r, shape: mean + std * r.standard_normal(shape)


def variable_table():
    """(name, shape, draw) of each of the authors' variables."""
    scopes = [(f"extractor/conv_layers/g_conv{i}/", 3 if i == 1 else 64, True) for i in range(1, 5)]
    scopes += [(f"TaskContext/TaskTransformer/t_conv{i}/", 64, i < 3) for i in range(1, 4)]
    for scope, channels, normalised in scopes:
        yield scope + "conv2d/kernel", (3, 3, channels, 64), _uniform(9 * channels, 9 * 64)
        yield scope + "conv2d/bias", (64,), _normal(0.0, 0.1)
        if normalised:
            yield scope + "BatchNorm/beta", (64,), _normal(0.0, 0.3)
            yield scope + "BatchNorm/gamma", (64,), _normal(1.0, 0.4)
            yield scope + "BatchNorm/moving_mean", (64,), _normal(0.0, 0.2)
            yield scope + "BatchNorm/moving_variance", (64,), lambda r, shape: r.uniform(0.3, 1.5, shape)
    for i in (1, 2):
        scope = f"Classifier/meta_conv{i}/MetaNetwork_meta_conv/meta_weights/"
        yield scope + "w1", (32, 577 * 64), _uniform(32, 577 * 64)
        yield scope + "b1", (577 * 64,), _normal(0.0, 0.01)


def variables():
    """Name -> float32 array."""
    return {name: draw(_random(name), shape).astype(np.float32) for name, shape, draw in variable_table()}


def inputs(case: str):
    """support (B, N, K, H, W, C) and query (B, H, W, C) normalised float32, label (B,), noise (B, 2, Z)."""
    ways, shot, episodes = CASES[case]
    r = _random("inputs:" + case)
    blocks = r.uniform(85, 170, (episodes, ways, 1, GRID, GRID, 3))
    base = blocks.repeat(SIDE // GRID, axis=3).repeat(SIDE // GRID, axis=4)
    images = base + r.standard_normal((episodes, ways, shot + 1, SIDE, SIDE, 3)) * 60.0
    images = np.clip(np.rint(images), 0, 255).astype(np.uint8).astype(np.float32)
    label = r.randint(0, ways, size=episodes)
    mean, std = NORMALISE
    query = (images[np.arange(episodes), label, -1] - mean) / std
    noise = r.standard_normal((episodes, 2, 32)).astype(np.float32)
    return (images[:, :, :-1] - mean) / std, query, label.astype(np.int64), noise
