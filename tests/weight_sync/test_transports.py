"""What every transport does: bytes arrive as they were sent, every wait ends, and a failure leaves nothing behind."""

import contextlib
import signal
import time
from pathlib import Path

import pytest
import torch
from ports import free_port
from receivers import Workers, for_nccl
from torch.multiprocessing.reductions import StorageWeakRef

from r3 import SyncError
from r3.weight_sync import transports
from r3.weight_sync.transports import RECEIVERS, TRANSPORTS, GlooTransport, IpcTransport, Receiver, transport_of
from r3.weight_sync.transports.framing import pack, unpack
from r3.weight_sync.transports.transport import wait_until

LIMIT_S = 3.0
NEVER = lambda: False


@pytest.fixture(
    params=[
        "files",
        "gloo",
        "in_process",
        pytest.param("ipc", marks=pytest.mark.gpu),
        pytest.param("nccl", marks=pytest.mark.gpu),
    ]
)
def name(request):
    return request.param


# Transports between whose sides something waits.
connected = pytest.mark.parametrize("name", ["gloo", pytest.param("nccl", marks=pytest.mark.gpu)])


# Transports to processes, which may die.
between_processes = pytest.mark.parametrize(
    "name",
    ["files", "gloo", pytest.param("ipc", marks=pytest.mark.gpu), pytest.param("nccl", marks=pytest.mark.gpu)],
)


@pytest.fixture
def device(name):
    return "cuda" if name in ("ipc", "nccl") else "cpu"


@pytest.fixture(scope="module")
def pools():
    """Processes by device; a test that ends one of them starts it anew."""
    with contextlib.ExitStack() as stack:
        made = {}

        def of(device):
            if device not in made:
                made[device] = stack.enter_context(contextlib.closing(Workers(3, device)))
            return made[device]

        yield of


@pytest.fixture
def workers(pools, device, name):
    return pools("threads" if name == "in_process" else device)


@pytest.fixture
def transport(name, device, workers, monkeypatch):
    if name == "nccl":
        for setting, value in for_nccl("trainer", 0).items():
            monkeypatch.setenv(setting, value)
    made = transport_of(name)
    made.timeout_s = 30.0
    yield made
    made.close()
    workers.run("abort")


def ragged(device="cpu", seed=0):
    """Chunks of what a checkpoint can hold, in every size that is packed or sent as it is."""
    of = torch.Generator().manual_seed(seed)
    wide = torch.randn(96, 160, generator=of)
    first = [
        ("scalar", torch.tensor(1.5)),
        ("empty", torch.zeros(0, 7)),
        ("odd", torch.randint(0, 255, (13,), generator=of).to(torch.uint8)),
        ("bf16", torch.randn(33, 5, generator=of).bfloat16()),
        ("fp8", torch.randn(17, generator=of).to(torch.float8_e4m3fn)),
        ("bool", torch.rand(9, generator=of) > 0.5),
        ("transposed", wide.t()),
        ("every other row", wide[::2]),
    ]
    second = [
        ("large", torch.randn(1500, 1000, generator=of).bfloat16().repeat(2, 1)),
        ("small between", torch.randn(3, generator=of)),
        ("large, transposed", torch.randn(1100, 1000, generator=of).t()),
    ]
    third = [("last", torch.randn(2, 3, 4, generator=of).double())]
    return [[(key, tensor.to(device)) for key, tensor in chunk] for chunk in (first, second, third)]


def as_bytes(chunks):
    tensors = [(key, t.cpu().contiguous()) for chunk in chunks for key, t in chunk]
    return [(key, str(t.dtype), list(t.shape), t.view(-1).view(torch.uint8).numpy().tobytes()) for key, t in tensors]


def joined(transport, workers, timeout_s=30.0):
    """Offer and join. Answers of the workers: "joined", or None where they still had the connection."""
    transport.timeout_s = timeout_s
    offer = transport.offer(len(workers.processes), set(workers.run("connection_id")))
    answers = workers.call("join", offer, timeout_s)
    transport.join(NEVER)
    found = answers.all()
    assert not [a for a in found if isinstance(a, BaseException)], found
    return found


def moved(transport, index):
    transport.transfer(index, NEVER)
    transport.flush(NEVER)


def pushed(transport, workers, chunks):
    """A whole sync; what each worker holds at its end."""
    for index, chunk in enumerate(chunks):
        answers = workers.call("receive", transport.publish(index, chunk))
        transport.transfer(index, NEVER)
        assert answers.all() == [None] * len(workers.processes)
        transport.release(index)
    transport.flush(NEVER)
    found = workers.run("flush")
    transport.release(len(chunks))
    return found


def test_every_worker_gets_every_byte_in_two_syncs(transport, workers, device):
    for seed in range(2):
        answers = joined(transport, workers)
        if seed and answers[0] is None:
            assert answers == [None] * 3, "the connection is kept by all or by none"
        chunks = ragged(device, seed)
        expected = sorted(as_bytes(chunks))
        assert [sorted(found) for found in pushed(transport, workers, chunks)] == [expected] * 3


