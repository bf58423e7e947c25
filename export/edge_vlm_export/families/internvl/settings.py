"""Everything the settings files of a checkpoint say, together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from edge_vlm.bundle.json_text import first_problem, shorten
from edge_vlm.errors import CheckpointError
from edge_vlm.families.internvl.processor import InternImageProcessor
from edge_vlm_export.checkpoint.config_file import check_same, read_part
from edge_vlm_export.families.base import Settings
from edge_vlm_export.families.internvl.config import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    SHUFFLE,
    Config,
    Preprocessor,
    Processor,
)
from edge_vlm_export.families.internvl.vocabulary import added_ids
from edge_vlm_export.families.settings_files import (
    read_chat_template,
    read_images,
    read_stop_ids,
)

if TYPE_CHECKING:
    from edge_vlm_export.families.llama_like import TextSettings

IMAGE_TOKEN = "<IMG_CONTEXT>"
END_OF_TURN = "<|im_end|>"
# By the name in config.json: the system message of conversation.py. It reads: "You are InternVL,
# a multimodal large language model developed by Shanghai AI Laboratory, Tsinghua University and
# partners".
SYSTEM_MESSAGES = {
    "internvl2_5": (
        "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的"  # noqa: RUF001 - its comma
        "多模态大语言模型。"
    )
}
# As -hf folders have it, with a system turn in front where a conversation has none.
_CHAT_TEMPLATE = """\
{%- if not messages or messages[0]['role'] != 'system' %}<|im_start|>system
SYSTEM<|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ m['role'] }}
{% if m['content'] is string %}{{ m['content'] }}{% else %}
{%- for part in m['content'] %}{% if part['type'] == 'image' %}<IMG_CONTEXT>
{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@dataclass(frozen=True)
class InternSettings(Settings):
    """Everything the settings files of a checkpoint say."""

    image_processor: InternImageProcessor
    config: Config
    text: TextSettings


def read_settings(folder: Path) -> InternSettings:
    """See ``Family.read_settings``."""
    path = folder / "config.json"
    config = read_part(Config, path)
    images = _chat_images(config, path) if config.is_chat else _images(folder, config)
    tokens = images.tokens_per_crop
    check_same(path, "image_seq_length", config.image_seq_length, tokens, "image_size")
    text = config.text_config.settings()
    ties = [level.tie_word_embeddings for level in (config, config.text_config)]
    return InternSettings(
        image_processor=images,
        stop_ids=_stop_ids(folder, config, text),
        chat_template=_chat_template(folder, config),
        name=config.name,
        # Published levels contradict each other; a head that is in the file is used.
        tie_word_embeddings=(True, False) if True in ties else tuple(ties),
        config=config,
        text=text,
    )


def _images(folder: Path, config: Config) -> InternImageProcessor:
    """Of transformers' layout."""
    processor_path = folder / "processor_config.json"
    processor = read_part(Processor, processor_path) if processor_path.exists() else Processor()
    found, path = read_images(Preprocessor, folder)
    side = config.vision_config.image_size
    if (found.size.height, found.size.width) != (side, side):
        raise CheckpointError(
            f"{path}: size is {found.size.width}x{found.size.height}, which contradicts"
            f" vision_config.image_size in config.json: {side}"
        )
    images = _image_processor(
        config,
        path,
        crops=(found.min_patches, found.max_patches),
        use_thumbnail=True,
        levels=(found.image_mean, found.image_std),
    )
    told, used = processor.image_seq_length, images.tokens_per_crop
    check_same(processor_path, "image_seq_length", told, used, "image_size in config.json")
    return images


def _chat_images(config: Config, path: Path) -> InternImageProcessor:
    """Of the original layout, whose code has mean and deviation in it."""
    return _image_processor(
        config,
        path,
        crops=(config.min_dynamic_patch, config.max_dynamic_patch),
        use_thumbnail=config.use_thumbnail,
        levels=(IMAGENET_MEAN, IMAGENET_STD),
    )


def _image_processor(
    config: Config,
    where: Path,
    *,
    crops: tuple[int, int],
    use_thumbnail: bool,
    levels: tuple[tuple[float, float, float], tuple[float, float, float]],
) -> InternImageProcessor:
    try:
        return InternImageProcessor(
            patch_size=config.vision_config.patch_size,
            tile_size=config.vision_config.image_size,
            min_crops=crops[0],
            max_crops=crops[1],
            use_thumbnail=use_thumbnail,
            shuffle=SHUFFLE,
            image_mean=levels[0],
            image_std=levels[1],
        )
    except ValidationError as error:
        raise CheckpointError(f"{where}: {first_problem(error)}") from error


def _chat_template(folder: Path, config: Config) -> str:
    """The folder's; that of the original layout is code, which its name chooses."""
    if not config.is_chat:
        template = read_chat_template(folder)
        # An early converter wrote the name that the original code replaces.
        return template if IMAGE_TOKEN in template else template.replace("<image>", IMAGE_TOKEN)
    if config.template not in SYSTEM_MESSAGES:
        raise CheckpointError(
            f"{folder / 'config.json'}: template is {shorten(config.template)}, known is"
            f" {', '.join(SYSTEM_MESSAGES)}"
        )
    return _CHAT_TEMPLATE.replace("SYSTEM", SYSTEM_MESSAGES[config.template])


def _stop_ids(folder: Path, config: Config, text: TextSettings) -> tuple[int, ...]:
    """What ends an answer. The original code always stops at <|im_end|>, whatever files say."""
    if config.is_chat and END_OF_TURN in (added := added_ids(folder)):
        return (added[END_OF_TURN],)
    return read_stop_ids(folder, text.vocab_size, config, config.text_config)
