"""Released models, for planning without their weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_vlm.errors import InputError
from edge_vlm.families.base import DEFAULT, family_names, family_of, find_family
from edge_vlm.planning import cost
from edge_vlm.planning.request import ModelSizes

if TYPE_CHECKING:
    from edge_vlm.families.base import Released

# Of a weight.
VISION_BYTES = {"fp32": 4.0, "fp16": 2.0, "int8": 1.0, "int8-static": 1.0, "int4": 0.625}
EXTERNAL_DATA_BYTES = 256 << 20  # a larger vision graph has its weights in a second file
DECODER_PRECISIONS = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "iq4_xs")


def released_models() -> dict[str, Released]:
    """By name, of all families."""
    found: dict[str, Released] = {}
    for name in family_names():
        found |= find_family(name).released()
    return found


def model_sizes(
    vision: str = "fp16", decoder: str = "q4_k_m", *, name: str = DEFAULT
) -> ModelSizes:
    """Sizes of a bundle in these precisions: keys of ``VISION_BYTES`` and ``DECODER_PRECISIONS``.

    Norms and biases are left out: 0.1 % of the bytes.

    Raises:
        InputError: no released model has that name.
    """
    known = released_models()
    if name not in known:
        raise InputError(f"{name}: is none of {', '.join(known)}")
    model = known[name]
    geometry = model.decoder.model_copy(update={"precision": decoder})
    seeing = model.vision.model_copy(update={"precision": vision})
    work = family_of(model.processor).work(model.processor, seeing)
    vision_bytes = round(work.n_weights * VISION_BYTES[vision])
    return ModelSizes(
        processor=model.processor,
        vision=seeing,
        vision_bytes=vision_bytes,
        parsed_bytes=vision_bytes if vision_bytes <= EXTERNAL_DATA_BYTES else 0,
        decoder=geometry,
        decoder_bytes=sum(cost.gguf_bytes(geometry, decoder).values()),
    )
