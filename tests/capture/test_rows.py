"""Arrays of expert ids from vLLM: text from its server is decoded or refused, and the fast check is the slow one."""

import base64
import io
import sys
import tracemalloc
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r3 import CaptureError
from r3.capture import rows as capture_rows
from r3.capture.rows import checked_rows, decode_npy
from r3.routing import RoutingSpec, bad_rows, checks
from r3.routing.checks import MANY_IDS, well_formed

ROWS = np.arange(60, dtype=np.uint8).reshape(5, 3, 4)


def npy(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def text(array: np.ndarray) -> str:
    return base64.b64encode(npy(array)).decode()


def headed(header: str, content: bytes = bytes(60), version: bytes = b"\1\0") -> str:
    """Base64 of a `.npy` file with this header."""
    size = len(header).to_bytes(2 if version == b"\1\0" else 4, "little")
    return base64.b64encode(b"\x93NUMPY" + version + size + header.encode() + content).decode()


@pytest.fixture(params=["pybase64", "standard library"])
def decoder(request, monkeypatch):
    """With each of the two decoders, whichever is installed: pybase64 comes with vLLM."""
    if request.param == "standard library":
        monkeypatch.setitem(sys.modules, "pybase64", None)
    capture_rows._base64_decoder.cache_clear()
    module = capture_rows._base64_decoder().__module__
    assert ("pybase64" in module) == (request.param == "pybase64")
    yield
    capture_rows._base64_decoder.cache_clear()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int32, np.int64])
@pytest.mark.usefixtures("decoder")
def test_what_the_server_sends_is_decoded_without_a_copy(dtype):
    array = ROWS.astype(dtype)
    found = decode_npy(text(array), max_bytes=1000)
    assert found.dtype == dtype
    assert np.array_equal(found, array)
    assert not found.flags.owndata
    assert not found.flags.writeable
    assert decode_npy(text(array[:0]), max_bytes=1000).shape == (0, 3, 4)


GOOD = "{'descr': '|u1', 'fortran_order': False, 'shape': (5, 3, 4), }"


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ("", "expected a .npy file"),
        ("\u00e9" * 8, "expected base64"),
        (text(ROWS)[:-1], "expected base64"),
        ("****" + text(ROWS), "expected base64"),
        (text(ROWS)[:80] + "\n" + text(ROWS)[80:], "expected base64"),
        (text(ROWS)[:-8], "expected 60 bytes for uint8 .*got 55"),
        (text(ROWS) + "AAAA", "expected base64"),
        (headed(GOOD, bytes(61)), "expected 60 bytes for uint8 .*got 61"),
        (text(ROWS)[:40], "expected a .npy file"),
        (base64.b64encode(b"PK\3\4" + bytes(60)).decode(), "expected a .npy file"),
        (text(ROWS.astype(np.float32)), "native integers .*<f4"),
        (text(ROWS.astype(np.bool_)), "native integers"),
        (text(ROWS.astype("m8[s]")), "native integers"),
        (text(ROWS.astype(">u2")), "native integers .*>u2"),
        (text(ROWS.astype(object)), "native integers .*O"),
        (text(ROWS[0]), r"native integers .*\(3, 4\)"),
        (text(ROWS[None]), "native integers"),
        (text(np.asfortranarray(ROWS)), "C order"),
        (headed(GOOD.replace("5", "-5")), "native integers|expected a .npy file"),
        (headed(GOOD.replace("5", str(1 << 62))), f"expected {12 << 62} bytes"),
        (headed(GOOD, version=b"\3\0"), "version"),
        (headed("(" * 500), "expected a .npy file"),
        (headed("-" * 900 + "1"), "expected a .npy file"),
        (headed("__import__('os')"), "expected a .npy file"),
        (headed(GOOD + " " * 2000, version=b"\2\0"), "expected a .npy file"),
        (headed(GOOD.replace("'|u1'", "[('a', '|u1')]")), "native integers"),
        (headed(GOOD.replace("'|u1'", "'(4,)|u1'")), "native integers"),
    ],
)
@pytest.mark.usefixtures("decoder")
def test_what_is_not_such_a_file_is_refused(sent, message):
    with pytest.raises(CaptureError, match=f"(?s){message}"):
        decode_npy(sent, max_bytes=10_000)


def test_a_version_2_header_is_read():
    assert decode_npy(headed(GOOD, version=b"\2\0"), max_bytes=1000).shape == (5, 3, 4)


