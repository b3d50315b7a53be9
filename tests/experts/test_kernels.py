"""The Triton kernels between the products, interpreted on the CPU and on a GPU, against their twins in plain torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from expert_layers import SHAPES, Shape, error, errors, inputs_of, layer_of, outcome

import r3.experts
from r3.experts import plain
from r3.experts.order import order_by_expert

# Rows of several blocks, of a block and a bit, and a last group of rows that is not whole.
WIDE = Shape(3, 6, 1100, 2056, 2)
# The interpreter cuts float32 to bfloat16, a GPU rounds.
BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def compare(shape: Shape, dtype: torch.dtype, device: str) -> None:
    """Every kernel against its twin in float64. Rows of no expert hold NaN."""
    from r3.experts import kernels

    torch.manual_seed(0)
    ids = torch.rand(shape.tokens, shape.experts).argsort(-1)[:, : shape.slots]
    ids[ids == 1] = shape.experts
    order = order_by_expert(ids.to(device), shape.experts)
    end, pairs = int(order.ends[-1]), ids.numel()
    sizes = ((shape.tokens, shape.hidden), (pairs, shape.hidden), (pairs, 2 * shape.intermediate))
    tokens, rows, gate_up = (torch.randn(size).to(device, dtype) for size in sizes)
    grad = torch.randn(pairs, shape.intermediate).to(device, dtype)
    weights = torch.rand(ids.shape).to(device, dtype)
    for part in (rows, gate_up, grad):
        part[end:] = torch.nan
    assert torch.equal(kernels.spread(tokens, order), tokens[order.slots // shape.slots])
    for given in (weights, weights.float(), None):
        found = kernels.combine(rows, order, given)
        assert found.dtype == dtype
        expected = plain.combine(rows.double(), order, None if given is None else given.double())
        assert error(found, expected) < BOUNDS[dtype]
    assert error(kernels.swiglu(gate_up)[:end], plain.swiglu(gate_up.double())[:end]) < 2 * BOUNDS[dtype]
    found = kernels.swiglu_backward(gate_up, grad, weights, order)
    expected = plain.swiglu_backward(gate_up.double(), grad.double(), weights.double(), order)
    assert error(found[0][:end], expected[0][:end]) < BOUNDS[dtype]
    assert error(found[1][:end], expected[1][:end]) < BOUNDS[dtype]
    assert error(found[2], expected[2]) < BOUNDS[dtype]
    assert not found[2][(ids == shape.experts).to(device)].any()


def compare_interpreted() -> None:
    for dtype in BOUNDS:
        for shape in (*SHAPES.values(), WIDE):
            compare(shape, dtype, "cpu")


def test_the_kernels_as_triton_interprets_them():
    import triton  # noqa: F401 (comes with vLLM, also on the CPU)

    done = subprocess.run(
        [sys.executable, "-c", "import test_kernels; test_kernels.compare_interpreted()"],
        cwd=Path(__file__).parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES.values(), WIDE, Shape(5000, 128, 768, 2048, 8)], ids=str)
def test_the_kernels_on_a_gpu(shape, dtype):
    compare(shape, dtype, "cuda")


# Sizes that torch's grouped kernel takes: rows of whole 16 bytes.
LAYERS = [SHAPES["usual"], SHAPES["one token"], SHAPES["most experts without tokens"], Shape(3001, 64, 384, 1024, 8)]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", LAYERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_on_a_gpu_against_float64(shape, dtype):
    expected = outcome(layer_of(shape, torch.float64, "cuda"), "eager", *inputs_of(shape, torch.float64, "cuda"))
    layer, inputs = layer_of(shape, dtype, "cuda"), inputs_of(shape, dtype, "cuda")
    found = outcome(layer, r3.experts.NAME, *inputs)
    low = dtype == torch.bfloat16
    own = errors(outcome(layer, "grouped_mm", *inputs), expected) if low else dict.fromkeys(expected, 1e-5)
    for name, value in errors(found, expected).items():
        assert value < 1.1 * own[name] + (2e-3 if low else 0), name
    without = torch.bincount(inputs[1].flatten(), minlength=shape.experts) == 0
    assert not found["gate_up_proj"][without].any()
    assert not found["down_proj"][without].any()
    again = outcome(layer, r3.experts.NAME, *(t.t().contiguous().t() for t in inputs))
    assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.mark.gpu
def test_ids_beyond_the_experts_on_a_gpu():
    shape = LAYERS[-1]
    hidden, ids, weights, grad = inputs_of(shape, torch.bfloat16, "cuda")
    ids[ids >= 32] = shape.experts
    layer = layer_of(shape, torch.bfloat16, "cuda")
    # Freed memory that the products do not write is where NaN would come from.
    torch.full((shape.tokens * shape.slots * shape.hidden * 8,), torch.nan, device="cuda")
    found = outcome(layer, r3.experts.NAME, hidden, ids, weights, grad)
    kept = ids < shape.experts
    exact = layer_of(shape, torch.float64, "cuda")
    expected = outcome(exact, "eager", hidden.double(), ids.clamp(max=63), weights.double() * kept, grad.double())
    assert not found["weights"][~kept].any()
    for name in ("result", "hidden"):
        assert error(found[name], expected[name]) < 2e-2, name
    for name in ("gate_up_proj", "down_proj"):
        assert error(found[name][:32], expected[name][:32]) < 2e-2, name
        assert not found[name][32:].any()


@pytest.mark.gpu
def test_the_host_does_not_wait_for_a_gpu():
    shape = LAYERS[-1]
    layer, inputs = layer_of(shape, torch.bfloat16, "cuda"), inputs_of(shape, torch.bfloat16, "cuda")
    outcome(layer, r3.experts.NAME, *inputs)  # compiles
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        outcome(layer, r3.experts.NAME, *inputs)
    finally:
        torch.cuda.set_sync_debug_mode(before)
