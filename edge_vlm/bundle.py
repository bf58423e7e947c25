"""What a bundle is: a folder with ``bundle.json`` and the files it lists.

Everything in a bundle is data of unknown origin. The manifest is bounded in size, parsed strictly
and validated before a file it names is opened; names are plain file names, so no path leaves the
folder; files are compared with their recorded size and SHA-256 (see ``verify.py``) before
onnxruntime or llama.cpp sees them.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from edge_vlm.errors import BundleError
from edge_vlm.folders import WINDOWS_DEVICE, label
from edge_vlm.report import Report
from edge_vlm.strict import Part, Printable

FORMAT_VERSION = 2  # 2 has a report; 1, which older releases read too, has none
MANIFEST_NAME = "bundle.json"
VISION_NAME = "vision.onnx"
DECODER_NAME = "decoder.gguf"
MAX_MANIFEST_BYTES = 4 << 20  # the released model's manifest is about 20 kB

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")

Count = Annotated[int, Field(ge=1, le=1 << 20)]
Margin = Annotated[int, Field(ge=0, le=1 << 10)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 24)]
Pair = tuple[Count, Count]


class ModelIdentity(Part):
    """Which model this is and under which licence its weights are used."""

    name: Printable = Field(min_length=1, max_length=200)
    license: Printable = Field(max_length=200)
    source: Printable = Field(max_length=1000)
    revision: Printable | None = Field(default=None, max_length=200)


class ImageProcessor(Part):
    """How a picture becomes crops; sizes in pixels, margins in patches, (height, width)."""

    patch_size: Count
    n_channels: Literal[3] = 3
    base_input_size: Pair
    overlap_margins: tuple[Margin, Margin]
    max_crops: Annotated[int, Field(ge=1, le=1024)]
    min_pixels: Annotated[int, Field(ge=1, le=1 << 28)]
    max_pixels: Annotated[int, Field(ge=1, le=1 << 28)]
    pooling_h: Annotated[int, Field(ge=1, le=64)]
    pooling_w: Annotated[int, Field(ge=1, le=64)]
    token_length_h: Count
    token_length_w: Count
    use_column_tokens: bool

    @property
    def patches_hw(self) -> tuple[int, int]:
        """Rows and columns of patches in one crop."""
        height, width = self.base_input_size
        return height // self.patch_size, width // self.patch_size

    @property
    def n_patches(self) -> int:
        """Patches in one crop."""
        rows, columns = self.patches_hw
        return rows * columns

    @property
    def patch_values(self) -> int:
        """Values in one flattened patch: patch_size x patch_size x channels."""
        return self.patch_size**2 * self.n_channels

    @property
    def tokens_per_crop(self) -> int:
        """Vectors the connector gives for one crop."""
        return self.token_length_h * self.token_length_w

    @model_validator(mode="after")
    def _geometry_is_consistent(self) -> ImageProcessor:
        if any(side % self.patch_size for side in self.base_input_size):
            raise ValueError("base_input_size is not a multiple of patch_size")
        pooled = (
            math.ceil(self.patches_hw[0] / self.pooling_h),
            math.ceil(self.patches_hw[1] / self.pooling_w),
        )
        if pooled != (self.token_length_h, self.token_length_w):
            raise ValueError(
                f"token_length {self.token_length_h}x{self.token_length_w} contradicts"
                f" patches and pooling, which give {pooled[0]}x{pooled[1]}"
            )
        if any(sum(self.overlap_margins) >= n for n in self.patches_hw):
            raise ValueError("overlap_margins leave no window in a crop")
        if self.min_pixels > self.max_pixels:
            raise ValueError("min_pixels is larger than max_pixels")
        if self.n_patches * self.patch_values > 1 << 26:
            raise ValueError("a crop is larger than 64 million values")
        return self


class Vision(Part):
    """The vision tower and connector in ``vision.onnx``.

    ``n_heads``, ``ffn_size``, ``feature_size`` (values of a patch that the connector sees) and
    ``projector_size`` serve the planner alone; early bundles lack them.
    """

    precision: Printable = Field(min_length=1, max_length=40)
    n_layers: Count
    hidden_size: Count
    output_size: Count
    n_heads: Count | None = None
    ffn_size: Count | None = None
    feature_size: Count | None = None
    projector_size: Count | None = None


class Decoder(Part):
    """The language model in ``decoder.gguf``."""

    precision: Printable = Field(min_length=1, max_length=40)
    n_layers: Count
    hidden_size: Count
    ffn_size: Count
    n_heads: Count
    n_kv_heads: Count
    head_dim: Count
    vocab_size: TokenId
    additional_vocab_size: TokenId
    max_sequence_length: Annotated[int, Field(ge=1, le=1 << 24)]
    tied_head: bool

    def kv_bytes_per_token(self, bytes_per_element: float = 2.0) -> int:
        """Bytes one position takes in the KV cache: K and V of every layer."""
        elements = 2 * self.n_layers * self.n_kv_heads * self.head_dim
        return math.ceil(elements * bytes_per_element)


class Tokens(Part):
    """Token ids with a meaning of their own.

    ``special`` lists every special token by its text: the template may place them, text that a
    user typed never becomes one.
    """

    bos: TokenId
    stop: tuple[TokenId, ...] = Field(min_length=1, max_length=64)
    im_start: TokenId
    im_end: TokenId
    im_patch: TokenId
    im_col: TokenId
    image: TokenId
    special: dict[Annotated[str, Field(min_length=1, max_length=200)], TokenId] = Field(
        max_length=10_000
    )


class Prompt(Part):
    """How a conversation is rendered with the chat template inside the GGUF."""

    always_start_with_space: bool
    image_prompt_token: str = Field(min_length=1, max_length=200)
    normalizer: Literal["NFC"] | None


class FileRecord(Part):
    """Size in bytes and SHA-256 (lower-case hex) of one file."""

    size: Annotated[int, Field(ge=0, le=1 << 44)]
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


def _plain_name(name: str) -> str:
    if not _FILE_NAME.fullmatch(name) or len(name) > 100 or WINDOWS_DEVICE.match(name):
        raise ValueError("is not a plain file name")
    return name


FileName = Annotated[str, AfterValidator(_plain_name)]


class Manifest(Part):
    """The content of ``bundle.json``."""

    format_version: Annotated[int, Field(ge=1, le=FORMAT_VERSION)]
    model: ModelIdentity
    image_processor: ImageProcessor
    vision: Vision
    decoder: Decoder
    tokens: Tokens
    prompt: Prompt
    files: dict[FileName, FileRecord] = Field(max_length=64)
    created_with: dict[Printable, Printable] = Field(max_length=64)
    report: Report | None = None

    @model_serializer(mode="wrap")
    def _without_empty_report(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = handler(self)
        if self.report is None:
            del data["report"]
        return data

    @model_validator(mode="after")
    def _parts_agree(self) -> Manifest:
        for name in (VISION_NAME, DECODER_NAME):
            if name not in self.files:
                raise ValueError(f"files does not list {name}")
        if self.report is not None and self.format_version < 2:
            raise ValueError("report: needs format_version 2")
        if self.vision.output_size != self.decoder.hidden_size:
            raise ValueError("vision.output_size differs from decoder.hidden_size")
        n_ids = self.decoder.vocab_size + self.decoder.additional_vocab_size
        tokens = self.tokens
        roles = (tokens.bos, tokens.im_start, tokens.im_end, tokens.im_patch, tokens.im_col)
        for token in (*roles, tokens.image, *tokens.stop, *tokens.special.values()):
            if token >= n_ids:
                raise ValueError(f"token id {token} is outside the vocabulary of {n_ids}")
        if self.prompt.image_prompt_token not in tokens.special:
            raise ValueError("tokens.special lacks the image_prompt_token")
        return self

    def to_json(self) -> str:
        """The text of ``bundle.json``."""
        return self.model_dump_json(indent=2) + "\n"


class Bundle:
    """A bundle's folder with its validated manifest; no file of it was opened yet."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Read and validate the manifest, and check that every listed file is there.

        Raises:
            BundleError: the folder, the manifest or a file is missing, malformed, of a newer
                format, of another size, or a link that leaves the folder.
        """
        folder = Path(path)
        text = _read_manifest(folder)
        bundle = cls(folder, parse_manifest(text, label(folder / MANIFEST_NAME)))
        for name in bundle.manifest.files:
            bundle.file(name)
        return bundle

    @property
    def name(self) -> str:
        """The model's name."""
        return self.manifest.model.name

    def file(self, name: str) -> Path:
        """Path of a listed file, after checking that it is a regular file of the recorded size.

        Raises:
            BundleError: it is not.
        """
        path = self.path / name
        record = self.manifest.files[name]
        try:
            inside = path.resolve(strict=True).is_relative_to(self.path.resolve(strict=True))
            info = path.stat()
        except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError until 3.13
            raise BundleError(f"{label(path)}: {_reason(error)}") from error
        if not inside:
            raise BundleError(f"{label(path)}: is a link that leads out of the bundle")
        if not stat.S_ISREG(info.st_mode):
            raise BundleError(f"{label(path)}: is not a regular file")
        if info.st_size != record.size:
            raise BundleError(
                f"{label(path)}: has {info.st_size} bytes, the manifest says {record.size};"
                " copy or export the bundle again"
            )
        return path