@pytest.mark.usefixtures("decoder")
def test_more_than_the_caller_admits_is_not_decoded():
    sent = text(ROWS)
    size = len(npy(ROWS))
    assert decode_npy(sent, max_bytes=size).shape == ROWS.shape
    with pytest.raises(CaptureError, match=f"at most {size - 1} bytes"):
        decode_npy(sent, max_bytes=size - 1)
    large = text(np.zeros((1 << 12, 32, 8), np.uint8))
    tracemalloc.start()
    with pytest.raises(CaptureError, match="at most 1000000 bytes"):
        decode_npy(large, max_bytes=1_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50_000


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_the_fast_checks_find_what_sorting_finds(data):
    dtype = data.draw(st.sampled_from([np.uint8, np.uint16, np.int16, np.int32, np.int64]))
    slots, rows = data.draw(st.integers(1, 12)), data.draw(st.integers(0, 40))
    experts = data.draw(st.sampled_from([slots, slots + 1, 64, 128, 255, 256, 300]))
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 16)))
    ids = rng.permuted(np.tile(np.arange(max(slots, min(experts, 256))), (rows, 1)), axis=1)[:, :slots].astype(dtype)
    for _ in range(data.draw(st.integers(0, 2)) if rows else 0):
        ids[rng.integers(rows), rng.integers(slots)] = data.draw(
            st.sampled_from([0, 1, 127, 128, 254, 255, experts % 256])
        )
    slow = not bad_rows(torch.from_numpy(ids.astype(np.int64))[:, None], experts).any() if rows else True
    step = data.draw(st.sampled_from([1, 7, 1 << 18]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "_CACHED_BYTES", step)
        assert well_formed(ids, experts, many=False) == slow
    assert well_formed(ids, experts, many=True) == slow


@pytest.mark.parametrize("many", [False, True])
def test_an_id_that_is_repeated_is_seen_in_each_pair_of_slots(many):
    # Comes with vLLM: without it only one of the two ways would be tested here.
    assert checks._compiled_repeated_bytes() is not None
    rng = np.random.default_rng(0)
    for value in (0, 1, 2, 127, 128, 254, 255):
        for a in range(8):
            for b in range(a):
                ids = rng.permuted(np.tile(np.arange(256, dtype=np.uint8), (9, 1)), axis=1)[:, :8].copy()
                ids[4] = rng.permutation(np.setdiff1d(np.arange(256), value))[:8]
                assert well_formed(ids, 256, many=many)
                ids[4, a] = value
                assert well_formed(ids, 256, many=many)
                ids[4, b] = value
                assert not well_formed(ids, 256, many=many)


def spec(layer_ids, num_layers, experts, top_k) -> RoutingSpec:
    return RoutingSpec(layer_ids=layer_ids, num_layers=num_layers, num_experts=experts, top_k=top_k)


def ids(rows: int, layers: int, experts: int, top_k: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(rows, layers, experts, generator=generator).argsort(-1)[..., :top_k].numpy()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int8, np.int16, np.int32, np.int64])
@pytest.mark.parametrize("experts", [100, 257, 32769])
@pytest.mark.parametrize("layer_ids", [(0, 1, 2, 3, 4), (1, 2, 3, 4), (0, 2, 3), (3,)])
def test_every_dtype_and_set_of_layers_gives_the_same_rows(dtype, experts, layer_ids):
    array = ids(6, 5, 100, 4).astype(dtype)
    array[:, [layer for layer in range(5) if layer not in layer_ids]] = 0
    array.setflags(write=False)
    made = checked_rows(array, spec(layer_ids, 5, experts, 4), tokens=9, start=2, weight_version=3)
    assert made.rows_valid == 6
    assert made.valid.tolist() == [[False] * 2 + [True] * 6 + [False]]
    assert torch.equal(made.expert_ids[0, 2:8].long(), torch.from_numpy(array[:, list(layer_ids)].astype(np.int64)))
    assert not made.expert_ids[0, :2].any()
    assert not made.expert_ids[0, 8:].any()
    assert made.weight_version == 3


@pytest.mark.parametrize(
    ("dtype", "experts", "value"),
    [
        (np.uint16, 100, 256 + 5),  # 5 in a byte
        (np.uint16, 300, 40_000),  # negative in 16 bits
        (np.int8, 256, -56),  # 200 in a byte
        (np.int64, 100, 1 << 32),  # 0 in 32 bits
        (np.int64, 40_000, -(1 << 32) + 7),
        (np.uint8, 100, 100),
    ],
)
def test_ids_are_judged_before_they_are_narrowed_and_shown_as_they_came(dtype, experts, value):
    array = ids(6, 3, 100, 4).astype(dtype)
    array[4, 1, 2] = value
    with pytest.raises(CaptureError, match=rf"(?s)1 \(token, layer\) rows.*position 5, decoder layer 1: \[.*{value}"):
        checked_rows(array, spec((0, 1, 2), 3, experts, 4), tokens=8, start=1)


