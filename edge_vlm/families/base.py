"""What a family of models supplies to the runtime, and which families are installed.

A family is a folder beside this file. Its settings are parts of a bundle's manifest; from them and
a picture's size follow crops and layout, and from the crops' embeddings the rows that stand for the
picture in the decoder's input. Nothing outside ``families/`` knows more about a model than this.

Another package adds a family with an entry point of the group ``edge_vlm.families`` whose name is
the family's and whose object is a ``Family``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from edge_vlm.errors import InputError
from edge_vlm.families.parts import Part, SpecialText, TokenId
from edge_vlm.plugins import load_plugin, plugins

if TYPE_CHECKING:
    from edge_vlm.families.sizes import Decoder, Vision, VisionWork

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
UInt8 = npt.NDArray[np.uint8]
Box = tuple[float, float, float, float]  # left, top, right, bottom; parts of the picture's sides
Axes = tuple["int | str", ...]  # of a graph's value; one of any length has a name


class ImageProcessor(Part, ABC):
    """How a picture becomes crops: a family's own settings, and what every family's tell."""

    family: ClassVar[str]
    # Whether a picture is one crop of any number of patches. Then what is told of a crop is that
    # of some square one, with which limits and measurements count, and a larger crop has vectors in
    # the same proportion.
    any_size: ClassVar[bool] = False

    @property
    @abstractmethod
    def crop_shape(self) -> tuple[int, int]:
        """Of one crop as the vision graph takes it: (n_patches, patch_values)."""

    @property
    @abstractmethod
    def tokens_per_crop(self) -> int:
        """Vectors the vision graph gives for one crop."""

    @property
    @abstractmethod
    def tile_hw(self) -> tuple[int, int]:
        """Pixels of one crop."""

    @property
    @abstractmethod
    def max_tiles(self) -> int:
        """Most crops of a picture besides its overview."""

    @property
    def description(self) -> str:
        """What is done with pictures, in a few words."""
        height, width = self.tile_hw
        return f"tiles of {width}x{height}, at most {self.max_tiles} and a thumbnail"

    @property
    def crop_axes(self) -> Axes:
        """``crop_shape`` as the graph declares it."""
        return ("n_patches", self.crop_shape[1]) if self.any_size else self.crop_shape

    @property
    def vector_axis(self) -> int | str:
        """``tokens_per_crop``, likewise."""
        return "n_tokens" if self.any_size else self.tokens_per_crop

    @property
    def least_crop(self) -> tuple[int, int]:
        """The shape of the smallest crop that the graph takes."""
        n_patches, values = self.crop_shape
        return (n_patches // self.tokens_per_crop if self.any_size else n_patches), values


class Tokens(Part):
    """Token ids with a meaning of their own; a family adds those that its pictures need.

    ``special`` lists every special token by its text: the template may place them, text that a
    user typed never becomes one.
    """

    bos: TokenId | None = None  # in front of every prompt
    stop: tuple[TokenId, ...] = Field(min_length=1, max_length=64)
    image: TokenId
    special: dict[SpecialText, TokenId] = Field(max_length=10_000)

    @property
    def unspoken(self) -> tuple[int, ...]:
        """Ids of the vocabulary that stand for parts of a picture, and in no answer."""
        return ()

    @property
    def all_ids(self) -> tuple[int, ...]:
        """Every id that is named here."""
        roles = [value for _, value in self if isinstance(value, int)]
        return (*roles, *self.stop, *self.special.values())


class Prompt(Part):
    """How a conversation is rendered with the chat template inside the GGUF."""

    # In front of the text that begins a prompt or stands behind a special token.
    text_prefix: ClassVar[str] = ""

    image_prompt_token: SpecialText
    normalizer: Literal["NFC"] | None

    def template_variables(self) -> dict[str, Any]:
        """What the template is given besides the messages."""
        return {}

    def content(self, role: str, parts: Sequence[dict[str, str]]) -> Any:
        """What the template is given as a message's content.

        Each of ``parts`` has a "type", "text" or "image", the former a "text" besides.
        """
        del role
        return parts


class SentencePiecePrompt(Prompt):
    """Of a tokenizer that puts a space in front of each text; the decoder's then puts none."""

    text_prefix: ClassVar[str] = " "


@dataclass(frozen=True)
class Layout:
    """What a picture's size alone decides; all sizes are (height, width) in pixels."""

    original_hw: tuple[int, int]
    resized_hw: tuple[int, int]  # what is seen of it, before it is cut
    tiling: tuple[int, int]  # rows, columns of the crop grid
    is_reduced: bool  # whether the model sees fewer pixels than the picture has
    n_crops: int  # to encode, the overview included
    n_tokens: int  # of the prompt, one a row
    overview_tokens: int  # of them, vectors of the picture as a whole
    tile_tokens: int  # of them, vectors of its tiles

    @property
    def used_hw(self) -> tuple[int, int]:
        """Of the picture, how many pixels reach the tower: what is lost in print shows here."""
        return self.resized_hw


@dataclass(frozen=True)
class Tiles:
    """The crops of one picture, ready for the vision graph."""

    plan: Layout
    crops: Float32  # (n_crops, n_patches, patch_values)

    @property
    def tokens_per_crop(self) -> int | None:
        """Vectors of each, where that is not what the image processor says."""
        return None

    @property
    def extras(self) -> Mapping[str, npt.NDArray[Any]]:
        """Other inputs of the graph: (n_crops,) each, or as ``Family.extra_axes`` says."""
        return {}

    @property
    def feed(self) -> dict[str, npt.NDArray[Any]]:
        """All inputs of the graph."""
        return {"crops": self.crops, **self.extras}


