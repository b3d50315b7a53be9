"""A weight sync over a bare copy of the same bytes, and over vLLM's own transfer: seconds, ratios, stages, memory.

    python -m benchmarks.weight_sync                               # CPU: gloo, and a delta after one optimiser step
    python -m benchmarks.weight_sync --device cuda                 # one GPU: CUDA IPC, at Qwen3-30B-A3B's shape
    python -m benchmarks.weight_sync --device cuda --transport nccl             # two GPUs
    python -m benchmarks.weight_sync --device cuda --trainer-gpu 1 --skip-vllm  # CUDA IPC between two GPUs

One line of JSON. Random weights, the same for every way; the engine starts with dummy ones. All ways take turns in one
process and one engine, r3 once more without digests. After each, the worker's parameters have the same digest, or the
run fails.
"""

import argparse
import contextlib
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor

from benchmarks.machine import machine, spread
from r3.weight_sync import WeightSync
from r3.weight_sync.integrity.digest import ContentDigests, combine
from r3.weight_sync.transports import Transport, transport_of
from r3.weight_sync.worker import WeightSyncWorker
from r3.weight_sync.worker.reload import LayerwiseReload

Weights = dict[str, Tensor]

SHAPES: dict[str, dict[str, int]] = {
    "small": dict(num_hidden_layers=6, hidden_size=512, num_experts=32, moe_intermediate_size=256, vocab_size=8192),
    "qwen3-30b-a3b": dict(
        num_hidden_layers=48, hidden_size=2048, num_experts=128, moe_intermediate_size=768, vocab_size=151936
    ),
}


class MeasuredWorker(WeightSyncWorker):
    """The worker's side, which also says what it holds and how much memory it took."""

    def r3_bench_digest(self) -> dict[str, Any]:
        found = ContentDigests()
        found.add(list(self.model_runner.model.named_parameters()))
        return self._r3_reply(lambda state: {"digest": combine(found.result())})

    def r3_bench_memory(self) -> dict[str, Any]:
        """Most bytes above what is held now, since the last call."""
        device = self.model_runner.device
        held, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return self._r3_reply(lambda state: {"extra": peak - held})

    def r3_bench_digests(self, taken: bool) -> dict[str, Any]:
        _take_digests(taken)
        return self._r3_reply(lambda state: {})

    def r3_bench_plan(self) -> dict[str, Any]:
        return self._r3_reply(lambda state: {"plan": None if state.plan is None else state.plan.describe()})


_ADD, _WHOLE_TARGETS = ContentDigests.add, LayerwiseReload.whole_targets


def _take_digests(taken: bool) -> None:
    """In this process: take digests of what is synced, or say 0 for all and only copy, to see what they cost."""

    def add(self: Any, chunk: Any, into: Any = None) -> None:
        self._bytes |= {name: tensor.nbytes for name, tensor in chunk}
        self._sums |= {name: 0 for name, _ in chunk}

    ContentDigests.add = _ADD if taken else add  # pyrefly: ignore
    LayerwiseReload.whole_targets = _WHOLE_TARGETS if taken else (lambda self, weights: {})  # pyrefly: ignore


def write_config(folder: Path, shape: dict[str, int]) -> Any:
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        **shape,
        intermediate_size=4 * shape["hidden_size"],
        num_attention_heads=shape["hidden_size"] // 64,
        num_key_value_heads=4,
        head_dim=128 if shape["hidden_size"] > 1024 else 64,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        max_position_embeddings=4096,
        architectures=["Qwen3MoeForCausalLM"],
    )
    config.save_pretrained(folder)
    return config