def test_ids_of_layers_without_a_router_do_not_matter_where_they_are_tables():
    array = ids(6, 3, 100, 4).astype(np.int32)
    array[:, 0] = 70_000
    tables = RoutingSpec(layer_ids=(1, 2), num_layers=3, num_experts=100, top_k=4, table_layers=(0,))
    assert checked_rows(array, tables, tokens=7).rows_valid == 6


def test_many_rows_are_checked_like_few():
    array = ids(MANY_IDS // (4 * 8) + 1, 4, 64, 8).astype(np.uint8)
    assert array.size > MANY_IDS
    routing = spec((0, 1, 2, 3), 4, 64, 8)
    assert checked_rows(array, routing, tokens=len(array) + 1).rows_valid == len(array)
    array[-1, 3, 7] = array[-1, 3, 0]
    with pytest.raises(
        CaptureError, match=rf"1 \(token, layer\) rows(.|\n)*position {len(array) - 1}, decoder layer 3"
    ):
        checked_rows(array, routing, tokens=len(array) + 1)


def test_a_layer_never_captured_comes_before_a_dense_one_that_is_routed_and_that_before_bad_rows():
    array = ids(6, 4, 100, 4).astype(np.uint8)
    array[3, 2] = 7
    routing = spec((1, 2, 3), 4, 100, 4)
    with pytest.raises(CaptureError, match=r"layers \[0\] are routed"):
        checked_rows(array, routing, tokens=7)
    array[:, 3] = 0
    with pytest.raises(CaptureError, match=r"layers \[3\] were never captured"):
        checked_rows(array, routing, tokens=7)
    array[:, 3] = [1, 2, 3, 4]
    array[:, 0] = 0
    with pytest.raises(CaptureError, match=r"position 3, decoder layer 2: \[7, 7, 7, 7\]"):
        checked_rows(array, routing, tokens=7)


def test_one_slot_of_zeros_cannot_be_told_from_expert_0():
    assert checked_rows(np.zeros((3, 2, 1), np.uint8), spec((0, 1), 2, 8, 1), tokens=4).rows_valid == 3


@pytest.fixture
def hooks(monkeypatch):
    """`RouterHooks` of a runner with two routers, and what calls their hooks as a step of vLLM does."""
    from r3.capture.in_engine import routing_worker as worker

    routers = [SimpleNamespace(top_k=2, global_num_experts=8, set_capture_fn=None) for _ in range(2)]
    for router in routers:
        router.set_capture_fn = partial(setattr, router, "capture")
    monkeypatch.setattr(worker, "routers", lambda model: list(enumerate(routers)))
    monkeypatch.setattr(worker, "decoder_layers", lambda config: 2)
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_batched_tokens=16))
    calls: list[list[int]] = []

    def execute(*args):
        for router, rows in zip(routers, calls, strict=True):
            for count in rows:
                router.capture(torch.arange(2 * count).view(count, 2) % 8)
        return SimpleNamespace()

    runner = SimpleNamespace(model=None, device="cpu", execute_model=execute, sample_tokens=None)

    def step(tokens: int, *rows: list[int]):
        calls[:] = rows
        return made.execute_model(SimpleNamespace(total_num_scheduled_tokens=tokens))

    made = worker.RouterHooks(runner, config)
    return step, execute, calls


def test_a_hook_that_gets_fewer_rows_than_the_step_has_tokens_is_an_error(hooks):
    step, execute, calls = hooks
    expected = (np.arange(12).reshape(6, 2) % 8).astype(np.uint8)
    for rows in ([6], [8]):  # padded
        found = step(6, rows, [6]).r3_rows
        assert all(np.array_equal(found[:, layer], expected) for layer in range(2))
    for rows in ([5], [3, 3], [0]):
        with pytest.raises(CaptureError, match=r"decoder layer 1: expected the experts of all 6 tokens .*, got [530]:"):
            step(6, [6], rows)
    # vLLM's own dummy runs are of any length.
    calls[:] = [[3], [16]]
    execute()
    assert step(6, [6], [6]).r3_rows.shape == (6, 2, 2)
