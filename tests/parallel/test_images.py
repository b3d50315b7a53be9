"""Images in rows: alone = padded = packed = Ulysses, in logits and gradients, or refused, in every family that sees."""

import contextlib

import image_jobs as jobs
import pictures
import pytest
import torch
from ranks import Ranks
from zoo import CASES, listed

import r3
from r3 import ParallelError, ReplayError, RoutingError
from r3.parallel import next_tokens, ulysses
from r3.routing import Packing
from r3.routing.positions import ModelInputs, text_positions

# Why a family cannot run on packed rows: what its error says.
REFUSED = {
    "dots3_note": "leaves the attention mask to its attention function",
    "glm5_next": "position 3 depends on",
    "hy_v4_vl": "leaves the attention mask to its attention function",
    "inkling": "position 3 depends on",
    "inkling2": "position 3 depends on",
    "mistral_large4": "leaves the attention mask to its attention function",
    "qwen3_5_moe": "position 3 depends on",
    "qwen4_exp": "leaves the attention mask to its attention function",
    "unlimited_ocr": "combines its causal mask with one of its own",
}
# By release of transformers: `get_decoder` returns the whole model, so that nothing is known to lie outside of it;
# images come as tiles (`patch_grid_thw`), which `pictures` does not make.
NOT_SHOWN = {"<5.16": ("qwen3_omni_moe",), ">=5.24": ("inkling2", "inkling2_loop")}
FAMILIES = [name for name in pictures.SEEING if "-" not in name and not listed(NOT_SHOWN, name)]
PACKED = [name for name in FAMILIES if name not in REFUSED]
NOT_REPLAYED = {"ernie4_5_vl_moe"}  # routers of its own for images
MULTIMODAL_ROPE = [name for name in FAMILIES if pictures.names_positions(name)]


@pytest.fixture(scope="module")
def two():
    with contextlib.closing(Ranks(2)) as ranks:
        yield ranks


def check(results):
    for found in results:
        assert isinstance(found, dict), found
        assert set(found) == {"padded", "packed", "sliced"}
        assert max(value for layout in found.values() for value in layout.values()) < 1e-4, found


@pytest.mark.parametrize("name", PACKED)
def test_sequences_with_images_are_exact_in_every_layout(two, name):
    """One image in the first sequence, two in the second; a slice ends within an image."""
    check(two.all(jobs.compare, name, (1, 2), name not in NOT_REPLAYED))


@pytest.mark.parametrize(
    ("name", "images"),
    [("qwen3_vl_moe", (1,)), ("qwen3_vl_moe", (0, 1)), ("qwen3_vl_moe", (2, 0)), ("gemma4", (0, 1))],
    ids=str,
)
def test_images_in_one_sequence_only(two, name, images):
    check(two.all(jobs.compare, name, images, True))


@pytest.mark.parametrize("name", [name for name in REFUSED if not listed(NOT_SHOWN, name)])
def test_families_that_cannot_be_packed_are_refused(two, name):
    for found in two.all(jobs.compare, name, (1, 1), False):
        assert isinstance(found, str), found
        assert REFUSED[name] in found


def test_ranks_that_do_not_hold_the_same_images_all_raise(two):
    for found in two.run(jobs.images_on_one_rank, timeout_s=60):
        assert isinstance(found, ParallelError), found
        assert "the images of the whole rows" in str(found)
    check(two.all(jobs.compare, "qwen3_vl_moe", (1, 1), False))


def given_to(model, *counts):
    samples = [pictures.sample(model, count, seed) for seed, count in enumerate(counts)]
    ids = torch.cat([one.ids for one in samples])[None]
    return samples, {
        "input_ids": ids,
        "use_cache": False,
        **pictures.type_ids(model, ids),
        **pictures.beside(model, samples),
    }


@pytest.mark.parametrize("name", [name for name in FAMILIES if name in PACKED or name in MULTIMODAL_ROPE])
def test_multimodal_rope_is_known_by_what_it_does(name):
    """Text positions change what such a model says of an image, and no other model."""
    model = pictures.build(name)
    _, given = given_to(model, 1)
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    with torch.no_grad():
        own = model(**given).logits
        flat = model(**given, position_ids=torch.arange(own.shape[1])[None]).logits
    assert ModelInputs(model).multimodal_rope == bool((own - flat).abs().max() > 1e-3)


