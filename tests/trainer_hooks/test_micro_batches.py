"""Which rollouts go through a forward together."""

from hypothesis import given
from hypothesis import strategies as st

from trainer_hooks.micro_batches import even_groups

LENGTHS = st.lists(st.integers(0, 50), min_size=4, max_size=40)


@given(lengths=LENGTHS, most=st.integers(1, 120), ranks=st.integers(1, 4))
def test_groups_hold_each_sequence_once_in_a_number_that_all_ranks_share(lengths, most, ranks):
    groups = even_groups(lengths, most=most, multiple_of=ranks)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(groups)
    assert len(groups) % ranks == 0
    tokens = [sum(lengths[i] for i in group) for group in groups]
    assert tokens == sorted(tokens, reverse=True)
    # Too many tokens only where a sequence is alone, or where there are no more sequences to make groups of.
    spare = len(lengths) // ranks * ranks > len(groups)
    assert all(total <= most or len(group) == 1 or not spare for total, group in zip(tokens, groups, strict=True))


@given(lengths=st.lists(st.integers(1, 50), min_size=8, max_size=60), most=st.integers(50, 200))
def test_groups_are_few_and_even(lengths, most):
    groups = even_groups(lengths, most=most)
    tokens = [sum(lengths[i] for i in group) for group in groups]
    assert max(tokens) - min(tokens) <= max(lengths)
    # None is half empty while another could have taken it, but for what the longest sequence leaves.
    assert len(groups) <= 2 * -(-sum(lengths) // most) + 1


def test_one_long_sequence_is_alone():
    assert even_groups([100, 3, 4, 5], most=12) == [[0], [1, 2, 3]]
