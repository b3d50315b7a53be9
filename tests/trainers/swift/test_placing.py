"""Where rows go in a micro-batch, and what is refused, without a trainer."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from r3 import CaptureError, ConfigError
from r3.capture.kept_ids import KeptIds
from r3.routing import RoutingSpec
from trainer_hooks.ms_swift.limits import REFUSALS, subject
from trainer_hooks.ms_swift.rows import RoutedSample, placed
from trainer_hooks.support import require_supported

PAD = 0
LENGTHS = (3, 5, 1)
SPEC = RoutingSpec(layer_ids=(1, 2), num_layers=3, num_experts=300, top_k=2)  # layer 0 is dense


def sample(first, tokens, slots=2, tail=()):
    """Rows say which token they are of: slot 0 of layer 2 is the token's id."""
    ids = list(range(first, first + tokens))
    rows = np.zeros((tokens - 1, 3, slots), np.int16)
    rows[:, 1:] = np.array(ids[:-1])[:, None, None] + np.arange(slots)
    made = RoutedSample(messages=[], engine_tokens=ids, engine_rows=rows)
    made.encoded = {"input_ids": [*ids, *tail]}
    return made


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("layout", ["right", "left", "packed"])
def test_each_row_is_beside_its_token(layout, slots):
    spec = RoutingSpec(layer_ids=(1, 2), num_layers=3, num_experts=300, top_k=slots)
    samples = [sample(10 * (i + 1), tokens, slots) for i, tokens in enumerate(LENGTHS)]
    ids = [torch.tensor(each.encoded["input_ids"]) for each in samples]
    if layout == "packed":
        batch = torch.cat(ids)[None]
    else:
        batch = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=PAD, padding_side=layout)
    made = placed(samples, spec, batch, packed=layout == "packed", left=layout == "left")
    rows = made.routing
    assert rows.shape == (*batch.shape, 2, slots)
    lasts = {each.engine_tokens[-1] for each in samples}
    for token, row in zip(batch.flatten().tolist(), rows.flatten(0, 1), strict=True):
        expected = -1 if token == PAD or token in lasts else token
        assert (row[:, 0] == expected).all()
    assert made.sampling_mask is None
    assert made.captured == pytest.approx(sum(n - 1 for n in LENGTHS) / sum(LENGTHS))


@pytest.mark.parametrize("layout", ["right", "left", "packed"])
def test_each_set_is_beside_its_token(layout):
    """A set has its token and as many more as the token says; the first token of each sample was in its prompt."""
    samples = [sample(10 * (i + 1), tokens) for i, tokens in enumerate(LENGTHS)]
    for each in samples:
        sets = [[token, *range(200, 200 + token % 10)] for token in each.engine_tokens[1:]]
        each.engine_sets = KeptIds([len(ids) for ids in sets], [token for ids in sets for token in ids])
    ids = [torch.tensor(each.encoded["input_ids"]) for each in samples]
    if layout == "packed":
        batch = torch.cat(ids)[None]
    else:
        batch = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=PAD, padding_side=layout)
    mask = placed(samples, SPEC, batch, packed=layout == "packed", left=layout == "left").sampling_mask
    assert mask.shape == batch.shape
    prompts = {each.engine_tokens[0] for each in samples} | {PAD}
    for token, own in zip(batch.flatten().tolist(), mask.token_ids.split(mask.sizes.flatten().tolist()), strict=True):
        assert own.tolist() == ([] if token in prompts else [token, *range(200, 200 + token % 10)])
    samples[1].engine_sets = None
    with pytest.raises(CaptureError, match="sets: expected those of all 3 samples, or of none, got 2"):
        placed(samples, SPEC, batch, packed=layout == "packed", left=layout == "left")
    samples[1].engine_sets = KeptIds([1] * 4, [1] * 4)
    with pytest.raises(CaptureError, match="sample 1: sampling mask: expected sets of different ids"):
        placed(samples, SPEC, batch, packed=layout == "packed", left=layout == "left")


def test_what_a_template_adds_behind_has_no_row():
    rows = placed([sample(10, 3, tail=(7, 8))], SPEC, torch.tensor([[10, 11, 12, 7, 8]])).routing
    assert (rows[0, :2] >= 0).all()
    assert (rows[0, 2:] == -1).all()


@pytest.mark.parametrize("batch", [[[11, 10, 12]], [[10, 11]], [[10, 11, 13]]])
def test_another_layout_is_refused(batch):
    with pytest.raises(CaptureError, match=r"sample 0: expected its 3 tokens from position 0 of row 0"):
        placed([sample(10, 3)], SPEC, torch.tensor(batch))


def test_tokens_that_were_encoded_anew_are_refused():
    made = sample(10, 4)
    made.encoded = {"input_ids": [10, 99, 12, 13]}
    with pytest.raises(CaptureError, match=r"sample 0: expected the 4 tokens .* of which those from 1 on are others"):
        placed([made], SPEC, torch.tensor([[10, 99, 12, 13]]))


def settings(**changed):
    args = dict(
        use_vllm=True,
        vllm_mode="colocate",
        vllm_enable_lora=False,
        use_liger_kernel=False,
        multi_turn_scheduler=None,
        deepspeed_plugin=SimpleNamespace(zero_stage=2),
        temperature=1.0,
        top_k=-1,
        top_p=1.0,
        min_p=0.0,
    )
    given = {"template": SimpleNamespace(sequence_parallel_size=changed.pop("sequence_parallel_size", 1))}
    given |= {name: changed.pop(name, None) for name in ("chord_sft_dataset", "teacher_model_server")}
    return subject(SimpleNamespace(**{**args, **changed}), given)


def test_plain_settings_are_supported():
    require_supported("ms-swift", REFUSALS, settings())
    require_supported("ms-swift", REFUSALS, settings(top_k=50, top_p=0.9, min_p=0.05))
    require_supported("ms-swift", REFUSALS, settings(teacher_model_server="http://a"))


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("use_vllm false", dict(use_vllm=False, vllm_mode=None)),
        ("vllm_mode server", dict(vllm_mode="server")),
        ("vllm_enable_lora", dict(vllm_enable_lora=True)),
        ("sequence_parallel_size above 1", dict(sequence_parallel_size=2)),
        ("use_liger_kernel", dict(use_liger_kernel=True)),
        ("multi_turn_scheduler", dict(multi_turn_scheduler="tips")),
        ("top_p or min_p without top_k", dict(top_p=0.9)),
        ("top_p or min_p without top_k", dict(min_p=0.1)),
        ("teacher_model_server with top_p, top_k or min_p", dict(teacher_model_server="http://a", top_k=50)),
        ("chord_sft_dataset", dict(chord_sft_dataset=["demonstrations"])),
        ("DeepSpeed ZeRO-3", dict(deepspeed_plugin=SimpleNamespace(zero_stage=3))),
    ],
)
def test_each_refusal_alone(name, changed):
    with pytest.raises(ConfigError) as raised:
        require_supported("ms-swift", REFUSALS, settings(**changed))
    assert name in str(raised.value)
    assert sum(each.setting in str(raised.value) for each in REFUSALS) == 1
