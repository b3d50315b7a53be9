"""A worker's checks of a sync: every tensor has arrived, as it was announced and sent."""

from collections.abc import Iterable

from r3.weight_sync.transports import Chunk
from r3.weight_sync.worker.received_sync import ReceivedSync


def check_chunk(chunk: Chunk, names: list[str], sync: ReceivedSync) -> None:
    """Check that a chunk holds exactly the tensors announced for it, as the manifest has them."""
    problems = []
    came: set[str] = set()
    for name, tensor in chunk:
        expected = sync.manifest.get(name)
        got = (tuple(tensor.shape), str(tensor.dtype))
        if expected is None:
            problems.append(f"{name}: not in the manifest")
        elif name in sync.received or name in came:
            problems.append(f"{name}: came twice")
        elif got != expected:
            problems.append(f"{name}: expected {expected}, got {got}")
        came.add(name)
    problems += [f"{name}: announced with this chunk, did not come" for name in names if name not in came]
    problems += [f"{name}: came with this chunk, was not announced" for name in came - set(names)]
    if problems:
        raise RuntimeError(f"bad chunk: {'; '.join(problems[:16])}")


def check_content(sync: ReceivedSync, digests: dict[str, int]) -> None:
    """Check that every tensor has arrived with the content that was sent, and is finite."""
    received = sync.digests.result()
    wrong = [f"{n}: expected digest {digests.get(n)}, got {d}" for n, d in received.items() if digests.get(n) != d]
    wrong += [f"{name}: holds NaN or infinity" for name in sync.digests.not_finite()]
    if wrong:
        raise RuntimeError(f"{len(wrong)} tensors have not come as they were sent: {'; '.join(wrong[:16])}")


def check_ties(sync: ReceivedSync, digests: dict[str, int]) -> None:
    """Check that weights which the engine ties have arrived with equal content."""
    assert sync.reload is not None
    wrong = [" and ".join(tie) for tie in sync.reload.ties if len({digests.get(name) for name in tie}) > 1]
    if wrong:
        raise RuntimeError(
            f"the engine holds as one what was sent as two different tensors: {'; '.join(wrong[:16])}. Train them tied "
            "(tie_word_embeddings=True), or start the engine from a checkpoint and configuration that part them"
        )


def remedy(missing: list[str], sent: Iterable[str]) -> str:
    """A remedy for `missing` layers: vLLM's models silently skip tensors of unknown names, such as fused experts."""
    empty = [layer for layer in missing if ": 0 of " in layer]
    experts = [name for name in sent if name.endswith((".experts.gate_up_proj", ".experts.down_proj"))]
    fused = [name for name in experts if any(layer.startswith(name.rpartition(".")[0]) for layer in empty)]
    if not fused:
        return ""
    return (
        f". Experts came fused ({fused[0]}), which this vLLM's model does not know (Qwen3-MoE's does from 0.25 on): "
        "send them one by one, as a checkpoint has them (weight_sync.fused_experts=false)"
    )
