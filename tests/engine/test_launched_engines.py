"""Engines that an external launcher started, one in the process of each trainer rank: a sync commits on all or none."""

import contextlib

import launched_engines
import pytest
from ranks import Ranks

pytestmark = pytest.mark.engine


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((2, 1), id="an engine each"),
        pytest.param((2, 2), id="one engine of two ranks", marks=pytest.mark.long),
        pytest.param((1, 1), id="one rank", marks=pytest.mark.long),
    ],
)
def launched(request):
    """(ranks, ranks of one tensor-parallel engine)"""
    size, tensor_parallel_size = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # as vLLM wants it from such trainers
        with contextlib.closing(Ranks(size)) as ranks:
            yield ranks, tensor_parallel_size


def test_every_rank_syncs_its_own_engine(launched):
    ranks, tensor_parallel_size = launched
    found = ranks.all(launched_engines.as_loaded_moved_and_back, tensor_parallel_size)
    for rank in found:
        said = rank["said"]
        assert said["same"] == said["back"] == said["loaded"]
        assert said["moved"] != said["loaded"]
        assert said["trained on"] == said["moved"]
        assert [receipt["version"] for receipt in rank["receipts"]] == [1, 2, 3]
        assert all(receipt["in_process"] for receipt in rank["receipts"])
    assert all(rank == found[0] for rank in found)
    assert set(ranks.all(launched_engines.whole, tensor_parallel_size)) == {1}


def test_a_sync_goes_through_while_the_kv_cache_sleeps(launched):
    ranks, tensor_parallel_size = launched
    assert all(ranks.all(launched_engines.asleep, tensor_parallel_size))


def test_what_fails_on_one_rank_is_committed_on_none(launched):
    ranks, tensor_parallel_size = launched
    before = ranks.all(launched_engines.says, tensor_parallel_size)
    for error in (errors := ranks.run(launched_engines.fails_on_the_last_rank, tensor_parallel_size)):
        assert f"vllm.LLM of rank {len(errors) - 1}" in str(error)
        assert "no memory left" in str(error)
        assert type(error).__name__ == "SyncError"
    found = ranks.all(launched_engines.refused, tensor_parallel_size)
    for rank, said in zip(found, before, strict=True):
        assert "cannot be trusted since a sync failed" in rank["poisoned"]
        assert rank["versions"][1] == (rank["versions"][0] or 0) + 1
        assert rank["said"] == said
