"""vLLM's own models, built and synced on the CPU without an engine: every tensor that their layers hold, by path."""

import os
from pathlib import Path

import torch
from engine_families import SIZES, TEXT
from plan_toys import synced
from zoo.families import CASES

from r3.weight_sync import gathered, named_weights
from r3.weight_sync.worker.derived_tensors import beside, watch_construction


def trainer(family: str):
    """The tiny model of tests/support/zoo, in sizes that vLLM's CPU kernels take."""
    return CASES[family].build(torch.bfloat16, sizes=SIZES, text=TEXT.get(family))


def save(model, folder: Path, seed: int) -> dict[str, torch.Tensor]:
    """Other random weights in a checkpoint in `folder`, and by the names of it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and "inv_freq" not in name:
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    model.save_pretrained(folder)
    return {name: gathered(weight).clone() for name, weight in named_weights(model)}


def engine_model(folder: Path):
    """vLLM's model of a checkpoint, loaded and processed by vLLM, and its configuration."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel, model_parallel_is_initialized
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    watch_construction()
    os.environ.setdefault("VLLM_DIST_IDENT", os.environ["MASTER_PORT"])
    if not torch.accelerator.is_available():
        torch.accelerator.empty_cache = lambda: None  # as vLLM 0.32's CPU worker has it
    arguments = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="bfloat16",
        max_model_len=64,
        block_size=16,
    )
    config = arguments.create_engine_config()
    with set_current_vllm_config(config):
        if not model_parallel_is_initialized():
            init_distributed_environment(1, 0, "env://", 0, "gloo")
            initialize_model_parallel(1, 1)
        return get_model(vllm_config=config), config


def held_by(model) -> dict[str, torch.Tensor]:
    parameters = {f"parameter {name}": p.data for name, p in model.named_parameters()}
    return parameters | dict(beside(model))


def after_a_sync(family: str, folder: Path) -> list[str]:
    """What differs between a model that was synced twice, the second time by its plan, and one that loaded the same."""
    model = trainer(family)
    save(model, folder / "old", 1)
    weights = save(model, folder / "new", 2)
    fresh, _ = engine_model(folder / "new")
    (engine, config), older = engine_model(folder / "old"), save(model, folder / "older", 3)
    plan = synced(engine, config, older, chunk=1000).learned
    synced(engine, config, weights, plan, chunk=1000)
    expected, got = held_by(fresh), held_by(engine)
    assert expected.keys() == got.keys()
    same = lambda a, b: torch.equal(a.float().nan_to_num(7), b.float().nan_to_num(7))
    return [name for name, tensor in expected.items() if not same(tensor, got[name])]


def ties(family: str, folder: Path) -> list[tuple[str, ...]]:
    """Tensors of the checkpoint that the engine holds as one."""
    weights = save(trainer(family), folder / "old", 1)
    engine, config = engine_model(folder / "old")
    return sorted(synced(engine, config, weights, chunk=1000).learned.ties)