def parse_manifest(text: bytes, where: str | Path) -> Manifest:
    """Validate the bytes of a ``bundle.json``; ``where`` names it in errors.

    Raises:
        BundleError: not JSON, a newer format version, or a field that is missing or invalid.
    """
    try:
        data: Any = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where}: is not valid JSON ({error})") from error
    version = data.get("format_version") if isinstance(data, dict) else None
    if type(version) is int and version > FORMAT_VERSION:
        raise BundleError(
            f"{where}: has format version {version}, this edge-vlm reads up to {FORMAT_VERSION};"
            " upgrade edge-vlm"
        )
    try:
        # From JSON text, so that strict mode takes arrays for tuples.
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        field = field[:100] if field.isprintable() else repr(field[:100])
        message = " ".join(first["msg"].removeprefix("Value error, ").split())[:500]
        raise BundleError(f"{where}: {field + ': ' if field else ''}{message}") from error


def _read_manifest(folder: Path) -> bytes:
    path = folder / MANIFEST_NAME
    try:
        if not folder.is_dir():
            raise BundleError(f"{label(folder)}: no such bundle folder")
        if not path.is_file():
            raise BundleError(f"{label(folder)}: is not a bundle, it has no {MANIFEST_NAME}")
        with path.open("rb") as file:
            text = file.read(MAX_MANIFEST_BYTES + 1)
    except (OSError, ValueError) as error:
        raise BundleError(f"{label(path)}: {_reason(error)}") from error
    if len(text) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{label(path)}: is larger than {MAX_MANIFEST_BYTES >> 20} MiB")
    return text


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("a key appears twice")
    return data


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
