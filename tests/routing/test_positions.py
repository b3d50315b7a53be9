"""What `r3.routing.positions` reads off position ids and off a model's signature, with toys and no ranks."""

import pytest
import torch
from torch import nn

from r3 import ReplayError
from r3.routing.positions import ModelInputs, is_type_ids, text_positions


class Decoder(nn.Module):
    def forward(self, input_ids=None, position_ids=None, attention_mask=None):
        return input_ids


class Seeing(nn.Module):
    """As transformers builds a vision-language model: around a decoder that takes no images."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Decoder()

    def get_decoder(self):
        return self.inner

    def forward(self, input_ids=None, position_ids=None, pixel_values=None, mm_token_type_ids=None, labels=None):
        return self.inner(input_ids, position_ids)


class Multimodal(Seeing):
    def get_rope_index(self):
        return None


IDS = torch.arange(6)[None]
IMAGE = {"pixel_values": torch.ones(1, 3)}


def grid(*parts: list[int]) -> torch.Tensor:
    """int64 `[P, 1, S]`."""
    return torch.tensor(parts)[:, None]


def test_inputs_beside_the_decoders_are_found():
    inputs = ModelInputs(Multimodal())
    assert inputs.multimodal_rope
    assert not ModelInputs(Seeing()).multimodal_rope
    assert not ModelInputs(Decoder()).multimodal_rope
    given = {**IMAGE, "mm_token_type_ids": torch.ones(1, 6), "labels": IDS, "input_ids": IDS, "use_cache": False}
    assert inputs.given(given) == ["mm_token_type_ids", "pixel_values"]
    assert inputs.given({"pixel_values": None, "mm_token_type_ids": [torch.ones(1)]}) == ["mm_token_type_ids"]
    assert ModelInputs(Decoder()).given(given) == []


def test_inputs_of_a_model_beside_the_decoder_are_not_inputs_of_the_model():
    class Judged(Seeing):
        def __init__(self) -> None:
            super().__init__()
            self.judge = Seeing()

        def forward(self, input_ids=None, position_ids=None, audio=None):
            return self.inner(input_ids, position_ids)

    assert ModelInputs(Judged()).given({**IMAGE, "audio": torch.ones(1)}) == ["audio"]


@pytest.mark.parametrize(("name", "expected"), [("token_type_ids", True), ("mm_token_type_ids", True), ("ids", False)])
def test_names_of_token_types(name, expected):
    assert is_type_ids(name) == expected


def test_flat_positions_beside_images_are_a_problem():
    inputs = ModelInputs(Multimodal())
    with pytest.raises(
        ReplayError, match=r"expected \[3, B, S\] or \[4, B, S\] beside pixel_values, got \[B, S\] = \(1, 6\)"
    ):
        inputs.require_positions({"position_ids": IDS, **IMAGE})
    types = {"mm_token_type_ids": torch.ones(1, 6, dtype=torch.int64)}
    with pytest.raises(ReplayError, match=r"beside mm_token_type_ids, pixel_values, got"):
        inputs.require_positions({"position_ids": IDS, **types, **IMAGE})
    types = {"mm_token_type_ids": torch.zeros(1, 6, dtype=torch.int64)}
    inputs.require_positions({"position_ids": IDS, **types})  # types that show text alone
    types["mm_token_type_ids"][0, 2] = 1
    with pytest.raises(ReplayError, match="beside mm_token_type_ids"):
        inputs.require_positions({"position_ids": IDS, **types})
    inputs.require_positions({"position_ids": IDS})
    inputs.require_positions(IMAGE)  # the model makes its own
    ModelInputs(Seeing()).require_positions({"position_ids": IDS, **IMAGE})


def test_three_parts_without_multimodal_rope_are_a_problem():
    with pytest.raises(ReplayError) as caught:
        ModelInputs(Seeing()).require_positions({"position_ids": IDS.expand(3, 1, 6)})
    assert str(caught.value) == (
        "position_ids: expected [B, S], got (3, 1, 6): this model has no multimodal rope (get_rope_index), and takes "
        "one position a token"
    )
    ModelInputs(Multimodal()).require_positions({"position_ids": IDS.expand(3, 1, 6), **IMAGE})


def test_packed_rows_need_text_positions_first():
    packed = torch.tensor([0, 1, 2, 0, 1, 2])
    inputs = ModelInputs(Multimodal())
    with pytest.raises(ReplayError, match=r"expected \[4, B, S\] for packed rows.*got \(3, 1, 6\)"):
        inputs.require_positions({"position_ids": packed.expand(3, 1, 6)})
    inputs.require_positions({"position_ids": packed.expand(4, 1, 6)})
    # Zeros at an end only, as padding has them, or side by side, hide no sequence.
    for row in ([0, 1, 2, 3, 4, 0], [0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 0, 0]):
        inputs.require_positions({"position_ids": torch.tensor(row).expand(3, 1, 6)})


def test_text_positions_of_each_form():
    assert torch.equal(text_positions(IDS), IDS)
    assert torch.equal(text_positions(grid([5, 6], [0, 1], [0, 1], [0, 1])), torch.tensor([[5, 6]]))


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        # An image of two by two patches after two tokens of text, and text that goes on after it.
        (([0, 1, 2, 2, 2, 2, 4, 5], [0, 1, 2, 2, 3, 3, 4, 5], [0, 1, 2, 3, 2, 3, 4, 5]), [0, 1, 2, 3, 4, 5, 6, 7]),
        # Two sequences of text.
        (([0, 1, 2, 0, 1], [0, 1, 2, 0, 1], [0, 1, 2, 0, 1]), [0, 1, 2, 0, 1]),
        # A sequence that does not begin at 0 does not here either, nor does text that skips.
        (([3, 4, 5], [3, 4, 5], [3, 4, 5]), [3, 1, 2]),
        (([0, 1, 5, 6], [0, 1, 5, 6], [0, 1, 5, 6]), [0, 1, 5, 3]),
        # A slice of a row, from the inside of an image on: only text after text may be seen to skip.
        (([2, 2, 4, 7], [2, 3, 4, 7], [3, 3, 4, 7]), [3, 1, 2, 7]),
        # An image that begins where all parts are 0 begins a sequence; its other patches do not.
        (([0, 0, 0, 0, 2], [0, 0, 1, 1, 2], [0, 1, 0, 1, 2]), [0, 1, 2, 3, 4]),
    ],
)
def test_text_positions_of_three_parts(parts, expected):
    assert text_positions(grid(*parts)).tolist() == [expected]


def test_text_positions_of_a_batch_are_those_of_each_row():
    rows = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 0, 1, 2], [0, 0, 1, 2, 3]])
    found = text_positions(rows.expand(3, 3, 5))
    assert found.tolist() == [[0, 1, 2, 3, 4], [0, 1, 0, 1, 2], [0, 0, 1, 2, 3]]
