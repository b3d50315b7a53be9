"""Engines that an external launcher started, one in the process of each trainer rank: a sync commits on all or none."""

import contextlib

import launched_engines
import pytest
import torch
from launched_engines import Layout
from ranks import Ranks

pytestmark = pytest.mark.engine


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((2, Layout(1)), id="an engine each", marks=pytest.mark.long),
        pytest.param((2, Layout(2)), id="one engine of two ranks"),
        pytest.param((2, Layout(2, True)), id="one engine of two ranks, experts spread", marks=pytest.mark.gpu),
        pytest.param((1, Layout(1)), id="one rank", marks=pytest.mark.long),
    ],
)
def launched(request):
    """(ranks, how each engine is spread over them)"""
    size, layout = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # as vLLM wants it from such trainers
        with contextlib.closing(Ranks(size, "cuda" if torch.cuda.is_available() else "cpu")) as ranks:
            yield ranks, layout


def test_every_rank_syncs_its_own_engine(launched):
    ranks, layout = launched
    found = ranks.all(launched_engines.as_loaded_moved_and_back, layout, timeout_s=300)  # it starts the engines
    for rank in found:
        said = rank["said"]
        assert said["same"] == said["back"] == said["loaded"]
        assert said["moved"] != said["loaded"]
        assert said["trained on"] == said["moved"]
        assert [receipt["version"] for receipt in rank["receipts"]] == [1, 2, 3]
        assert all(receipt["in_process"] for receipt in rank["receipts"])
    assert all(rank == found[0] for rank in found)
    assert set(ranks.all(launched_engines.whole, layout)) == {1}


def test_a_sync_goes_through_while_the_kv_cache_sleeps(launched):
    ranks, layout = launched
    assert all(ranks.all(launched_engines.asleep, layout))


def test_what_fails_on_one_rank_is_committed_on_none(launched):
    ranks, layout = launched
    before = ranks.all(launched_engines.says, layout)
    for error in (errors := ranks.run(launched_engines.fails_on_the_last_rank, layout)):
        assert f"vllm.LLM of rank {len(errors) - 1}" in str(error)
        assert "no memory left" in str(error)
        assert type(error).__name__ == "SyncError"
    found = ranks.all(launched_engines.refused, layout)
    for rank, said in zip(found, before, strict=True):
        assert "cannot be trusted since a sync failed" in rank["poisoned"]
        assert rank["versions"][1] == (rank["versions"][0] or 0) + 1
        assert rank["said"] == said


def test_the_engines_routing_is_in_the_trainers_numbers(launched):
    ranks, layout = launched
    shares = ranks.all(launched_engines.differing_rows, layout)
    assert all(share < 0.2 for share in shares), shares  # by rounding; of other experts it would be nearly all
