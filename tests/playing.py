"""Actions drawn at random, and what environments answer compared to the bit."""

import numpy as np


def random_actions(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (*shape, 7))


def same(a, b):
    """Whether two nested dictionaries of arrays are equal to the bit."""
    if isinstance(a, dict):
        return set(a) == set(b) and all(same(a[key], b[key]) for key in a)
    return np.array_equal(a, b)


def member(x, i):
    """Environment ``i``'s part of a nested dictionary of arrays."""
    return {key: member(value, i) for key, value in x.items()} if isinstance(x, dict) else x[i]