@pytest.mark.parametrize("name", MULTIMODAL_ROPE)
def test_text_positions_beside_images_are_refused(name):
    model = pictures.build(name)
    replay = r3.attach(model)
    samples, given = given_to(model, 1, 1)
    length = given["input_ids"].shape[1]
    routing = jobs.random_routing(replay, length, 0)
    positions = torch.cat([torch.arange(len(one.ids)) for one in samples])[None]
    with pytest.raises(ReplayError, match=r"\[3, B, S\] or \[4, B, S\] beside image_grid_thw.*get_rope_index"):
        model(**given, position_ids=positions, routed_experts=routing)
    if name not in NOT_REPLAYED:
        with r3.record(model), pytest.raises(ReplayError, match="beside image_grid_thw"):
            model(**given, position_ids=positions)
    # Rows that are packed, which these positions alone do not tell transformers.
    rope = torch.cat([pictures.rope_index(model, one) for one in samples], -1)
    with pytest.raises(ReplayError, match=r"expected \[4, B, S\] for packed rows"):
        model(**given, position_ids=rope, routed_experts=routing)
    if name in PACKED:
        attached = ulysses(model)
        with pytest.raises(ParallelError, match="beside image_grid_thw"):
            model(**given, position_ids=positions)
        with pytest.raises(ParallelError, match="position_ids: expected"):
            model(**given)
        attached.detach()
    # No images: text positions are right.
    text = torch.randint(1, 50, (1, length), generator=torch.Generator().manual_seed(0))
    model(input_ids=text, **pictures.type_ids(model, text), position_ids=positions, routed_experts=routing)


@pytest.mark.parametrize("name", [name for name in MULTIMODAL_ROPE if name in PACKED])
def test_positions_without_their_text_part(name):
    """`[3, B, S]` of packed rows: sequences begin where all parts are 0."""
    model = pictures.build(name)
    samples, given = given_to(model, 1, 2)
    rope = torch.cat([pictures.rope_index(model, one) for one in samples], -1)
    text = torch.cat([torch.arange(len(one.ids)) for one in samples])[None]
    assert torch.equal(text_positions(rope), text)
    attached = ulysses(model)
    with torch.no_grad():
        three = model(**given, position_ids=rope).logits
        four = model(**given, position_ids=torch.cat([text[None], rope])).logits
        assert torch.equal(three, four)
        with r3.record(model) if name not in NOT_REPLAYED else contextlib.nullcontext():
            model(**given, position_ids=rope)
    for wrong in (rope + 1, rope.flip(-1), torch.cat([rope[..., 5:], rope[..., :5]], -1)):
        with pytest.raises(ParallelError, match="expected each sequence of the gathered rows to begin at 0"):
            model(**given, position_ids=wrong)
    attached.detach()


def test_models_without_multimodal_rope_take_one_position_a_token():
    model = CASES["qwen3_moe"].build()
    replay = r3.attach(model)
    routing = jobs.random_routing(replay, 6, 0)
    positions = torch.arange(6).expand(3, 1, 6)
    with pytest.raises(ReplayError, match="no multimodal rope"):
        model(input_ids=torch.ones(1, 6, dtype=torch.long), position_ids=positions, routed_experts=routing)
    ulysses(model)
    with pytest.raises(ParallelError, match="no multimodal rope"):
        model(input_ids=torch.ones(1, 6, dtype=torch.long), position_ids=positions, routed_experts=routing)


def test_multimodal_positions_in_packed_rows():
    packing = Packing.from_mask(torch.tensor([[0, 1, 1], [1, 1, 1]]), multiple_of=4)
    own = torch.arange(18).view(3, 2, 3)
    rows = packing.position_ids(multimodal=own)
    assert rows[0].tolist() == packing.position_ids().tolist() == [[0, 1, 0, 1, 2, 0, 0, 0]]
    assert rows[1:].tolist() == [[[a + 1, a + 2, a + 3, a + 4, a + 5, 0, 0, 0]] for a in (0, 6, 12)]
    ids = torch.arange(8)[None]
    assert next_tokens(ids, rows).tolist() == next_tokens(ids, packing.position_ids()).tolist()
    with pytest.raises(RoutingError, match=r"multimodal: expected positions \[3, B, S\]"):
        packing.position_ids(multimodal=own[0])