def random_weights(config: Any, device: torch.device) -> Weights:
    """By the names and shapes of transformers (experts fused), bf16."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        shapes = {name: t.shape for name, t in AutoModelForCausalLM.from_config(config).state_dict().items()}
    torch.manual_seed(0)
    return {name: torch.randn(shape, dtype=torch.bfloat16, device=device) * 0.02 for name, shape in shapes.items()}


def engine(folder: Path, args: argparse.Namespace) -> Any:
    from vllm import LLM

    settings: dict[str, Any] = dict(
        model=str(folder),
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype="bfloat16",
        max_model_len=512,
        max_num_seqs=8,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 28,
        gpu_memory_utilization=args.memory,
        worker_extension_cls="benchmarks.weight_sync.MeasuredWorker",
    )
    if args.device == "cuda":
        from vllm.config import WeightTransferConfig

        settings |= dict(weight_transfer_config=WeightTransferConfig(backend=args.transport))
    return LLM(**settings)


def through_r3(llm: Any, weights: Weights, transport: Transport, chunk_mib: int) -> Callable[[], dict[str, Any]]:
    sync = WeightSync(llm, transport=transport, chunk_bytes=chunk_mib << 20, timeout_s=300)

    def push() -> dict[str, Any]:
        version = llm.collective_rpc("r3_status")[0]["version"] or 0
        receipt = sync.push(weights.items(), version=version + 1)
        stages = {name: round(s, 4) for name, s in receipt.stages_s.items()}
        worker = {name: round(s, 4) for name, s in receipt.worker_stages_s.items()}
        return {"seconds": receipt.seconds, "chunks": receipt.chunks, "stages_s": stages, "worker_stages_s": worker}

    return push


def without_digests(llm: Any, push: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    def unchecked() -> dict[str, Any]:
        _take_digests(False)
        llm.collective_rpc("r3_bench_digests", args=(False,))
        result = push()
        _take_digests(True)
        llm.collective_rpc("r3_bench_digests", args=(True,))
        return result

    return unchecked


def through_vllm_ipc(llm: Any, weights: Weights) -> Callable[[], dict[str, Any]]:
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine

    llm.init_weight_transfer_engine({"init_info": {}})

    def push() -> dict[str, Any]:
        from dataclasses import asdict

        start = time.perf_counter()
        llm.start_weight_update()
        IPCWeightTransferEngine.trainer_send_weights(
            iter(weights.items()),
            {"send_mode": lambda info: llm.update_weights({"update_info": asdict(info)})},
        )
        llm.finish_weight_update()
        assert llm.reset_prefix_cache()
        return {"seconds": time.perf_counter() - start}

    return push


def through_vllm_nccl(llm: Any, weights: Weights) -> Callable[[], dict[str, Any]]:
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    info = {"master_address": "127.0.0.1", "master_port": port, "world_size": 2}
    with _beside(lambda: llm.init_weight_transfer_engine({"init_info": info | {"rank_offset": 1}})):
        group = NCCLWeightTransferEngine.trainer_init(info)
    described = {
        "names": list(weights),
        "dtype_names": [str(t.dtype).removeprefix("torch.") for t in weights.values()],
        "shapes": [list(t.shape) for t in weights.values()],
        "packed": True,
    }

    def push() -> dict[str, Any]:
        start = time.perf_counter()
        llm.start_weight_update()
        with _beside(lambda: llm.update_weights({"update_info": described})):
            NCCLWeightTransferEngine.trainer_send_weights(iter(weights.items()), {"group": group, "packed": True})
        llm.finish_weight_update()
        assert llm.reset_prefix_cache()
        return {"seconds": time.perf_counter() - start}

    return push


@contextlib.contextmanager
def _beside(call: Callable[[], Any]) -> Iterator[None]:
    thread = threading.Thread(target=call)
    thread.start()
    yield
    thread.join()


def bare_copy(weights: Weights, to: torch.device) -> Callable[[], dict[str, Any]]:
    """Each tensor once, into memory that is there."""
    scratch = torch.empty(max(t.nbytes for t in weights.values()), dtype=torch.uint8, device=to)

    def copy() -> dict[str, Any]:
        _wait(to)
        start = time.perf_counter()
        for tensor in weights.values():
            scratch[: tensor.nbytes].copy_(tensor.view(-1).view(torch.uint8), non_blocking=True)
        _wait(to)
        return {"seconds": time.perf_counter() - start}

    return copy


@contextlib.contextmanager
def bare_broadcast(weights: Weights) -> Iterator[Callable[[], dict[str, Any]]]:
    """Each tensor once to another process, by gloo."""
    import torch.distributed as dist

    sizes = [tensor.nbytes for tensor in weights.values()]
    store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    context = mp.get_context("spawn")
    other = context.Process(target=_take_part, args=(store.port, sizes), daemon=True)
    other.start()
    group = dist.ProcessGroupGloo(store, 0, 2)

    def send() -> dict[str, Any]:
        group.barrier().wait()
        start = time.perf_counter()
        for tensor in weights.values():
            group.broadcast([tensor.view(-1).view(torch.uint8)]).wait()
        return {"seconds": time.perf_counter() - start}

    yield send
    other.kill()
    other.join()


def _take_part(port: int, sizes: list[int]) -> None:
    import torch.distributed as dist

    group = dist.ProcessGroupGloo(dist.TCPStore("127.0.0.1", port, 2, is_master=False), 1, 2)
    buffer = torch.empty(max(sizes), dtype=torch.uint8)
    while True:
        group.barrier().wait()
        for size in sizes:
            group.broadcast([buffer[:size]]).wait()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        for index in range(torch.cuda.device_count()):
            torch.cuda.synchronize(index)


def delta_after_a_step(llm: Any, config: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Bytes and seconds of a delta after one step of AdamW on float32 weights, of which bf16 is sent."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    sync = WeightSync(llm, transport="gloo", delta=True, dtype=torch.bfloat16)
    complete = [sync.push(model.state_dict().items(), version=(sync.version or 0) + 1)]
    deltas = []
    for step in range(args.rounds):
        ids = torch.randint(0, config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        deltas.append(sync.push(model.state_dict().items(), version=sync.version + 1))
        assert not deltas[-1].complete
    sync.close()
    with contextlib.closing(WeightSync(llm, transport="gloo", dtype=torch.bfloat16)) as whole:
        complete += [whole.push(model.state_dict().items(), version=whole.version + 1) for _ in range(args.rounds)]
    return {
        "lr": args.lr,
        "bytes": spread([d.sent_bytes / d.bytes for d in deltas]),
        "seconds": spread([d.seconds for d in deltas]),
        "seconds_complete": spread([c.seconds for c in complete[1:]]),
    }


def measure(ways: dict[str, Callable], llm: Any, rounds: int) -> dict[str, Any]:
    """Each way in turn; the first turn warms up."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    found: dict[str, Any] = {"first_s": {}, "extra_bytes": {}}
    digests: dict[str, int] = {}
    on_gpu = torch.cuda.is_available()
    for turn in range(-1, rounds):
        for way, push in ways.items():
            if on_gpu:
                llm.collective_rpc("r3_bench_memory")
            result = push()
            if turn < 0:
                found["first_s"][way] = result["seconds"]
            else:
                seconds[way].append(result["seconds"])
            if not way.startswith("bare"):
                digests[way] = llm.collective_rpc("r3_bench_digest")[0]["digest"]
                if on_gpu:
                    found["extra_bytes"][way] = llm.collective_rpc("r3_bench_memory")[0]["extra"]
            if way.startswith("r3"):
                found.setdefault("stages", {})[way] = {k: v for k, v in result.items() if k != "seconds"}
            print(turn, way, json.dumps(result), file=sys.stderr, flush=True)
    assert len(set(digests.values())) == 1, f"the ways do not load the same: {digests}"
    found["seconds"] = {way: spread(values) for way, values in seconds.items()}
    for way in (way for way in ways if way.startswith("r3")):
        for over in (other for other in ways if not other.startswith("r3")):
            ratios = [other / mine for mine, other in zip(seconds[way], seconds[over], strict=True)]
            found[f"{over} / {way}"] = spread(ratios)
    for way in (way for way in ways if f"{way}, no digests" in ways):
        pairs = zip(seconds[f"{way}, no digests"], seconds[way], strict=True)
        found[f"digests' share of {way}"] = spread([1 - without / whole for without, whole in pairs])
    found["plan"] = llm.collective_rpc("r3_bench_plan")[0]["plan"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--transport", choices=["gloo", "ipc", "nccl"], default=None)
    parser.add_argument("--trainer-gpu", type=int, default=None, help="the engine's is 0; 1 for nccl unless given")
    parser.add_argument("--shape", choices=SHAPES, default=None)
    parser.add_argument("--layers", type=int, default=None, help="fewer layers than the shape has")
    parser.add_argument("--chunk-mib", default="256", help="largest chunk; several, with commas, take turns")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lr", type=float, default=1e-6, help="of the step before a delta")
    parser.add_argument("--memory", type=float, default=0.48, help="share of the GPU's memory for the engine")
    parser.add_argument("--skip-vllm", action="store_true", help="without vLLM's own engine")
    args = parser.parse_args()
    cpu = args.device == "cpu"
    args.transport = args.transport or ("gloo" if cpu else "ipc")
    shape = dict(SHAPES[args.shape or ("small" if cpu else "qwen3-30b-a3b")])
    if args.layers:
        shape["num_hidden_layers"] = args.layers
    if args.trainer_gpu is None:
        args.trainer_gpu = int(args.transport == "nccl")
    device = torch.device("cpu") if cpu else torch.device("cuda", args.trainer_gpu)
    # vLLM's IPC engine sends Python objects, and imports ray whether or not it is used.
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        config = write_config(Path(folder), shape)
        if not cpu:
            try:
                import ray  # noqa: F401
            except ImportError:
                (Path(folder) / "ray.py").write_text("")
                sys.path.insert(0, folder)
                os.environ["PYTHONPATH"] = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])
        llm = engine(Path(folder), args)
        if not cpu:
            torch.cuda.set_device(device)  # from where the transports send
        weights = random_weights(config, device)
        found = {
            **machine(device),
            "transport": args.transport,
            "shape": shape,
        }
        found["bytes"] = sum(tensor.nbytes for tensor in weights.values())
        sizes = [int(size) for size in args.chunk_mib.split(",")]
        transport = transport_of(args.transport)  # one: workers keep the connection of one
        ways = {f"r3, {size} MiB": through_r3(llm, weights, transport, size) for size in sizes}
        ways |= {f"{way}, no digests": without_digests(llm, push) for way, push in ways.items()}
        if cpu:
            ways["bare broadcast"] = stack.enter_context(bare_broadcast(weights))
        else:
            ways["bare copy"] = bare_copy(weights, torch.device("cuda", 0))
        if not cpu and not args.skip_vllm:
            ways["vllm"] = {"ipc": through_vllm_ipc, "nccl": through_vllm_nccl}[args.transport](llm, weights)
        found |= measure(ways, llm, args.rounds)
        if cpu:
            found["delta"] = delta_after_a_step(llm, config, args)
        llm.llm_engine.engine_core.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
