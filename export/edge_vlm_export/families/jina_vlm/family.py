"""jina-vlm for the exporter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from edge_vlm.errors import CheckpointError, InputError
from edge_vlm.families.jina_vlm.tiling import JinaPrompt, JinaTokens
from edge_vlm.families.sizes import Vision
from edge_vlm_export.checkpoint.config_file import check_same
from edge_vlm_export.checkpoint.tokenizer import NAMES, Tokenizer, named_token, read_byte_level
from edge_vlm_export.families.base import Family, Spread
from edge_vlm_export.families.jina_vlm.config import IMAGE_PROMPT_TOKEN, JinaSettings, read_settings
from edge_vlm_export.families.jina_vlm.language import decoder, text_bias_shapes
from edge_vlm_export.families.jina_vlm.vision import vision_tower
from edge_vlm_export.families.settings_files import SETTINGS_FILES

if TYPE_CHECKING:
    from edge_vlm.families.base import Float32
    from edge_vlm_export.checkpoint.tensors import Checkpoint, Shape, Values
    from edge_vlm_export.families.llama_like import LlamaLike
    from edge_vlm_export.graph.architecture import Tower

# Special tokens of a picture's block, and the preprocessor's keys that repeat their ids.
_IDS = {
    "<im_start>": "start_token_id",
    "<im_end>": "end_token_id",
    "<im_patch>": "patch_token_id",
    "<im_col>": "column_token_id",
    IMAGE_PROMPT_TOKEN: None,
}
TEXT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_MARKERS = ("<im_start>", "<im_col>", "<im_end>")
_PACKAGE = Path(__file__).parents[2]


class JinaVLM(Family):
    """SigLIP2 with attention pooling, and Qwen3 with additional ids for parts of a picture."""

    name = "jina-vlm"
    summary = "SigLIP2, attention pooling, Qwen3"
    model_types = ("jvlm",)
    required_files = ("processor_config.json", "tokenizer.json")
    optional_files = (*SETTINGS_FILES, *NAMES)
    configs: ClassVar[Mapping[str, tuple[Path, ...]]] = {
        "jina-vlm": (_PACKAGE / "configs" / "jina-vlm",),
        # Shipped beside the other, or in a source checkout.
        "demo": (_PACKAGE / "configs" / "demo", _PACKAGE.parents[1] / "models/demo/checkpoint"),
    }

    def read_settings(self, folder: Path) -> JinaSettings:
        return read_settings(folder)

    def tower(self, settings: JinaSettings) -> Tower:
        return vision_tower(settings.vision, settings.image_processor)

    def decoder(self, settings: JinaSettings) -> LlamaLike:
        return decoder(settings.text)

    def unused(self, settings: JinaSettings) -> Mapping[str, Shape]:
        """The attention biases of the language model, which have to be zero."""
        return text_bias_shapes(settings.text)

    def check(self, settings: JinaSettings, tensors: Checkpoint) -> None:
        """The published code stores those biases."""
        for name in text_bias_shapes(settings.text):
            if name in tensors and tensors[name].read().any():
                raise CheckpointError(
                    f"{tensors[name].path}: tensor {name} is not zero; biases in the language"
                    " model's attention are not supported"
                )

    def read_tokenizer(self, folder: Path, settings: JinaSettings) -> Tokenizer:
        """Qwen's; the bos token or, when there is none, the eos token comes first."""
        tokenizer = read_byte_level(folder, settings.text.n_ids)
        for text, key in _IDS.items():
            token = tokenizer.id_of(text)
            if key is not None:
                because = f"the id of {text} in {tokenizer.path.name}"
                told = getattr(settings.preprocessor, key)
                check_same(settings.preprocessor_path, key, told, token, because)
        bos = named_token(folder, tokenizer.special, "bos_token", "eos_token")
        if bos is None:
            raise CheckpointError(
                f"{tokenizer.path}: neither {' nor '.join(NAMES)} names a bos_token or an eos_token"
            )
        return replace(tokenizer, bos=bos)

    def added_row(self, settings: JinaSettings, tokenizer: Tokenizer) -> tuple[str, int]:
        """The row of <im_patch>: the model adds the connector's vectors to it."""
        return "im_patch_embedding", tokenizer.special["<im_patch>"]

    def markers(self, settings: JinaSettings, tokenizer: Tokenizer, tensors: Checkpoint) -> Values:
        """The decoder's rows of <im_start>, <im_col> and <im_end>."""
        ids = [tokenizer.special[text] for text in _MARKERS]
        return decoder(settings.text).rows(tensors, ids)

    def is_blank(self, crop: Float32) -> bool:
        """A black crop's features are zeroed."""
        return not (crop != -1).any()

    def vision_sizes(self, settings: JinaSettings, precision: str) -> Vision:
        """Of the blocks that are used."""
        vision = settings.vision
        return Vision(
            precision=precision,
            n_layers=vision.n_used_layers,
            hidden_size=vision.hidden_size,
            output_size=vision.output_size,
            n_heads=vision.attention.n_heads,
            ffn_size=vision.ffn_size,
            feature_size=vision.feature_size,
            projector_size=vision.projector_size,
        )

    def tokens(self, settings: JinaSettings, tokenizer: Tokenizer) -> JinaTokens:
        """Ids around and inside a picture's block, and the others'."""
        special = tokenizer.special
        assert tokenizer.bos is not None  # noqa: S101 - read_tokenizer gave it one
        return JinaTokens(
            bos=tokenizer.bos,
            stop=settings.stop_ids,
            im_start=special["<im_start>"],
            im_end=special["<im_end>"],
            im_patch=special["<im_patch>"],
            im_col=special["<im_col>"],
            image=special[IMAGE_PROMPT_TOKEN],
            special=special,
        )

    def prompt(self, settings: JinaSettings, tokenizer: Tokenizer) -> JinaPrompt:
        """As the published processor renders it."""
        return JinaPrompt(
            always_start_with_space=settings.always_start_with_space,
            image_prompt_token=IMAGE_PROMPT_TOKEN,
            normalizer=tokenizer.normalizer,
        )

    def made_up_tokens(self, settings: JinaSettings) -> Mapping[str, int]:
        """Those of Qwen, as many as there is room for, and the released model's own behind them."""
        if settings.first_special is None:
            return {}
        return made_up_tokens(settings.text.vocab_size, settings.first_special)

    def spread(self, name: str, shape: Shape, settings: JinaSettings) -> Spread | None:
        """The language model's biases are zero."""
        return (0.0, 0.0) if name in text_bias_shapes(settings.text) else None


def made_up_tokens(vocab_size: int, first: int) -> dict[str, int]:
    """Control tokens from id ``first`` to ``vocab_size``, and the image tokens behind them.

    Raises:
        InputError: there is no room for the former.
    """
    texts = list(TEXT_TOKENS)
    n_extra = vocab_size - first - len(texts)
    if n_extra < 0:
        raise InputError(f"no tokenizer has {vocab_size} ids with {texts[0]} at {first}")
    texts += [f"|<EXTRA_TOKENS_{index}>|" for index in range(n_extra)]
    return {text: first + index for index, text in enumerate([*texts, *_IDS, "<im_slice>"])}


FAMILY = JinaVLM()
