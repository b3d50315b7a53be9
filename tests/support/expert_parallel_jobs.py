"""What ranks compute in tests/parallel/test_expert_parallel.py: a step of a model that transformers spread."""

import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel_jobs import LENGTHS, WIDTH, Batch, gradients, select
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig, initialize_distributed_mesh, mixin
from zoo import CASES

import r3
from r3.experts import register
from r3.parallel import (
    clip_grad_norm,
    fused_head,
    gather_sequence,
    make_mesh,
    mean_over_ranks,
    next_tokens,
    parameter_groups,
    spread_adapters,
    token_logprobs,
    ulysses,
)
from r3.routing import Packing, RolloutRouting, shard
from r3.weight_sync import adapter_weights, gathered, named_weights
from r3.weight_sync.weights.gathering import Gathering

# Heads that two and four ranks divide.
HEADS = dict(num_attention_heads=4, num_key_value_heads=4)
FAMILIES = {
    "qwen3_moe": HEADS,  # softmax
    "deepseek_v3": HEADS,  # sigmoid with a bias and groups, shared experts, a dense first layer
    "glm4_moe": HEADS,  # the same, and attention whose heads are grouped
    "gpt_oss": HEADS,  # biases, interleaved weights, attention sinks
    "qwen2_moe": HEADS,  # shared experts with a gate of their own
}


def build(family: str) -> torch.nn.Module:
    case = CASES[family]
    return dataclasses.replace(case, text={**case.text, **FAMILIES.get(family, {})}).build()


class Folders:
    """Checkpoints of the families, written once each."""

    def __init__(self) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="r3-expert-parallel-"))

    def of(self, family: str) -> str:
        path = self._root / family
        if not path.exists():
            build(family).save_pretrained(path)
        return str(path)

    def close(self) -> None:
        shutil.rmtree(self._root)


def batch_for(spec: Any) -> Batch:
    """As that of `parallel_jobs`; a part of the rows is live, a part live in some layers."""
    generator = torch.Generator().manual_seed(5)
    shape = (len(LENGTHS), WIDTH)
    mask = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]
    scores = torch.rand(*shape, len(spec.layer_ids), spec.num_experts, generator=generator)
    captured = (mask & (torch.rand(shape, generator=generator) < 0.8))[..., None]
    captured = captured & (torch.rand(scores.shape[:3], generator=generator) < 0.8)
    routing = RolloutRouting(
        scores.argsort(-1)[..., : spec.top_k], captured, spec.layer_ids, spec.num_experts, weight_version=1
    )
    weights = torch.randn(shape, generator=generator) * (mask & (torch.arange(WIDTH) >= 2))
    return Batch(torch.randint(1, 60, shape, generator=generator) * mask, mask, weights, routing)


def with_lora(model: Any, targets: Sequence[str], *, seed: int = 0) -> Any:
    """`model` with LoRA of modules, and of parameters where `targets` has a dot, whose values depend on `seed`."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    parameters, modules = [t for t in targets if "." in t], [t for t in targets if "." not in t]
    settings = LoraConfig(
        r=2, lora_alpha=3, target_modules=modules, target_parameters=parameters or None, init_lora_weights=False
    )
    return get_peft_model(model, settings)


def reference(folder: str, *, replayed: bool, lora: Sequence[str] = ()) -> dict[str, Any]:
    """One process, float32, stock attention, padded rows, no checkpointing."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").train()
    if lora:
        model = with_lora(model, lora)
    replay = r3.attach(model)
    batch = batch_for(replay.spec)
    routing = {"routed_experts": batch.routing} if replayed else {}
    with r3.record(model) as recorder:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.mask.long(), use_cache=False, **routing).logits
    found = token_logprobs(logits, _labels(batch))
    logprobs = found.roll(1, 1) * (torch.arange(WIDTH) > 0) * batch.mask
    loss = -(logprobs * batch.weights).sum() / (batch.weights != 0).sum()
    loss.backward()
    return {
        "logprobs": logprobs.detach(),
        "loss": float(loss.detach()),
        "grads": gradients(model),
        "report": replay.last,
        "chosen": recorder.expert_ids.cpu(),
        "mask": batch.mask,
    }


def _labels(batch: Batch) -> torch.Tensor:
    return next_tokens(batch.input_ids, (batch.mask.cumsum(1) - 1).clamp(min=0) * batch.mask)


# Meshes of one shape are made once: each dimension is a process group, with threads that a process keeps.
_mesh = functools.cache(make_mesh)
_barrier = functools.cache(r3.parallel.RankBarrier)
_meshes: dict[str, Any] = {}


def _mesh_of_transformers(config: Any) -> Any:
    key = repr({name: size for name, size in vars(config).items() if name.endswith("_size")})
    if key not in _meshes:
        _meshes[key] = initialize_distributed_mesh(config)
    return _meshes[key]