@dataclass(frozen=True)
class Released:
    """A released model's sizes, for planning without its weights."""

    processor: ImageProcessor
    vision: Vision
    decoder: Decoder


@dataclass(frozen=True)
class Figure:
    """One line of the table; ``runtime`` is what this program uses, None where it has no like."""

    name: str
    unit: str
    published: float
    computed: float
    runtime: float | None

    @property
    def deviation(self) -> float:
        """Of the computed from the published value, as a fraction."""
        return self.computed / self.published - 1


class Family(ABC):
    """One family; there is a single object of each."""

    name: ClassVar[str]
    processor: ClassVar[type[ImageProcessor]]
    tokens: ClassVar[type[Tokens]]
    prompt: ClassVar[type[Prompt]]
    # Rows of the decoder's input that no crop decides; the graph gives them as marker_embeddings.
    n_markers: ClassVar[int] = 0
    # Inputs of the graph besides crops, one value a crop unless ``extra_axes`` names others.
    extras: ClassVar[Mapping[str, type[np.generic]]] = {}
    # Standard operators of the graph besides those of ``bundle/onnx_files.py``.
    operators: ClassVar[frozenset[str]] = frozenset()
    extra_axes: ClassVar[Mapping[str, Axes]] = {}

    @abstractmethod
    def layout(self, width: int, height: int, processor: Any) -> Layout:
        """Plan a picture of ``width`` x ``height`` pixels.

        Raises:
            ImageError: the family takes no picture of this shape.
        """

    @abstractmethod
    def cut(self, pixels: UInt8, processor: Any) -> Tiles:
        """Resize and cut a picture (height, width, 3).

        Raises:
            ImageError: as ``layout``.
        """

    @abstractmethod
    def rows(self, embeddings: Float32, markers: Float32, plan: Any, processor: Any) -> Float32:
        """The decoder's input for a picture's whole block, in order.

        Args:
            embeddings: (n_crops, tokens_per_crop, hidden_size).
            markers: (n_markers, hidden_size).
            plan: the picture's layout.
            processor: what it was planned with.

        Returns:
            (n_tokens, hidden_size) float32.
        """

    @abstractmethod
    def block(self, plan: Any, processor: Any, tokens: Any) -> Int32:
        """The ids that stand for those rows in the published implementation: (n_tokens,)."""

    def positions(self, plan: Any, processor: Any) -> Int32 | None:
        """Where a picture's rows stand for a decoder with M-RoPE, counted from the block's start.

        What follows stands behind the largest of these numbers. The temporal ones never fall; rows
        that share one are forgotten together.

        Returns:
            (n_tokens, 3): temporal, height and width; None where each row has the next position.
        """
        del plan, processor
        return None

    @abstractmethod
    def limited(self, processor: Any, max_tiles: int) -> Any:
        """The same image processor with at most ``max_tiles`` crops besides the overview."""

    def beside(self, processor: Any, n_pictures: int) -> Any:
        """The image processor for a conversation of ``n_pictures`` pictures.

        One that differs from that of fewer pictures changes the blocks of those already there.
        """
        del n_pictures
        return processor

    @abstractmethod
    def largest(self, processor: Any) -> Sequence[tuple[int, int]]:
        """Sizes of pictures, (width, height), one of which costs as much as any can.

        The picture with the most tokens is among them.
        """

    @abstractmethod
    def boxes(self, plan: Any, processor: Any) -> Iterator[tuple[Box, Box, int]]:
        """Each tile in reading order: its extent, the part whose vectors are used, their number.

        The used parts cover the picture without overlap.
        """

    @abstractmethod
    def work(self, processor: Any, vision: Vision) -> VisionWork:
        """What one crop costs in the vision graph."""

    def picture_work(self, plan: Any, processor: Any, vision: Vision) -> VisionWork:
        """What each crop of this picture does, which differs where it may have any size."""
        del plan
        return self.work(processor, vision)

    @abstractmethod
    def released(self) -> Mapping[str, Released]:
        """Released models by name, in float16 or as published."""

    def published(self) -> Sequence[Figure]:
        """The efficiency table of the family's paper, computed again; empty if it has none."""
        return ()

    def inputs(self, crops: Float32, processor: Any) -> dict[str, npt.NDArray[Any]]:
        """Inputs of the graph for crops that are no picture's, to measure with."""
        del processor
        zeros = {name: np.zeros(len(crops), kind) for name, kind in self.extras.items()}
        return {"crops": crops, **zeros}


GROUP = "edge_vlm.families"
DEFAULT = "jina-vlm"  # of bundles that were made when there was no other
_BUILT_IN = {
    "jina-vlm": "edge_vlm.families.jina_vlm.family",
    "llava-1.5": "edge_vlm.families.llava.llava_15",
    "llava-next": "edge_vlm.families.llava.llava_next",
    "internvl": "edge_vlm.families.internvl.family",
    "llava-onevision": "edge_vlm.families.llava_onevision.family",
    "pixtral": "edge_vlm.families.pixtral.family",
    "qwen2.5-vl": "edge_vlm.families.qwen2_5_vl.family",
}


def family_names() -> list[str]:
    """Names that ``find_family`` knows."""
    return sorted({*_BUILT_IN, *plugins(GROUP)})


@cache
def find_family(name: str) -> Family:
    """The family of that name.

    Raises:
        InputError: there is none; the message lists those there are.
    """
    if name in _BUILT_IN:
        found: Family = import_module(_BUILT_IN[name]).FAMILY
        return found
    if name in plugins(GROUP):
        added: Family = load_plugin(plugins(GROUP)[name])
        return added
    raise InputError(f"family {name[:100]!r} is none of {', '.join(family_names())}")


def family_of(processor: ImageProcessor) -> Family:
    """The family whose image processor this is."""
    return find_family(processor.family)
