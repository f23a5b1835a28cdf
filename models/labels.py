"""Class names of the heads in Google's checkpoints."""

from functools import lru_cache

# Number of classes -> timm's name of the data set. Both are in the order of the WordNet ids.
SUBSETS = {1000: "imagenet-1k", 21843: "imagenet-21k-goog"}


@lru_cache
def label_names(num_classes: int) -> tuple[str, ...] | None:
    """Names of the classes of ImageNet-1k (1000) or ImageNet-21k (21843); None for another count.

    The names are WordNet's, from timm. Two classes can have the same name: a "crane" is a bird and
    a machine.
    """
    if num_classes not in SUBSETS:
        return None
    from timm.data import ImageNetInfo  # takes seconds, and only predictions need it

    return tuple(ImageNetInfo(SUBSETS[num_classes]).label_descriptions())