@pytest.mark.gpu
@pytest.mark.parametrize("keep_open", [True, False])
def test_ipc_shares_memory_that_lasts_once_and_lets_go_of_all_other(pools, keep_open):
    """torch wraps a storage each time that it shares it: a weight would gather wraps as long as training runs."""
    workers, transport = pools("cuda"), IpcTransport(keep_open=keep_open)
    transport.zero_copy_names = {"weight", "part of it"}
    memory: list[StorageWeakRef] = []

    def made(value: int) -> torch.Tensor:
        tensor = torch.full((1 << 24,), value, dtype=torch.int32, device="cuda")  # in an allocation of its own
        memory.append(StorageWeakRef(tensor.untyped_storage()))
        return tensor

    def push(**tensors: torch.Tensor) -> dict[str, dict]:
        joined(transport, workers)
        handles = {}
        publish = transport.publish

        def noted(index, chunk):
            where = publish(index, chunk)
            handles.update({name: where["storages"][place] for name, _, _, place, _ in where["tensors"]})
            return where

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transport, "publish", noted)
            found = pushed(transport, workers, [[(name, tensor)] for name, tensor in tensors.items()])
        assert found == [as_bytes([list(tensors.items())])] * 3
        return handles

    weight = made(0)
    handles = []
    for step in range(1, 4):
        weight += 1  # in place, as optimizers do
        part = weight[step:][:6].view(2, 3) if step > 1 else weight[1:]  # of other shapes, by the same name
        handles.append(push(**{"weight": weight, "gathered": made(step), "part of it": part}))
        del part
    assert handles[2]["weight"] == handles[2]["part of it"]
    assert (handles[0]["weight"] == handles[1]["weight"] == handles[2]["weight"]) == keep_open
    assert [one["gathered"]["lasts"] for one in handles] == [False] * 3
    weight = made(7)  # another one by the same name
    assert push(weight=weight)["weight"]["number"] != handles[2]["weight"]["number"]
    transport.offer(3, set(workers.run("connection_id")))  # of the next sync
    assert [ref.expired() for ref in memory] == [True] * (len(memory) - 1) + [False]


@pytest.mark.gpu
def test_ipc_keeps_nothing_that_was_made_for_a_sync_and_holds_three_chunks_of_it_at_most(pools):
    """A cast or gathered model beside its shards would be a copy of it, held until the next sync."""
    workers, transport = pools("cuda"), IpcTransport()
    chunk = [(str(i), torch.full((1 << 18,), i, dtype=torch.int32, device="cuda")) for i in range(16)]
    for seed in range(2):
        joined(transport, workers)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        pushed(
            transport, workers, [[(f"{index} {name}", tensor + seed) for name, tensor in chunk] for index in range(8)]
        )
        assert torch.cuda.memory_allocated() <= before
        nbytes = sum(tensor.nbytes for _, tensor in chunk)
        # The chunks themselves are this test's list.
        assert torch.cuda.max_memory_allocated() - before < 8 * nbytes + 3 * 1.2 * nbytes


@between_processes
def test_a_worker_that_was_restarted_joins_at_the_next_sync(transport, workers, device):
    joined(transport, workers)
    pushed(transport, workers, ragged(device))
    workers.restart(1)
    joined(transport, workers)
    chunks = ragged(device, 5)
    assert [sorted(found) for found in pushed(transport, workers, chunks)] == [sorted(as_bytes(chunks))] * 3


@between_processes
def test_a_worker_that_dies_between_chunks_ends_the_sync_within_the_timeout_and_not_the_next(
    transport, workers, device
):
    joined(transport, workers, LIMIT_S)
    first, second, _ = ragged(device)
    answers = workers.call("receive", transport.publish(0, first))
    transport.transfer(0, NEVER)
    answers.all()
    workers.send_signal(2, signal.SIGKILL)
    workers.processes[2].join()
    start = time.monotonic()
    with contextlib.suppress(SyncError, RuntimeError, OSError):
        answers = workers.call("receive", transport.publish(1, second))
    with contextlib.suppress(SyncError, RuntimeError):
        moved(transport, 1)
    transport.abort()
    assert time.monotonic() - start < 3 * LIMIT_S
    # The others end too, with an error or, where nothing is between them and the trainer, with the chunk.
    answers.all(timeout_s=4 * LIMIT_S)
    workers.restart(2)
    workers.run("abort")
    joined(transport, workers)
    chunks = ragged(device, 7)
    assert [sorted(found) for found in pushed(transport, workers, chunks)] == [sorted(as_bytes(chunks))] * 3


@connected
def test_a_stopped_worker_is_an_error_after_the_timeout(transport, workers, device, name):
    joined(transport, workers, LIMIT_S)
    big = [("big", torch.zeros(64 << 20, dtype=torch.uint8, device=device))]
    workers.send_signal(0, signal.SIGSTOP)
    try:
        answers = workers.call("receive", transport.publish(0, big))
        start = time.monotonic()
        with pytest.raises((SyncError, RuntimeError)):
            moved(transport, 0)
        assert time.monotonic() - start < 3 * LIMIT_S
        transport.abort()
    finally:
        workers.send_signal(0, signal.SIGCONT)
    assert isinstance(answers.all(timeout_s=4 * LIMIT_S)[0], Exception)


