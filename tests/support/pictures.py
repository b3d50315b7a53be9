"""Images for the tiny vision-language models of the zoo, found by what their forward takes and not by name."""

import dataclasses
import inspect
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from zoo import CASES, Case

IMAGE, VIDEO, START, END = 60, 61, 62, 63  # tokens; text has others
_GEMMA4 = dict(
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    patch_size=4,
    pooling_kernel_size=2,
    position_embedding_size=16,
)
_SAM = dict(
    hidden_size=32,
    output_channels=8,
    downsample_channels=[8, 32],
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=28,
    patch_size=4,
    mlp_dim=32,
    global_attn_indexes=[0],
)
# What the zoo leaves out or makes too small for a picture.
_MORE: dict[str, dict[str, Any]] = {
    "deepseek_ocr2": dict(parts=dict(vision_config=dict(sam_config=_SAM))),
    "gemma4": dict(
        text=dict(use_bidirectional_attention="vision"),
        parts=dict(vision_config=dict(_GEMMA4, model_type="gemma4_vision")),
    ),
    "unlimited_ocr": dict(parts=dict(vision_config=dict(sam_config=_SAM))),
    "llama4": dict(parts=dict(vision_config=dict(image_size=32, intermediate_size=128))),
    "muse_spark": dict(parts=dict(out_hidden_size=128)),
}


def takes(case: Case) -> set[str]:
    return set(inspect.signature(case.model_class.forward).parameters)


def names_positions(name: str) -> bool:
    """Whether a class of the family places images by itself."""
    return any(
        hasattr(item, "get_rope_index") for item in vars(sys.modules[CASES[name].model_class.__module__]).values()
    )


SEEING = [name for name, case in CASES.items() if "pixel_values" in takes(case)]


def build(name: str) -> nn.Module:
    case = CASES[name]
    more = _MORE.get(name.partition("-")[0], {})
    model = dataclasses.replace(
        case, text={**case.text, **more.get("text", {})}, parts={**case.parts, **more.get("parts", {})}
    ).build()
    config = model.config
    tokens = dict(image_token=IMAGE, video_token=VIDEO, vision_start_token=START, vision_end_token=END)
    for key, token in tokens.items():
        for attribute in (f"{key}_id", f"{key}_index"):
            if hasattr(config, attribute) or key.startswith("vision"):
                setattr(config, attribute, token)
    if hasattr(model, "image_placeholder_token_id"):
        model.image_placeholder_token_id = IMAGE
    return model


def picture(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Keyword arguments of one image; those of several are joined along the first dimension."""
    names = set(inspect.signature(type(model).forward).parameters)
    config = model.config.vision_config
    generator = torch.Generator().manual_seed(seed)
    channels = _first(config, "in_channels", "num_channels", default=3)
    if "image_grid_thw" in names:
        merge = _first(config, "spatial_merge_size", "merge_size", default=2)
        grid = torch.tensor([[1, 2 * merge, merge * (2 + seed % 2)]])
        time = _first(config, "temporal_patch_size", "patch_temporal", default=1)
        size = channels * time * config.patch_size**2
        return dict(pixel_values=torch.randn(int(grid.prod()), size, generator=generator), image_grid_thw=grid)
    if "image_position_ids" in names:
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4))[None]
        pixels = torch.rand(1, 16, 3 * config.patch_size**2, generator=generator)
        return dict(pixel_values=pixels, image_position_ids=places)
    side = _first(config, "image_size", default=None) or _first(config.sam_config, "image_size", default=28)
    return dict(pixel_values=torch.randn(1, channels, side, side, generator=generator))


def tokens_of(model: nn.Module, given: dict[str, Tensor]) -> int:
    """How many tokens stand for an image."""
    strategy = "vision_feature_select_strategy"  # Llama 4 has to be told before transformers 5.16
    if strategy in inspect.signature(model.get_image_features).parameters:
        given = given | {strategy: "default"}
    with torch.no_grad():
        found = model.get_image_features(**given, return_dict=True)
        features = getattr(found, "pooler_output", None)
        features = found.last_hidden_state if features is None else features
    # One tensor, or one for each image.
    parts = [features] if isinstance(features, Tensor) else features
    return sum(part.flatten(0, -2).shape[0] for part in parts)


@dataclasses.dataclass
class Sample:
    """Token ids `[S]` of one sequence, and its images."""

    ids: Tensor
    images: list[dict[str, Tensor]]


def sample(model: nn.Module, images: int, seed: int) -> Sample:
    """Text, then each image between its marks, with text after it."""
    generator = torch.Generator().manual_seed(seed)

    def text(length: int) -> Tensor:
        return torch.randint(1, 55, (length,), generator=generator)

    shown = [picture(model, 10 * seed + i) for i in range(images)]
    parts = [text(3)]
    for image in shown:
        parts += [torch.tensor([START]), torch.full((tokens_of(model, image),), IMAGE), torch.tensor([END]), text(3)]
    return Sample(torch.cat([*parts, text(2 + seed % 3)]), shown)


def beside(model: nn.Module, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Keyword arguments of all images of `samples`, in their order."""
    images = [image for one in samples for image in one.images]
    return {name: torch.cat([image[name] for image in images]) for name in (images[0] if images else ())}


def type_ids(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Keyword arguments `[B, S]` that say which tokens of `ids` are of an image."""
    names = set(inspect.signature(type(model).forward).parameters)
    return {name: (ids == IMAGE).int() for name in ("mm_token_type_ids", "moe_mm_token_type_ids") if name in names}


def rope_index(model: nn.Module, one: Sample) -> Tensor | None:
    """The model's own positions `[3, 1, S]` of a sample; None if it takes one position a token."""
    module: Any = next((m for m in model.modules() if hasattr(m, "get_rope_index")), None)
    if module is None:
        return None
    ids = one.ids[None]
    wanted = inspect.signature(module.get_rope_index).parameters
    given = beside(model, [one]) | type_ids(model, ids) | {"attention_mask": torch.ones_like(ids)}
    return module.get_rope_index(ids, **{name: value for name, value in given.items() if name in wanted})[0].long()


def _first(config: Any, *names: str, default: Any) -> Any:
    return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), default)
