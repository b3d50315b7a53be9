"""Which rollouts go through a forward together."""

import heapq
from collections.abc import Sequence


def even_groups(lengths: Sequence[int], *, most: int, multiple_of: int = 1) -> list[list[int]]:
    """Groups of sequences, even by tokens: the longest first, each into the group that is lightest.

    As few groups as hold at most `most` tokens each, and a multiple of `multiple_of` of them; a sequence that is longer
    is alone if there are sequences enough. Neighbours have about as many tokens, the heaviest are first.

    Args:
        lengths: tokens of each sequence, at least `multiple_of` of them.

    Returns:
        Indices of the sequences of each group, ascending. No group is empty.

    Example:
        >>> even_groups([5, 1, 3, 4, 2], most=8)
        [[0, 1, 4], [2, 3]]
    """
    largest = len(lengths) // multiple_of * multiple_of
    tokens = sum(min(length, most) for length in lengths)
    count = min(largest, max(-(-tokens // (most * multiple_of)), 1) * multiple_of)
    while True:
        groups = _longest_first(lengths, count)
        if count == largest or all(len(group) == 1 or _tokens(lengths, group) <= most for group in groups):
            return sorted(groups, key=lambda group: (-_tokens(lengths, group), group))
        count += multiple_of


def _tokens(lengths: Sequence[int], group: list[int]) -> int:
    return sum(lengths[i] for i in group)


def _longest_first(lengths: Sequence[int], count: int) -> list[list[int]]:
    lightest: list[tuple[int, int, list[int]]] = [(0, number, []) for number in range(count)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        tokens, number, group = lightest[0]
        # A sequence counts as a token at least, so that no group stays empty.
        heapq.heapreplace(lightest, (tokens + max(lengths[i], 1), number, [*group, i]))
    return [sorted(group) for _, _, group in lightest]