def where() -> str:
    """ "cuda" on ranks with NCCL, "cpu" elsewhere."""
    return "cuda" if "nccl" in dist.get_backend_config() else "cpu"


def load(folder: str, layout: dict[str, Any], **options: Any) -> torch.nn.Module:
    mixin.initialize_distributed_mesh = _mesh_of_transformers
    config = DistributedConfig(**layout)
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config, **options).train()


def step(
    folder: str,
    layout: dict[str, Any],
    *,
    replayed: bool = True,
    checkpointing: bool = False,
    sequence: int = 1,
    packed: bool = False,
    fused: bool = False,
    experts: str = "grouped_mm",
    lora: Sequence[str] = (),
    compiled: str | None = None,
) -> dict[str, Any]:
    """The same step on ranks that share the model as `layout` says, keyword arguments of `DistributedConfig`.

    `sequence` ranks share each row. Rows are packed there, and where `packed` says so. `fused` takes log-probabilities
    from `fused_head`. `compiled` says what torch.compile has compiled: "layers" or the "model".
    """
    register()
    if compiled:
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
    model = load(folder, layout, attn_implementation="eager", experts_implementation=experts)
    if lora:
        model = with_lora(model, lora, seed=dist.get_rank())
        spread_adapters(model)
    replay = r3.attach(model)
    head = fused_head(model) if fused else None
    device = where()
    mesh = _mesh(device, sequence)
    handle = None
    if packed or sequence > 1:
        handle = ulysses(model, mesh.sequence_group, barrier=_barrier(timeout_s=60.0))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if compiled == "layers":
        for layer in model.get_decoder().layers:
            layer.compile(backend="aot_eager")
    elif compiled == "model":
        model.compile(backend="aot_eager")
    copies = layout.get("tp_size", 1) * sequence  # ranks that have the same rows
    ranks = dist.get_world_size()
    mine = slice(dist.get_rank() // copies, None, ranks // copies)
    whole = batch_for(replay.spec)
    part = select(whole, mine)
    tokens, weights, routing, packing = part.input_ids, part.weights, part.routing, None
    positions = (part.mask.cumsum(1) - 1).clamp(min=0) * part.mask
    if handle is not None:
        packing = Packing.from_mask(part.mask)
        tokens, weights, routing = packing.pack(tokens), packing.pack(weights), routing.pack(packing)
        positions = packing.position_ids()
    labels = next_tokens(tokens, positions)
    shifted = weights.roll(-1, 1) * (labels != -100)
    rank = mesh.sequence_rank
    inputs: dict[str, Any] = {"input_ids": shard(tokens, rank, sequence)}
    if replayed:
        inputs["routed_experts"] = routing.shard(rank, sequence)
    if packing is None:
        inputs["attention_mask"] = part.mask.long()
    else:
        inputs["position_ids"] = shard(positions, rank, sequence)
    inputs = {name: each.to(device) for name, each in inputs.items()} | {"use_cache": False}
    labels, shifted = (
        each.to(device) for each in (shard(labels, rank, sequence, fill=-100), shard(shifted, rank, sequence))
    )
    with r3.record(model) as recorder:
        if head is not None:
            found = head.logprobs(model, labels, **inputs)
        else:
            found = token_logprobs(model(**inputs).logits, labels)
    loss = mean_over_ranks(-(found * shifted).sum(), (shifted != 0).sum())
    loss.backward()
    value = loss.detach().clone()
    dist.all_reduce(value)
    rows = found.detach()
    if sequence > 1:
        rows = gather_sequence(rows, mesh.sequence_group)[:, : tokens.shape[1]]
    rows = rows.cpu().roll(1, 1)
    everyone = torch.zeros(whole.mask.shape)
    everyone[mine] = (rows if packing is None else packing.unpack(rows)) * (torch.arange(WIDTH) > 0) * part.mask
    dist.all_reduce(everyone)
    if handle is not None:
        handle.detach()
    return {
        "logprobs": everyone / copies,
        "loss": float(value) / ranks,
        "grads": gradients(model),
        "report": replay.last,
        "chosen": recorder.expert_ids.cpu(),
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"] if compiled else 0,
    }


def weights(folder: str, layout: dict[str, Any]) -> dict[str, Any]:
    """How what a sync would send differs from the checkpoint, and the share of a layer's experts held at once."""
    from safetensors.torch import load_file

    model = load(folder, layout)
    experts = next(len(p) for name, p in model.named_parameters() if "experts" in name and p.dim() == 3)
    stored, sent, most = load_file(f"{folder}/model.safetensors"), {}, 0
    for name, source in named_weights(model):
        tensor = gathered(source).detach()
        sent[name] = tensor.cpu()
        if ".experts." in name:
            of_one = tensor.numel() if tensor.dim() == 2 else tensor[0].numel()
            most = max(most, tensor.untyped_storage().nbytes() // tensor.element_size() // of_one)
    return {
        "missing": sorted(stored.keys() ^ sent.keys()),
        "different": [name for name in stored.keys() & sent.keys() if not torch.equal(stored[name], sent[name])],
        "share": most / experts,
    }


def trained(folder: str, layout: dict[str, Any], lora: Sequence[str] = (), *, steps: int = 3) -> dict[str, Any]:
    """Weights and gradient norms of a few steps with clipping and AdamW, on all samples on each rank."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder).train() if not layout else load(folder, layout)
    if lora:
        model = with_lora(model, lora)
        if layout:
            spread_adapters(model)
    replay = r3.attach(model)
    batch, device = batch_for(replay.spec), where() if layout else "cpu"
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-3, fused=True)
    norms = []
    for _ in range(steps):
        found = token_logprobs(model(**_inputs(batch, device), use_cache=False).logits, _labels(batch).to(device))
        (found * batch.weights.roll(-1, 1).to(device)).sum().backward()
        norms.append(float(clip_grad_norm(model, 1.0)))
        optimizer.step()
        optimizer.zero_grad()
    return {"norms": norms, "weights": _weights(model)}


def _inputs(batch: Batch, device: str) -> dict[str, Any]:
    named = {"input_ids": batch.input_ids, "attention_mask": batch.mask.long(), "routed_experts": batch.routing}
    return {name: each.to(device) for name, each in named.items()}


def _weights(model: torch.nn.Module, where: str = "cpu") -> dict[str, torch.Tensor]:
    return {name: gathered(source).detach().to(where) for name, source in named_weights(model)}


def adapted(
    folder: str, layout: dict[str, Any], targets: Sequence[str], saved: str, loads: bool = False
) -> dict[str, Any]:
    """Logits of all samples of a model with LoRA, which is read from `saved` or written there, and what a sync sends.

    `sent_by_last` is what the last rank has where it alone sends, in a sync from all ranks.
    """
    from peft import PeftModel

    model: Any = load(folder, layout) if layout else AutoModelForCausalLM.from_pretrained(folder)
    if loads:
        model = PeftModel.from_pretrained(model, saved, is_trainable=True)
    else:
        model = with_lora(model, targets, seed=dist.get_rank() if layout else 0)
    if layout:
        spread_adapters(model)
    batch = batch_for(r3.attach(model.eval()).spec)
    if not loads and layout:
        adapter_weights(model).save(saved, write=dist.get_rank() == 0)
    elif not loads:
        model.save_pretrained(saved)
    with torch.no_grad():
        logits = model(**_inputs(batch, where() if layout else "cpu"), use_cache=False).logits
    found = {"logits": logits.cpu() * batch.mask[..., None], "weights": _weights(model)}
    if layout:
        gathering = Gathering(timeout_s=30.0)
        with gathering.to(dist.get_world_size() - 1):
            found["sent_by_last"] = _weights(model, where="meta" if dist.get_rank() < gathering.owner else "cpu")
            gathering.settle()
    return found


def again_after_a_failure(folder: str, layout: dict[str, Any], targets: Sequence[str]) -> list[torch.Tensor]:
    """Logits of a model with LoRA before and after a forward that failed in the experts of a layer, on all ranks."""
    model = with_lora(load(folder, layout), targets).eval()
    spread_adapters(model)
    inputs = _inputs(batch_for(r3.attach(model).spec), where()) | {"use_cache": False}
    experts = next(module for name, module in model.named_modules() if name.endswith("experts.base_layer.base_layer"))
    found = [model(**inputs).logits.detach().cpu()]
    hook = experts.act_fn.register_forward_pre_hook(_fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        model(**inputs)
    hook.remove()
    return [*found, model(**inputs).logits.detach().cpu()]


def _fail(_module: Any, _args: Any) -> None:
    raise RuntimeError("on purpose")


def refusal(folder: str, layout: dict[str, Any], what: str) -> str | None:
    """What r3 says to a model that transformers spread over ranks, as it is or with `what`."""
    model: Any = load(folder, layout, experts_implementation="eager")
    try:
        if what == "slices of tensor parallel rows":
            ulysses(model, _mesh(where(), 2).sequence_group)
        elif what == "adapters of experts":
            r3.attach(with_lora(model, ["mlp.experts.gate_up_proj"]))
        elif what == "adapters that are spread twice":
            model = with_lora(model, ["mlp.experts.gate_up_proj"])
            spread_adapters(model)
            spread_adapters(model)
        elif what in ("adapters of a tensor parallel model", "no adapters"):
            spread_adapters(model if what == "no adapters" else with_lora(model, ["k_proj"]))
        elif what == "other adapters of experts":
            model = with_lora(model, ["mlp.experts.gate_up_proj"])
            for tuner in (module for module in model.modules() if hasattr(module, "parameter_name")):
                del tuner.parameter_name
            spread_adapters(model)
        elif what.startswith("torch "):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch, "__version__", what.removeprefix("torch "))
                r3.attach(model)
        else:
            r3.attach(model)
    except r3.R3Error as error:
        return str(error)
    return None
