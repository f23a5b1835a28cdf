"""One seed per use, all derived from the seed of the run."""

import hashlib

import torch
from torch import Tensor


def named_seed(seed: int, name: str, *numbers: int) -> int:
    """A 63-bit seed for the use `name` and `numbers`, such as an epoch, a step or a rank.

    The same arguments always give the same seed.
    """
    words = "/".join([str(seed), name, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "big") >> 1


def permutation(n: int, seed: int, name: str, *numbers: int) -> Tensor:
    """The numbers below `n` in the random order (n,) of a named seed."""
    generator = torch.Generator().manual_seed(named_seed(seed, name, *numbers))
    return torch.randperm(n, generator=generator)
