"""Other vision-language models on the same picture: image tokens, KV cache, prefill, weights.

Prefill is that of the image positions alone, counted as for the own model (``cost.py``); weights
are the decoder at q4_k_m by llama.cpp's rule and the vision part in half precision.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_vlm.families.others import OTHER_MODELS, OtherModel, Usage
from edge_vlm.families.sizes import decoder_flops
from edge_vlm.machine.engine_settings import KV_TYPES
from edge_vlm.planning import cost
from edge_vlm.planning.budget import limit_tiles
from edge_vlm.planning.request import ModelSizes, plan_image


@dataclass(frozen=True)
class Comparison:
    """One model's costs for one picture; bytes, FLOPs."""

    name: str
    image_tokens: int
    kv_bytes: int
    prefill_flops: int
    weights_bytes: int


def compare(
    model: ModelSizes, width: int, height: int, *, name: str, max_tiles: int | None = None
) -> list[Comparison]:
    """The own model, then every family, for a picture of ``width`` x ``height`` pixels.

    Raises:
        ImageError: the own model does not take such an aspect ratio.
    """
    image = plan_image(width, height, limit_tiles(model.processor, max_tiles), model.decoder)
    own = OtherModel(
        name,
        model.decoder,
        model.work.n_weights,
        lambda _width, _height: Usage(image.image_tokens),
    )
    return [_costs(family, width, height) for family in (own, *OTHER_MODELS)]


def _costs(family: OtherModel, width: int, height: int) -> Comparison:
    usage, decoder = family.rule(width, height), family.decoder
    own_layers = decoder.n_layers - family.cross_layers
    # K and V of the cross-attention blocks are computed from each vector, once.
    kv_width = decoder.n_kv_heads * decoder.head_dim
    cross = usage.cross_states * family.cross_layers * 2 * kv_width
    flops = decoder_flops(decoder, usage.positions) + 2 * decoder.hidden_size * cross
    own = 2 * usage.positions * own_layers * kv_width
    return Comparison(
        name=family.name,
        image_tokens=usage.tokens,
        kv_bytes=round((own + cross) * KV_TYPES["f16"]),
        prefill_flops=flops,
        weights_bytes=round(
            sum(cost.gguf_bytes(decoder, "q4_k_m").values()) + 2 * family.vision_parameters
        ),
    )
