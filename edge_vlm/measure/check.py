"""Does a bundle compute anything sensible? One small picture and a question, end to end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edge_vlm.answering.trial import try_once
from edge_vlm.decoder.decoder import LlamaDecoder
from edge_vlm.errors import DecoderError, VisionError
from edge_vlm.families.base import family_of
from edge_vlm.pictures.tower import OnnxTower
from edge_vlm.planning.tuning import engines_for
from edge_vlm.prompt.builder import PromptBuilder, TokenSpan
from edge_vlm.prompt.messages import user_message

if TYPE_CHECKING:
    from edge_vlm.bundle.manifest import Bundle
    from edge_vlm.machine.settings import MachineSettings

_QUESTION = "What is on the picture?"


def check_sanity(bundle: Bundle, settings: MachineSettings) -> None:
    """Encode a drawn picture and compute the scores of the next token.

    Raises:
        BundleError: an engine refuses a file or does not survive it, or it differs from the
            manifest.
        VisionError: the embeddings are not finite, or the same for different crops.
        DecoderError: the scores are not finite, or all the same.
    """
    side = np.arange(48, dtype=np.uint8)
    picture = np.stack(np.broadcast_arrays(5 * side[:, None], 5 * side[None, :], 90), axis=-1)
    processor = bundle.manifest.image_processor
    family = family_of(processor)
    tiles = family.cut(picture.astype(np.uint8), processor)
    engines = engines_for(bundle.manifest, settings)
    try_once(bundle, settings, engines)
    tower = OnnxTower(bundle, engines)
    embeddings = tower.encode(tiles)
    if not np.isfinite(embeddings).all():
        raise VisionError(f"{bundle.path}: vision.onnx gives values that are no numbers")
    if np.ptp(embeddings, axis=(0, 1)).max() == 0:
        raise VisionError(f"{bundle.path}: vision.onnx gives the same vector everywhere")
    rows = family.rows(embeddings, tower.marker_embeddings, tiles.plan, processor)
    decoder = LlamaDecoder(bundle, engines, kv_type=settings.kv_type, logs=settings.engine_logs)
    try:
        prompts = PromptBuilder(bundle.manifest, decoder.chat_template, decoder.tokenize)
        spans = prompts.build([user_message([picture], _QUESTION)])
        n_positions = sum(len(s.ids) if isinstance(s, TokenSpan) else len(rows) for s in spans)
        with decoder.context(n_positions) as context:
            for span in spans:
                if isinstance(span, TokenSpan):
                    context.append_tokens(span.ids, logits=True)
                else:
                    positions = family.positions(tiles.plan, processor)
                    context.append_embeddings(rows, positions=positions)
            logits = context.logits()[: bundle.manifest.decoder.vocab_size]
    finally:
        decoder.close()
    if not np.isfinite(logits).all():
        raise DecoderError(f"{bundle.path}: decoder.gguf gives scores that are no numbers")
    if np.ptp(logits) == 0:
        raise DecoderError(f"{bundle.path}: decoder.gguf gives every token the same score")
