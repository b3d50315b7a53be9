"""The product in float32 that sums in one order: against float64, and a row's bits in batches of any size."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WHOLE = (2048, 512, 64)
SHAPES = [WHOLE, (33, 70, 5), (1, 64, 160), (0, 64, 8)]


def compare(shape: tuple[int, int, int], device: str, sizes: list[int]) -> None:
    from r3.vllm_compat.float32_product import float32_product

    rows, width, outputs = shape
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, width, generator=generator), torch.randn(outputs, width, generator=generator)
    found = float32_product(x.to(device), weight.to(device))
    assert found.dtype == torch.float32
    assert found.shape == (rows, outputs)
    exact = x.double() @ weight.double().t()
    if rows:
        assert (found.cpu() - exact).abs().max() < 1e-6 * width  # TF32 would be off by 1e-3
        assert torch.equal(float32_product(x.view(1, rows, width).to(device), weight.to(device)), found[None])
    for size in sizes:
        assert torch.equal(float32_product(x[:size].to(device), weight.to(device)), found[:size]), size


def compare_interpreted() -> None:
    for shape in SHAPES[1:]:
        compare(shape, "cpu", [1, 2, 17])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, for which it is compiled")
def test_as_triton_interprets_it():
    done = subprocess.run(
        [sys.executable, "-c", "import test_float32_product; test_float32_product.compare_interpreted()"],
        cwd=Path(__file__).parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_on_a_gpu(shape):
    compare(shape, "cuda", [1, 2, 4, 8, 12, 16, 32, 64, 128, 200, 255, 256, 512, 1024])
