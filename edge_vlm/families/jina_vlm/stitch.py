"""From crop embeddings to the rows that stand for a picture in the decoder's input."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edge_vlm.families.jina_vlm.processor import JinaImageProcessor
from edge_vlm.families.jina_vlm.tiling import TilingPlan, patch_order, token_block

Float32 = npt.NDArray[np.float32]


def stitch(
    crop_embeddings: Float32,
    marker_embeddings: Float32,
    plan: TilingPlan,
    settings: JinaImageProcessor,
) -> Float32:
    """Embeddings of a picture's whole token block, in order.

    The markers between the patches are embedded here as well, so that a picture goes into the
    decoder as one batch instead of one small batch for each row of patches.

    Args:
        crop_embeddings: (n_crops, tokens_per_crop, hidden_size), thumbnail first.
        marker_embeddings: (3, hidden_size), rows of <im_start>, <im_col>, <im_end>.
        plan: the picture's tiling.
        settings: the bundle's image processor.

    Returns:
        (n_image_tokens, hidden_size) float32.
    """
    block = token_block(plan, settings)
    hidden = crop_embeddings.shape[-1]
    rows = np.empty((len(block), hidden), np.float32)
    for code, marker in zip("sce", marker_embeddings, strict=True):
        rows[block == code] = marker
    order = patch_order(plan, settings).ravel()
    used = order >= 0
    positions = np.flatnonzero(block == "p")
    rows[positions[order[used]]] = crop_embeddings.reshape(-1, hidden)[used]
    return rows
