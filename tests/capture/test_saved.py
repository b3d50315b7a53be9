"""Saved rollouts: what was written comes back exact, and hostile bytes end in one error that says where."""

import json
import os
import random
import struct
from dataclasses import replace

import pytest
import torch

import r3
from r3.capture import Rollout, Rollouts, SamplingSettings, load_rollouts, save_rollouts, saved_settings
from r3.errors import CaptureError
from r3.routing import RolloutRouting, RoutingSpec

SPEC = RoutingSpec(layer_ids=(1, 2, 5), num_layers=6, num_experts=300, top_k=4, table_layers=(0,))


def rollout(prompt: int, sampled: int, seed: int, **changes) -> Rollout:
    generator = torch.Generator().manual_seed(seed)
    tokens = prompt + sampled
    ids = torch.rand(1, tokens, 3, SPEC.num_experts, generator=generator).argsort(-1)[..., : SPEC.top_k]
    valid = torch.rand(1, tokens, generator=generator) < 0.8
    made = Rollout(
        prompt_ids=torch.randint(0, 1 << 40, (prompt,), generator=generator).tolist(),
        token_ids=torch.randint(0, 1000, (sampled,), generator=generator).tolist(),
        response_mask=torch.rand(sampled, generator=generator) < 0.9,
        logprobs=-torch.rand(sampled, generator=generator).exp(),
        routing=RolloutRouting(ids, valid, SPEC.layer_ids, SPEC.num_experts, weight_version=seed),
        finish_reason="stop",
        prompt_index=seed // 2,
        weight_versions=(seed,),
        row_versions=torch.full((tokens,), seed, dtype=torch.int32),
    )
    return replace(made, **changes)


def several() -> Rollouts:
    mixed = rollout(5, 9, 4, weight_versions=(3, 4), finish_reason="length")
    mixed.row_versions[:6] = 3
    mixed.row_versions[-1] = -1
    return Rollouts(
        [
            rollout(7, 12, 0),
            rollout(1, 1, 1, finish_reason=None, weight_versions=(), row_versions=None),
            rollout(3, 0, 2, finish_reason="abort"),
            rollout(0, 4, 3, routing=None),
            mixed,
            rollout(200, 300, 5, finish_reason="stop: ünïcode"),
        ],
        SPEC,
        {1: "sample 1 (prompt 0): the request failed", 17: "another"},
        1,
    )


def same_routing(a: RolloutRouting | None, b: RolloutRouting | None) -> bool:
    if a is None or b is None:
        return a is b
    kept = (a.layer_ids, a.num_experts, a.weight_version) == (b.layer_ids, b.num_experts, b.weight_version)
    return kept and torch.equal(a.expert_ids, b.expert_ids) and torch.equal(a.valid, b.valid)


def assert_same(a: Rollouts, b: Rollouts) -> None:
    assert (a.spec, a.failed, a.mixed_versions, len(a)) == (b.spec, b.failed, b.mixed_versions, len(b))
    for one, other in zip(a, b, strict=True):
        for name in ("prompt_ids", "token_ids", "finish_reason", "prompt_index", "weight_versions"):
            assert getattr(one, name) == getattr(other, name), name
        for name in ("response_mask", "logprobs", "row_versions"):
            first, second = getattr(one, name), getattr(other, name)
            assert (first is None) == (second is None), name
            assert first is None or (first.dtype == second.dtype and torch.equal(first, second)), name
        assert same_routing(one.routing, other.routing)
        assert (one.weight_version, one.spans_versions) == (other.weight_version, other.spans_versions)


def test_everything_comes_back_exact(tmp_path):
    saved = several()
    assert save_rollouts(saved, tmp_path / "a") == tmp_path / "a"
    assert_same(load_rollouts(tmp_path / "a"), saved)
    assert saved_settings(tmp_path / "a") == SamplingSettings()


@pytest.mark.parametrize(
    "rollouts",
    [
        Rollouts([], None),
        Rollouts([rollout(3, 4, 0, routing=None), rollout(0, 1, 1, routing=None)], None),
        Rollouts([rollout(3, 0, 0, routing=None)], SPEC),
    ],
)
def test_nothing_to_route_comes_back_too(tmp_path, rollouts):
    save_rollouts(rollouts, tmp_path / "a")
    assert_same(load_rollouts(tmp_path / "a"), rollouts)


