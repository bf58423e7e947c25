"""InternVL for the exporter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from edge_vlm.families.base import Prompt
from edge_vlm.families.internvl.processor import InternTokens
from edge_vlm.families.sizes import Vision
from edge_vlm_export.checkpoint.config_file import check_same
from edge_vlm_export.checkpoint.tokenizer import (
    NAMES,
    TOKENIZER_NAME,
    Tokenizer,
    read_byte_level,
)
from edge_vlm_export.families.base import Family, Spread
from edge_vlm_export.families.internvl.language import TEXT, decoder
from edge_vlm_export.families.internvl.sentencepiece import MODEL_NAME, read_file, read_model
from edge_vlm_export.families.internvl.settings import (
    IMAGE_TOKEN,
    InternSettings,
    read_settings,
)
from edge_vlm_export.families.internvl.vision import vision_tower
from edge_vlm_export.families.internvl.vocabulary import (
    ADDED,
    MERGES,
    VOCABULARY,
    added_tokens,
    read_qwen2_files,
)
from edge_vlm_export.families.settings_files import SETTINGS_FILES

if TYPE_CHECKING:
    from edge_vlm_export.checkpoint.tensors import Checkpoint, Shape, Values
    from edge_vlm_export.families.llama_like import LlamaLike
    from edge_vlm_export.graph.architecture import Tower

START, END = "<img>", "</img>"
_HEADS = ("lm_head.weight", "output.weight")
_SCALES = ("lambda_1", "lambda_2", "ls1", "ls2")
# Behind Qwen2's vocabulary, in order.
ADDED_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    *("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
    *(START, END, IMAGE_TOKEN, "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"),
)
_CONFIGS = Path(__file__).parents[2] / "configs"


class InternVL(Family):
    """InternViT, an MLP, and Qwen2 or InternLM2."""

    name = "internvl"
    summary = "InternViT, an MLP, Qwen2 or InternLM2"
    model_types = ("internvl", "internvl_chat")
    required_files = ()  # the layouts have different ones
    optional_files = (
        "processor_config.json",
        *SETTINGS_FILES,
        TOKENIZER_NAME,
        VOCABULARY,
        MERGES,
        ADDED,
        MODEL_NAME,
        *NAMES,
    )
    configs: ClassVar[Mapping[str, tuple[Path, ...]]] = {
        "internvl2.5-1b": (_CONFIGS / "internvl2.5-1b",)
    }

    def read_settings(self, folder: Path) -> InternSettings:
        return read_settings(folder)

    def rename(self, stored: str) -> str | None:
        """transformers has three spellings: released, in memory since 4.52, saved by 5.5."""
        name = stored.removeprefix("model.")
        if name in _HEADS:
            return TEXT + name
        if name.endswith("rotary_emb.inv_freq"):
            return None
        if name.startswith(TEXT):
            return TEXT + name.removeprefix(TEXT).removeprefix("model.")
        return name

    def tower(self, settings: InternSettings) -> Tower:
        return vision_tower(settings.config, settings.image_processor)

    def decoder(self, settings: InternSettings) -> LlamaLike:
        return decoder(settings)

    def markers(
        self, settings: InternSettings, tokenizer: Tokenizer, tensors: Checkpoint
    ) -> Values:
        """The decoder's rows of <img> and </img>."""
        ids = [tokenizer.id_of(text) for text in (START, END)]
        return decoder(settings).rows(tensors, ids)

    def read_tokenizer(self, folder: Path, settings: InternSettings) -> Tokenizer:
        """Qwen2's or InternLM2's, from whichever files a folder has."""
        n_ids, is_qwen = settings.text.n_ids, settings.config.text_config.model_type == "qwen2"
        if (folder / TOKENIZER_NAME).exists() or not settings.config.is_chat:
            tokenizer = (read_byte_level if is_qwen else read_file)(folder, n_ids)
        elif is_qwen:
            tokenizer = read_qwen2_files(folder, n_ids)
        else:
            tokenizer = read_model(folder, n_ids, added_tokens(folder))
        for text in (START, END):
            tokenizer.id_of(text)
        told, because = settings.config.image_token_id, f"the id of {IMAGE_TOKEN}"
        used = tokenizer.id_of(IMAGE_TOKEN)
        check_same(folder / "config.json", "image_token_id", told, used, because)
        return tokenizer

    def vision_sizes(self, settings: InternSettings, precision: str) -> Vision:
        """Of the blocks that are used."""
        config, width = settings.config, settings.text.hidden_size
        vision = config.vision_config
        return Vision(
            precision=precision,
            n_layers=config.used_layers,
            hidden_size=vision.hidden_size,
            output_size=width,
            n_heads=vision.num_attention_heads,
            ffn_size=vision.intermediate_size,
            feature_size=settings.image_processor.shuffle**2 * vision.hidden_size,
            projector_size=width,
        )

    def tokens(self, settings: InternSettings, tokenizer: Tokenizer) -> InternTokens:
        """Ids of a picture's block, and the others'."""
        special = tokenizer.special
        return InternTokens(
            bos=tokenizer.bos,
            stop=settings.stop_ids,
            image=special[IMAGE_TOKEN],
            start=special[START],
            end=special[END],
            special=special,
        )

    def prompt(self, settings: InternSettings, tokenizer: Tokenizer) -> Prompt:
        """As the template renders it."""
        return Prompt(image_prompt_token=IMAGE_TOKEN, normalizer=tokenizer.normalizer)

    def made_up_tokens(self, settings: InternSettings) -> Mapping[str, int]:
        """The last of Qwen2's ids."""
        if settings.config.text_config.model_type != "qwen2":
            return {}
        first = settings.text.n_ids - len(ADDED_TOKENS)
        return {text: first + index for index, text in enumerate(ADDED_TOKENS)}

    def spread(self, name: str, shape: Shape, settings: InternSettings) -> Spread | None:
        """A LayerScale is a factor."""
        return (1.0, 0.1) if name.endswith(_SCALES) else None


FAMILY = InternVL()
