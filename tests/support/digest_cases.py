"""Tensors whose digests are taken, for the tests on the CPU and on CUDA, and where to write them."""

import torch

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
]


def cases(device: str, offsets: tuple[int, ...]) -> list[tuple[str, torch.Tensor]]:
    """Ragged tensors at odd addresses, of all dtypes, some not finite."""
    generator = torch.Generator().manual_seed(0)
    store = torch.randint(256, (400_000,), dtype=torch.uint8, generator=generator).to(device)
    lengths = [*(0, 1, 2, 7, 8, 9, 15, 16, 17, 100), *(8191, 8192, 8193, 65535, 65536, 65537, 140_003)]
    found = [(f"bytes {offset} {length}", store[offset : offset + length]) for offset in offsets for length in lengths]
    for dtype in DTYPES:
        for count in (1, 13, 5000):
            zeros = torch.zeros(count + 3, dtype=dtype, device=device)
            found += [(f"{dtype} {count} from {start}", zeros[start : start + count]) for start in (0, 1, 2)]
            if dtype.is_floating_point:
                for place in {0, count - 1}:
                    bad = torch.zeros(count, dtype=torch.float32)
                    bad[place] = float("nan")
                    found.append((f"{dtype} {count} NaN at {place}", bad.to(dtype).to(device)))
                    moved = torch.zeros(count + 1, dtype=dtype, device=device)
                    moved[1:] = found[-1][1]
                    found.append((f"{dtype} {count} moved, NaN at {place}", moved[1:]))
    square = torch.randn(300, 200, generator=generator).to(device, torch.bfloat16)
    several = torch.arange(150_001, device=device)
    found += [("many pieces", several), ("many pieces, odd", several.view(torch.uint8)[1:])]
    return [*found, ("transposed", square.T), ("columns", square[:, 3:77]), ("one", square[0, 0])]


def places_for(chunk: list[tuple[str, torch.Tensor]]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Where to write the tensors, every fourth at an odd address; and the memory around each, of ones."""
    places, memory = {}, {}
    for number, (name, tensor) in enumerate(chunk):
        start = 16 + (tensor.dtype.itemsize if number % 4 == 3 else 0)
        memory[name] = torch.ones(start + tensor.nbytes + 16, dtype=torch.uint8, device=tensor.device)
        places[name] = memory[name][start : start + tensor.nbytes].view(tensor.dtype)
    return places, memory


def require_written(chunk: list[tuple[str, torch.Tensor]], places: dict, memory: dict[str, torch.Tensor]) -> None:
    for name, tensor in chunk:
        start = places[name].storage_offset() * tensor.dtype.itemsize
        expected = torch.ones_like(memory[name])
        expected[start : start + tensor.nbytes] = tensor.contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(memory[name], expected), name
