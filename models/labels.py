"""Class names of the heads in Google's checkpoints."""

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

# Number of classes -> timm's name of the data set. Both are in the order of the WordNet ids.
SUBSETS = {1000: "imagenet-1k", 21843: "imagenet-21k-goog"}
WORDNET_ID = re.compile(r"n\d{8}")


@lru_cache
def _synsets(num_classes: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(WordNet ids, names) of a key of SUBSETS."""
    from timm.data import ImageNetInfo  # takes seconds, and only predictions need it

    info = ImageNetInfo(SUBSETS[num_classes])
    return tuple(info.label_names()), tuple(info.label_descriptions())


def label_names(num_classes: int) -> tuple[str, ...] | None:
    """Names of the classes of ImageNet-1k (1000) or ImageNet-21k (21843); None for another count.

    The names are WordNet's, from timm. Two classes can have the same name: a "crane" is a bird and
    a machine.
    """
    return _synsets(num_classes)[1] if num_classes in SUBSETS else None


def synset_names(wordnet_ids: Sequence[str]) -> tuple[str, ...]:
    """The name of each WordNet id, with the id itself where two of ImageNet's have that name."""
    if not any(WORDNET_ID.fullmatch(id) for id in wordnet_ids):
        return tuple(wordnet_ids)
    names = {}
    for count in (21843, 1000):  # ImageNet-1k has ids that the other lacks
        ids, words = _synsets(count)
        twice = Counter(words)
        named = zip(ids, words, strict=True)
        names |= {id: word if twice[word] == 1 else f"{word} ({id})" for id, word in named}
    return tuple(names.get(id, id) for id in wordnet_ids)


def imagenet_labels(found: Sequence[str], num_classes: int) -> list[int] | None:
    """The label of each class name in a head of ImageNet, whose names are all of one kind.

    The kinds are numbers from 0, WordNet ids, and words, each of which may be one of several for a
    class. None if the head is not ImageNet's, or if a name is none of these or ambiguous.
    """
    if num_classes not in SUBSETS:
        return None
    ids, names = _synsets(num_classes)
    # "tench, Tinca tinca" is called by each of its words, and by all of them.
    called = ({name, *name.split(", ")} for name in names)
    words = [(word.lower(), i) for i, each in enumerate(called) for word in each]
    times = Counter(word for word, _ in words)
    kinds = [
        {str(i): i for i in range(num_classes)},
        {id: i for i, id in enumerate(ids)},
        {word: i for word, i in words if times[word] == 1},
    ]
    for kind in kinds:
        labels = [kind.get(name.lower().replace("_", " ")) for name in found]
        if None not in labels:
            return labels
    return None
