"""The CUDA kernel of content digests, interpreted on the CPU and on a GPU, against the pass for the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from digest_cases import cases, places_for, require_written

from r3.weight_sync.integrity.digest import ContentDigests, digest


def compare_interpreted() -> None:
    """The kernel, run by Triton's interpreter on the CPU, against the pass for the CPU."""
    from r3.weight_sync.integrity import digest_cuda
    from r3.weight_sync.integrity.digest import _lanes

    every = cases("cpu", (0, 3, 8, 16))
    # A third of them, as the interpreter is slow; of the last ones, in several pieces or strided, all.
    chunk = [(name, tensor.contiguous()) for name, tensor in [*every[:-5:3], *every[-5:]]]
    expected = ContentDigests()
    expected.add(chunk)
    sums = torch.zeros(len(chunk), 2, dtype=torch.int64)
    places, memory = places_for(chunk)
    reads = [(tensor, *_lanes(tensor.dtype), places[name]) for name, tensor in chunk]
    rows, count, writes = digest_cuda.describe(reads)
    assert writes
    digest_cuda._write_piece[(count,)](torch.tensor(rows), sums, len(rows))
    rows, count, writes = digest_cuda.describe([(*read[:4], None) for read in reads[-40:]])
    assert not writes
    only_read = torch.zeros(len(rows), 2, dtype=torch.int64)
    digest_cuda._read_piece[(count,)](torch.tensor(rows), only_read, len(rows))
    assert only_read.equal(sums[-40:])
    by_kernel = {name for name, tensor in chunk if digest_cuda._in_whole_words(tensor, places[name])}
    assert {"bytes 0 0", "many pieces", "transposed"} < by_kernel < places.keys()
    for name, tensor in chunk:
        if name not in by_kernel:  # by torch
            places[name].copy_(tensor.reshape(-1))
    require_written(chunk, places, memory)
    for (name, tensor), (total, found) in zip(chunk, sums.tolist(), strict=True):
        assert total % 2**64 == expected._sums[name], name
        if _lanes(tensor.dtype)[2] is None:  # a byte that is NaN is looked for by torch
            assert bool(found) == (name in expected._not_finite), name
    assert len(expected.not_finite()) > 15


@pytest.mark.long
def test_the_cuda_kernel_as_triton_interprets_it():
    import triton  # noqa: F401 (comes with vLLM, also on the CPU)

    done = subprocess.run(
        [sys.executable, "-c", "import test_digest_cuda; test_digest_cuda.compare_interpreted()"],
        cwd=Path(__file__).parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_cuda_gives_what_the_cpu_gives_and_the_host_does_not_wait():
    chunk = cases("cuda", (0, 1, 2, 3, 4, 5, 7, 8, 12, 16, 24, 66))
    places, memory = places_for(chunk)
    digests = ContentDigests()
    digests.add([("warm", torch.ones(1, device="cuda")), ("warm, odd", torch.ones(3, device="cuda")[1:])])
    digests.result()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        digests.add(chunk, places)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    expected = ContentDigests()
    expected.add([(name, tensor.cpu()) for name, tensor in chunk])
    got = digests.result()
    assert [name for name, value in expected.result().items() if got[name] != value] == []
    assert digests.not_finite() == expected.not_finite()
    require_written(chunk, places, memory)


@pytest.mark.gpu
def test_cuda_memory_may_be_written_again_in_the_order_of_its_stream():
    source = torch.arange(1 << 26, device="cuda")
    expected = digest(source.cpu())
    digests = ContentDigests()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for turn in range(8):
            digests.add([(f"{turn}", source)])
        digests.add([("transposed", source.view(1 << 13, 1 << 13).T)])
        source.zero_()
    got = digests.result()  # on another stream
    assert {got[f"{turn}"] for turn in range(8)} == {expected}
    assert got["transposed"] == digest(torch.arange(1 << 26).view(1 << 13, 1 << 13).T)


@pytest.mark.gpu
def test_digests_beside_a_stream_do_not_hold_it_up_and_memory_may_be_freed_at_once():
    """A trainer's: what it gathers next takes the memory of what it gathered before, on its own stream."""
    large = torch.ones(1 << 33, dtype=torch.uint8, device="cuda")  # read in milliseconds
    digests = ContentDigests(beside=True)
    digests.add([("warm", large[:64])])
    torch.cuda.synchronize()
    digests.add([("large", large)])
    for turn in range(8):
        digests.add([(f"{turn}", torch.full((1 << 22,), turn, device="cuda"))])
    here = torch.cuda.current_stream().record_event()
    here.synchronize()
    queue = digests._queued[large.device][1]
    assert not queue._beside.query(), "the stream has waited for the digests"
    got = digests.result()
    assert [got[f"{turn}"] for turn in range(8)] == [digest(torch.full((1 << 22,), turn)) for turn in range(8)]


@pytest.mark.gpu
def test_a_cuda_tensor_of_more_than_two_to_the_31_elements():
    count = (1 << 31) + 12345
    tensor = torch.arange(count, dtype=torch.uint8, device="cuda")
    tensor[-1] = 77
    assert digest(tensor) == digest(tensor.cpu())
    odd = tensor[3:]
    assert digest(odd) == digest(odd.cpu())


@pytest.mark.gpu
def test_chunks_on_both_devices():
    here, there = torch.randn(1000), torch.randn(1000, device="cuda")
    digests = ContentDigests()
    digests.add([("there", there), ("here", here)])
    assert digests.result() == {"there": digest(there.cpu()), "here": digest(here)}