def test_log_probabilities_that_are_wrong_are_kept_as_they_are(tmp_path):
    odd = rollout(2, 4, 0, logprobs=torch.tensor([float("nan"), float("-inf"), 0.5, -0.0]))
    save_rollouts(Rollouts([odd], SPEC), tmp_path / "a")
    (found,) = load_rollouts(tmp_path / "a")
    assert torch.equal(found.logprobs.view(torch.int32), odd.logprobs.view(torch.int32))


def test_settings_come_back_and_are_checked(tmp_path):
    config = r3.R3Config.from_overrides(["generator.sampling_params.temperature=0.7"])
    settings = SamplingSettings.of(config, weight_version=12)
    assert settings.to_dict() == {
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logit_bias": (),
        "allowed_token_ids": (),
        "other": (),
        "logprobs_mode": "processed_logprobs",
        "dtype": "bfloat16",
        "weight_version": 12,
    }
    save_rollouts(several(), tmp_path / "a", settings=settings)
    assert saved_settings(tmp_path / "a") == settings
    save_rollouts(several(), tmp_path / "b", settings={"top_p": 0.9, "temperature": None})
    assert saved_settings(tmp_path / "b") == SamplingSettings(top_p=0.9)
    for wrong, message in (
        ({"temprature": 1.0}, "'temprature': expected one of allowed_token_ids, dtype"),
        ({"temperature": "1"}, "temperature: expected a number from 0 up, got '1'"),
        ({"temperature": float("nan")}, "temperature: expected a number"),
        ({"top_p": 1.5}, "top_p: expected a number above 0, at most 1"),
        ({"top_k": True}, "top_k: expected an integer"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: expected a number above 0"),
        ({"logit_bias": [[3]]}, "logit_bias: expected pairs of a token id and a number"),
        ({"logit_bias": {3: 1.0}}, "logit_bias: expected pairs"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids: expected token ids"),
        ({"other": "bad_words"}, "other: expected texts"),
        ({"logprobs_mode": "raw"}, "expected processed_logprobs or raw_logprobs"),
    ):
        with pytest.raises(CaptureError, match=message):
            save_rollouts(several(), tmp_path / "c", settings=wrong)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logprobs": torch.zeros(4, dtype=torch.float64)}, r"rollout 1:\s+logprobs: expected torch.float32"),
    ],
)
def test_rollouts_that_contradict_themselves_are_not_written(tmp_path, changes, message):
    with pytest.raises(CaptureError, match=message):
        save_rollouts(Rollouts([rollout(2, 4, 0), rollout(2, 4, 1, **changes)], SPEC), tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_a_file_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    save_rollouts(several(), tmp_path / "a")
    before = (tmp_path / "a").read_bytes()

    def full_disk(source, target):
        assert (tmp_path / "a").read_bytes() == before
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(CaptureError, match=r"a: rollouts could not be written: OSError.*No space left"):
        save_rollouts(Rollouts([], None), tmp_path / "a")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == before
    with pytest.raises(CaptureError, match="could not be written"):
        save_rollouts(several(), tmp_path / "no" / "folder")


def test_no_file_and_other_files_are_told(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(CaptureError, match="gone: expected a file of rollouts, found none"):
        load_rollouts(tmp_path / "gone")
    (tmp_path / "text").write_text("hello, this is no safetensors file")
    with pytest.raises(CaptureError, match="text: truncated, or no safetensors file"):
        load_rollouts(tmp_path / "text")
    save_file({"a": torch.zeros(2)}, tmp_path / "weights")
    with pytest.raises(CaptureError, match="weights: expected rollouts that r3 saved, got a file of format None"):
        load_rollouts(tmp_path / "weights")


def parts(path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def write(path, header: dict, body: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def with_entry(body: bytes, header: dict, name: str, place: int, value: int) -> bytes:
    start = header[name]["data_offsets"][0] + 8 * place
    return body[:start] + struct.pack("<q", value) + body[start + 8 :]


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("prompt_lengths", 0, -1, "prompt_ids: expected lengths that add up to 216, got 209"),
        ("prompt_lengths", 0, (1 << 63) - 1, "prompt_ids: expected lengths that add up"),
        ("response_lengths", 2, 1, "token_ids: expected lengths"),
        ("row_version_lengths", 1, 0, r"rollout 1: (?s:.*)\s+row_versions: expected \[2\], got \[0\]"),
        ("routing_bytes", 3, 5, "routing: expected lengths"),
        ("finish_reason", 0, 99, "rollout 0: finish reason: expected -1 to 3, got 99"),
        ("finish_reason", 0, -2, "rollout 0: finish reason"),
    ],
)
def test_lengths_that_lie_are_told(tmp_path, name, place, value, message):
    save_rollouts(several(), tmp_path / "a")
    header, body = parts(tmp_path / "a")
    write(tmp_path / "b", header, with_entry(body, header, name, place, value))
    with pytest.raises(CaptureError, match=message):
        load_rollouts(tmp_path / "b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("failed"), "damaged: KeyError"),
        (lambda c: c.update(spec=None), "rollout 0: routing without a spec"),
        (lambda c: c["spec"].update(num_experts=299), r"rollout 0:\s+routing: expected \(shape, layers, experts\)"),
        (lambda c: c["spec"].update(layer_ids=[1, 2, 4]), "rollout 0:"),
        (lambda c: c["spec"].update(top_k="4"), "top_k: expected an integer"),
        (lambda c: c["spec"].update(more=1), "spec: expected positive"),
        (lambda c: c.update(mixed_versions=None), "mixed_versions: expected an integer, got None"),
        (lambda c: c.update(failed=[[1, 2, 3]]), "damaged: "),
        (lambda c: c.update(finish_reasons=7), "damaged: TypeError"),
    ],
)
def test_content_that_lies_is_told(tmp_path, change, message):
    save_rollouts(several(), tmp_path / "a")
    header, body = parts(tmp_path / "a")
    content = json.loads(header["__metadata__"]["content"])
    change(content)
    header["__metadata__"]["content"] = json.dumps(content)
    write(tmp_path / "b", header, body)
    with pytest.raises(CaptureError, match=message):
        load_rollouts(tmp_path / "b")


def test_routing_that_claims_gigabytes_allocates_none(tmp_path):
    """A compressed wire message may hold a thousand times its bytes: more than the rollout needs is refused."""
    big = torch.zeros(1, 3_000_000, 3, 4, dtype=torch.int16)
    wire = RolloutRouting(big, torch.zeros(1, 3_000_000, dtype=torch.bool), SPEC.layer_ids, 300).to_bytes(compress=True)
    assert len(wire) < 200_000
    save_rollouts(Rollouts([rollout(3, 4, 0)], SPEC), tmp_path / "a")
    header, body = parts(tmp_path / "a")
    start, end = header["routing"]["data_offsets"]
    body = with_entry(body, header, "routing_bytes", 0, len(wire))
    body = body[:start] + wire + body[end:]
    for name, entry in header.items():
        if name != "__metadata__" and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [at + len(wire) - (end - start) for at in entry["data_offsets"]]
    header["routing"] = {"dtype": "U8", "shape": [len(wire)], "data_offsets": [start, start + len(wire)]}
    write(tmp_path / "b", header, body)
    with pytest.raises(CaptureError, match=r"rollout 0: routing: [\s\S]*size: expected at most max_bytes"):
        load_rollouts(tmp_path / "b")


def test_truncated_and_damaged_bytes_never_do_anything_else_than_raise(tmp_path):
    save_rollouts(several(), tmp_path / "a", settings={"temperature": 0.7})
    data = (tmp_path / "a").read_bytes()
    random.seed(0)
    refused = 0
    for at in [*range(64), *random.sample(range(64, len(data)), 200)]:
        (tmp_path / "cut").write_bytes(data[:at])
        with pytest.raises(CaptureError, match="cut: "):
            load_rollouts(tmp_path / "cut")
    for at in random.sample(range(len(data)), 600):
        damaged = bytearray(data)
        damaged[at] ^= 1 << random.randrange(8)
        (tmp_path / "bad").write_bytes(damaged)
        try:
            load_rollouts(tmp_path / "bad")
            saved_settings(tmp_path / "bad")
        except CaptureError as error:
            refused += "bad: " in str(error)
    assert refused > 100  # token ids, log-probabilities and the like have no redundancy
