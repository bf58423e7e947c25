"""Opens a finished bundle with the libraries that will run it, before it gets its name."""

from __future__ import annotations

from pathlib import Path

from edge_vlm.bundle.manifest import DECODER_NAME, VISION_NAME, Bundle
from edge_vlm.decoder.llama import api
from edge_vlm.errors import EdgeVLMError
from edge_vlm.families.base import family_of
from edge_vlm_export.decoder.logits import loaded
from edge_vlm_export.vision.stagewise import session


def verify_bundle(folder: Path) -> None:
    """Check manifest and files, load the graph in onnxruntime and the vocabulary in llama.cpp.

    Raises:
        EdgeVLMError: one of them refuses what was written, which is a fault of the exporter.
    """
    bundle = Bundle.open(folder)
    try:
        _verify_vision(bundle)
        _verify_decoder(bundle)
    except EdgeVLMError as error:
        raise EdgeVLMError(f"the written bundle does not work: {error}") from error


def _verify_vision(bundle: Bundle) -> None:
    try:  # without optimization: faster, and weights are not copied
        opened = session(str(bundle.file(VISION_NAME)), optimized=False)
    except Exception as error:
        raise EdgeVLMError(f"onnxruntime cannot load {VISION_NAME} ({error})") from error
    images, hidden = bundle.manifest.image_processor, bundle.manifest.decoder.hidden_size
    # Fixed to one crop for engines that need it, else open.
    n_crops = 1 if opened.get_inputs()[0].shape[0] == 1 else "n_crops"
    family = family_of(images)
    expected = {
        "crops": [n_crops, *images.crop_axes],
        **{name: [n_crops, *family.extra_axes.get(name, ())] for name in family.extras},
        "embeddings": [n_crops, images.vector_axis, hidden],
    }
    if family.n_markers:
        expected["marker_embeddings"] = [family.n_markers, hidden]
    values = [*opened.get_inputs(), *opened.get_outputs()]
    found = {value.name: value.shape for value in values}
    if found != expected:
        raise EdgeVLMError(f"{VISION_NAME} has {found}, expected {expected}")


def _verify_decoder(bundle: Bundle) -> None:
    decoder, tokens = bundle.manifest.decoder, bundle.manifest.tokens
    with loaded(bundle.file(DECODER_NAME), vocab_only=True) as model:
        llama_cpp = api()
        vocab = llama_cpp.llama_model_get_vocab(model)
        n_ids = llama_cpp.llama_vocab_n_tokens(vocab)
        if n_ids != decoder.vocab_size + decoder.additional_vocab_size:
            raise EdgeVLMError(f"{DECODER_NAME} has {n_ids} tokens in llama.cpp")
        for text, token in tokens.special.items():
            if llama_cpp.llama_vocab_get_text(vocab, token) != text.encode():
                raise EdgeVLMError(f"{DECODER_NAME} does not give id {token} to {text}")
