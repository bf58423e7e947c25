"""What ``preprocessor_config.json`` and ``processor_config.json`` say.

Source: the image processors of CLIP and LLaVA-NeXT in transformers, for what absent keys mean.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BeforeValidator, Field, Strict, ValidationError

from edge_vlm.bundle.json_text import first_problem
from edge_vlm.errors import CheckpointError
from edge_vlm.families.llava_like import CLIP_MEAN, CLIP_STD, PatchProcessor
from edge_vlm_export.checkpoint.config_file import (
    On,
    Size,
    check_same,
    read_part,
)
from edge_vlm_export.checkpoint.known_keys import Keys, Known
from edge_vlm_export.families.settings_files import IMAGE_KEYS, PROCESSOR_KEYS

if TYPE_CHECKING:
    from edge_vlm_export.families.llava.settings import ClipLlamaConfig

Three = Annotated[tuple[float, float, float], Strict(False)]  # an array is no tuple otherwise


class Shortest(Known):
    """Pixels of the shorter side."""

    shortest_edge: Size


class Square(Known):
    """Pixels of a crop."""

    height: Size
    width: Size


def _named(value: Any, *names: str) -> Any:
    """Older files have one number."""
    return dict.fromkeys(names, value) if isinstance(value, int) else value


class Preprocessor(Known):
    """``preprocessor_config.json``; what is absent is the class's default."""

    harmless: ClassVar[Keys] = IMAGE_KEYS

    size: Annotated[Shortest, BeforeValidator(lambda value: _named(value, "shortest_edge"))] = (
        Shortest(shortest_edge=336)
    )
    crop_size: Annotated[
        Square, BeforeValidator(lambda value: _named(value, "height", "width"))
    ] = Square(height=336, width=336)
    image_mean: Three = CLIP_MEAN
    image_std: Three = CLIP_STD
    resample: Literal[3] = 3  # bicubic
    rescale_factor: Annotated[float, Field(ge=0.00392156, le=0.00392157)] = 1 / 255
    do_resize: On = True
    do_center_crop: On = True
    do_rescale: On = True
    do_normalize: On = True
    do_convert_rgb: On = True


class Processor(Known):
    """``processor_config.json``; newer checkpoints have the image processor in it."""

    harmless: ClassVar[Keys] = PROCESSOR_KEYS

    image_token: Annotated[str, Field(min_length=1, max_length=200)] = "<image>"
    patch_size: Size | None = None
    num_additional_image_tokens: Literal[1] = 1  # of the class token
    vision_feature_select_strategy: Literal["default"] = "default"


_Images = TypeVar("_Images", bound=PatchProcessor)


def read_processor(folder: Path, config: ClipLlamaConfig) -> Processor:
    """What surrounds the image processor.

    Raises:
        CheckpointError: malformed, not supported, or another patch size than the tower's.
    """
    path = folder / "processor_config.json"
    processor = read_part(Processor, path) if path.exists() else Processor()
    patch = config.vision_config.patch_size
    check_same(path, "patch_size", processor.patch_size, patch, "vision_config.patch_size")
    return processor


def images_of(
    kind: type[_Images],
    config: ClipLlamaConfig,
    preprocessor: Preprocessor,
    where: Path,
    **more: Any,
) -> _Images:
    """The runtime's image processor; ``more`` are fields of its own.

    Raises:
        CheckpointError: the crops are not those of the tower, or a value is out of range.
    """
    side, crop = config.vision_config.image_size, preprocessor.crop_size
    because = "vision_config.image_size in config.json"
    check_same(where, "size.shortest_edge", preprocessor.size.shortest_edge, side, because)
    check_same(where, "crop_size.height", crop.height, side, because)
    check_same(where, "crop_size.width", crop.width, side, because)
    try:
        return kind(
            patch_size=config.vision_config.patch_size,
            tile_size=side,
            image_mean=preprocessor.image_mean,
            image_std=preprocessor.image_std,
            **more,
        )
    except ValidationError as error:
        raise CheckpointError(f"{where}: {first_problem(error)}") from error
