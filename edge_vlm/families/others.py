"""Models that are compared with: what each makes of a picture's size.

Each has one small function that counts what its image processor gives. They follow the processors'
published code, named at each function, and were written anew here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from edge_vlm.families.internvl.released import IMAGE_PROCESSOR as INTERNVL
from edge_vlm.families.internvl.released import RELEASED as INTERNVL_RELEASED
from edge_vlm.families.internvl.tiling import plan_tiling as plan_internvl
from edge_vlm.families.llava.released import NEXT_IMAGE_PROCESSOR, NEXT_RELEASED
from edge_vlm.families.llava.released import RELEASED as LLAVA_15
from edge_vlm.families.llava_like import plan_grid
from edge_vlm.families.llava_onevision.released import IMAGE_PROCESSOR as ONEVISION
from edge_vlm.families.llava_onevision.released import RELEASED
from edge_vlm.families.llava_onevision.tiling import plan_tiling
from edge_vlm.families.pixtral.patches import grid_of
from edge_vlm.families.pixtral.released import IMAGE_PROCESSOR as PIXTRAL
from edge_vlm.families.pixtral.released import RELEASED as PIXTRAL_RELEASED
from edge_vlm.families.qwen2_5_vl.patches import smart_resize
from edge_vlm.families.qwen2_5_vl.released import IMAGE_PROCESSOR as QWEN
from edge_vlm.families.qwen2_5_vl.released import RELEASED as QWEN_RELEASED
from edge_vlm.families.sizes import Decoder

Size = tuple[int, int]  # width, height, in pixels, tiles or patches


@dataclass(frozen=True)
class Usage:
    """What a picture becomes: decoder positions, and vectors that only cross-attention reads."""

    positions: int
    cross_states: int = 0

    @property
    def tokens(self) -> int:
        """Image tokens as they are usually quoted."""
        return self.cross_states or self.positions


@dataclass(frozen=True)
class OtherModel:
    """One model to compare with."""

    name: str
    decoder: Decoder  # all blocks, those with cross-attention included
    vision_parameters: float
    rule: Callable[[int, int], Usage]
    cross_layers: int = 0


def llava_15(width: int, height: int) -> Usage:
    """24 x 24 patches, always. Source: Liu et al. 2023 (arXiv 2310.03744), CLIP ViT-L/14 at 336."""
    del width, height
    return Usage(24 * 24)


def llava_next(width: int, height: int) -> Usage:
    """A base view and up to 4 tiles of 336, padding cut off, a newline vector a row.

    Source: transformers, models/llava_next (image grid points and pack_image_features).
    """
    return Usage(plan_grid(width, height, NEXT_IMAGE_PROCESSOR).n_tokens)


def llava_onevision(width: int, height: int) -> Usage:
    """As ``families.llava_onevision`` for the released models."""
    return Usage(plan_tiling(width, height, ONEVISION).n_tokens)


def llama_32_vision(width: int, height: int) -> Usage:
    """Up to 4 tiles of 560, 1,601 vectors each, read by cross-attention; one position.

    Source: transformers, models/mllama (get_optimal_tiled_canvas); padding tiles not counted.
    """
    tile = 560
    scales = {(c, r): min(c * tile / width, r * tile / height) for c, r in _grids(4)}
    enlarging = [scale for scale in scales.values() if scale >= 1]
    chosen = min(enlarging) if enlarging else max(scales.values())
    tiles = min(c * r for (c, r), scale in scales.items() if scale == chosen)
    return Usage(1, tiles * ((tile // 14) ** 2 + 1))


def qwen_25_vl(width: int, height: int) -> Usage:
    """A vector for each 28 x 28 pixels, up to 16,384, and two markers.

    As ``families.qwen2_5_vl`` for the released models.
    """
    resized = smart_resize(height, width, QWEN)
    return Usage(math.prod(resized) // QWEN.block_size**2 + 2)


def pixtral(width: int, height: int) -> Usage:
    """Patches of 16, the longer side at most 1,024, a break or end token a row.

    As ``families.pixtral`` for the released model, which refuses the thinnest pictures.
    """
    rows, columns = (max(1, n) for n in grid_of(height, width, PIXTRAL))
    return Usage(rows * (columns + 1))


def internvl(width: int, height: int) -> Usage:
    """As ``families.internvl`` for the released models."""
    return Usage(plan_internvl(width, height, INTERNVL).n_tokens)


def phi_4_multimodal(width: int, height: int) -> Usage:
    """A global view and up to 36 tiles of 448, padding masked, a separator a row.

    Source: transformers, models/phi4_multimodal (dynamic_preprocess and num_img_tokens).
    """
    tile, patch, most = 448, 14, 36
    columns, rows = math.ceil(width / tile), math.ceil(height / tile)
    if columns * rows > most:
        columns, rows = _closest_ratio((width, height), most, tile)
    scale = min(columns * tile / width, rows * tile / height)
    # Whole patches of padding are masked; every second patch is a vector.
    kept = [
        math.ceil((n * tile // patch - max(0, n * tile - int(side * scale)) // patch) / 2)
        for n, side in ((columns, width), (rows, height))
    ]
    return Usage(256 + 1 + kept[0] * kept[1] + kept[1] + 16)


def _grids(most: int) -> list[Size]:
    """(columns, rows) of at most so many tiles, the fewest first."""
    sides = range(1, most + 1)
    return sorted(((c, r) for c in sides for r in sides if c * r <= most), key=math.prod)


def _closest_ratio(size: Size, most: int, tile: int) -> Size:
    """The tiling whose aspect ratio is nearest; of equal ones the largest the picture fills."""
    best, best_distance = (1, 1), math.inf
    for columns, rows in _grids(most):
        distance = abs(size[0] / size[1] - columns / rows)
        filled = size[0] * size[1] > 0.5 * tile**2 * columns * rows
        if distance < best_distance or (distance == best_distance and filled):
            best, best_distance = (columns, rows), distance
    return best


def _decoder(*sizes: int, tied: bool = False) -> Decoder:
    """A decoder from its config.json; all of these have heads of 128."""
    names = ("n_layers", "hidden_size", "ffn_size", "n_heads", "n_kv_heads", "vocab_size")
    common = {"precision": "q4_k_m", "head_dim": 128, "additional_vocab_size": 0}
    common |= {"max_sequence_length": 1 << 17, "tied_head": tied}
    return Decoder.model_validate({**dict(zip(names, sizes, strict=True)), **common})


# Geometry from each model's config.json on Hugging Face; parameters of the vision part with its
# projector from the model cards.
OTHER_MODELS = (
    OtherModel("LLaVA-1.5 13B", LLAVA_15["llava-1.5-13b"].decoder, 0.336e9, llava_15),
    OtherModel(
        "LLaVA-NeXT 7B", NEXT_RELEASED["llava-next-mistral-7b"].decoder, 0.325e9, llava_next
    ),
    OtherModel(
        "LLaVA-OneVision 7B", RELEASED["llava-onevision-7b"].decoder, 0.415e9, llava_onevision
    ),
    OtherModel(
        "Llama 3.2 Vision 11B", _decoder(40, 4096, 14336, 32, 8, 128256), 0.9e9, llama_32_vision, 8
    ),
    OtherModel(
        "Llama 3.2 Vision 90B",
        _decoder(100, 8192, 28672, 64, 8, 128256),
        0.93e9,
        llama_32_vision,
        20,
    ),
    OtherModel("Qwen2.5-VL 3B", QWEN_RELEASED["qwen2.5-vl-3b"].decoder, 0.668e9, qwen_25_vl),
    OtherModel("Qwen2.5-VL 7B", QWEN_RELEASED["qwen2.5-vl-7b"].decoder, 0.676e9, qwen_25_vl),
    OtherModel("Pixtral 12B", PIXTRAL_RELEASED["pixtral-12b"].decoder, 0.435e9, pixtral),
    OtherModel("InternVL2.5 1B", INTERNVL_RELEASED["internvl2.5-1b"].decoder, 0.309e9, internvl),
    OtherModel("InternVL2.5 8B", INTERNVL_RELEASED["internvl2.5-8b"].decoder, 0.338e9, internvl),
    OtherModel(
        "Phi-4-Multimodal",
        _decoder(32, 3072, 8192, 24, 8, 200064, tied=True),
        0.441e9,
        phi_4_multimodal,
    ),
)
