"""One seed per use, all derived from the seed of the run."""

import hashlib


def named_seed(seed: int, name: str, *numbers: int) -> int:
    """A 63-bit seed for the use `name` and `numbers`, such as an epoch, a step or a rank.

    The same arguments always give the same seed.
    """
    words = "/".join([str(seed), name, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "big") >> 1