def test_workers_whose_trainer_dies_are_not_left_waiting(transport, workers, device, name):
    joined(transport, workers, LIMIT_S)
    where = transport.publish(0, ragged(device)[1])
    transport.abort()  # as when its process ends: connections close, files and memory go
    answers = workers.call("receive", where)
    found = answers.all(timeout_s=4 * LIMIT_S)
    flushed = workers.call("flush").all(timeout_s=4 * LIMIT_S)
    assert name == "ipc" or all(
        isinstance(a, Exception) or isinstance(b, Exception) for a, b in zip(found, flushed, strict=True)
    )


@connected
def test_a_trainer_whose_workers_never_come_is_told_so(transport, workers, name):
    transport.timeout_s = LIMIT_S
    transport.offer(3, {None})
    start = time.monotonic()
    with pytest.raises(SyncError, match="could not join"):
        transport.join(NEVER)
    assert time.monotonic() - start < 3 * LIMIT_S


def test_a_worker_that_has_answered_with_an_error_ends_the_wait_at_once():
    start = time.monotonic()
    with pytest.raises(SyncError, match="does not come"):
        wait_until(NEVER, lambda: True, 60.0, "broadcast")
    assert time.monotonic() - start < 5.0


def test_tensors_are_handed_over_without_a_copy_and_not_to_another_process(pools):
    transport = transport_of("in_process")
    offer = transport.offer(1, {None})
    receiver = RECEIVERS["in_process"](offer, 0, torch.device("cpu"), 1.0)
    chunk = ragged()[1]
    received = receiver.receive(transport.publish(0, chunk))
    assert [tensor.data_ptr() for _, tensor in received] == [tensor.data_ptr() for _, tensor in chunk]
    transport.release(1)
    with pytest.raises(SyncError, match="chunk 0: expected one of"):
        receiver.receive({"index": 0})
    for answer in pools("cpu").run("join", offer, 1.0):
        assert "expected a worker in the trainer's own process" in str(answer)


def test_a_port_that_is_set_serves_every_sync_also_after_one_that_was_given_up(pools):
    workers, port = pools("cpu"), free_port()
    transport = GlooTransport(port=port)
    for _ in range(3):
        assert set(joined(transport, workers)) == {"joined"}
        assert transport.offer(len(workers.processes), set(workers.run("connection_id")))["port"] == port
        transport.abort()  # the workers still have their end


def test_a_file_that_was_cut_is_refused(workers, pools, tmp_path):
    workers = pools("cpu")
    transport = transport_of(TRANSPORTS["files"](tmp_path))
    joined(transport, workers)
    where = transport.publish(0, ragged()[0])
    path = Path(where["path"])
    path.write_bytes(path.read_bytes()[:-3])
    assert all("expected" in str(answer) and "bytes" in str(answer) for answer in workers.run("receive", where))
    transport.close()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error_that_says_so_and_leaves_no_file(tmp_path, monkeypatch):
    import safetensors.torch

    def full(tensors, path):
        Path(path).write_bytes(b"part of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    transport = TRANSPORTS["files"](tmp_path)
    with pytest.raises(SyncError, match="No space left"):
        transport.publish(0, ragged()[0])
    assert not list(tmp_path.iterdir())


def test_blocks_are_few_and_large_tensors_are_not_copied():
    chunk = ragged()[1]
    blocks = pack(chunk, torch.device("cpu"))
    assert len(blocks) == 2
    assert blocks[0].data.data_ptr() == chunk[0][1].data_ptr()
    found = [(key, tensor) for block in blocks for key, tensor in unpack(block.data, block.layout)]
    assert as_bytes([found]) == as_bytes([chunk])


def test_a_layout_beyond_its_block_is_refused():
    with pytest.raises(SyncError, match="of a block of"):
        list(unpack(torch.zeros(10, dtype=torch.uint8), [["x", "torch.float32", [3], 0]]))
    with pytest.raises(SyncError, match="dtype"):
        list(unpack(torch.zeros(10, dtype=torch.uint8), [["x", "torch.nn", [1], 0]]))


def test_a_receiver_has_a_name_of_its_own(monkeypatch):
    class Mine(Receiver):
        def receive(self, where):
            return []

    class Other(Mine):
        pass

    monkeypatch.setattr(transports, "_receivers", dict(RECEIVERS))
    transports.register_receiver("mine", Mine)
    transports.register_receiver("mine", Mine)
    assert transports._receivers == {**RECEIVERS, "mine": Mine}
    for name in ("mine", "gloo"):
        with pytest.raises(SyncError, match=f"receiver of '{name}': expected a new name"):
            transports.register_receiver(name, Other)
    for wrong in (Mine.receive, int, None):
        with pytest.raises(SyncError, match="expected a subclass of Receiver"):
            transports.register_receiver("wrong", wrong)
    with pytest.raises(TypeError):
        RECEIVERS["gloo"] = Mine
