"""What a bundle is: a folder with ``bundle.json`` and the files it lists.

Everything in a bundle is data of unknown origin. The manifest is bounded in size, parsed strictly
and validated before a file it names is opened; names are plain file names, so no path leaves the
folder; files are compared with their recorded size and SHA-256 (see ``checksums.py``) before
onnxruntime or llama.cpp sees them.
"""

from __future__ import annotations

import os
import re
import stat
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    ValidationError,
    create_model,
    model_serializer,
    model_validator,
)

from edge_vlm.bundle.json_text import first_problem, parse_json, read_bounded
from edge_vlm.bundle.report import Report
from edge_vlm.errors import BundleError, InputError, label, why
from edge_vlm.families.base import DEFAULT, Family, ImageProcessor, Prompt, Tokens, find_family
from edge_vlm.families.parts import Part, Printable
from edge_vlm.families.sizes import Decoder, Vision
from edge_vlm.machine.folders import WINDOWS_DEVICE

FORMAT_VERSION = 3  # 3 names its family, 2 has a report; jina-vlm's earlier ones are still read
MANIFEST_NAME = "bundle.json"
VISION_NAME = "vision.onnx"
DECODER_NAME = "decoder.gguf"
MAX_MANIFEST_BYTES = 4 << 20  # the released model's manifest is about 20 kB

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")


class ModelIdentity(Part):
    """Which model this is and under which licence its weights are used."""

    name: Printable = Field(min_length=1, max_length=200)
    license: Printable = Field(max_length=200)
    source: Printable = Field(max_length=1000)
    revision: Printable | None = Field(default=None, max_length=200)


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
    """The content of ``bundle.json``; three parts have the types of its family."""

    format_version: Annotated[int, Field(ge=1, le=FORMAT_VERSION)]
    family: Printable = Field(default=DEFAULT, min_length=1, max_length=100)
    model: ModelIdentity
    image_processor: SerializeAsAny[ImageProcessor]
    vision: Vision
    decoder: Decoder
    tokens: SerializeAsAny[Tokens]
    prompt: SerializeAsAny[Prompt]
    files: dict[FileName, FileRecord] = Field(max_length=64)
    created_with: dict[Printable, Printable] = Field(max_length=64)
    report: Report | None = None

    @model_serializer(mode="wrap")
    def _as_in_its_format(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = handler(self)
        if self.report is None:
            del data["report"]
        if self.format_version < 3:
            del data["family"]
        return data

    @model_validator(mode="after")
    def _parts_agree(self) -> Manifest:
        for name in (VISION_NAME, DECODER_NAME):
            if name not in self.files:
                raise ValueError(f"files does not list {name}")
        if self.report is not None and self.format_version < 2:
            raise ValueError("report: needs format_version 2")
        if self.family != DEFAULT and self.format_version < 3:
            raise ValueError("family: needs format_version 3")
        if self.vision.output_size != self.decoder.hidden_size:
            raise ValueError("vision.output_size differs from decoder.hidden_size")
        n_ids = self.decoder.vocab_size + self.decoder.additional_vocab_size
        for token in self.tokens.all_ids:
            if token >= n_ids:
                raise ValueError(f"token id {token} is outside the vocabulary of {n_ids}")
        if self.prompt.image_prompt_token not in self.tokens.special:
            raise ValueError("tokens.special lacks the image_prompt_token")
        return self

    def to_json(self) -> str:
        """The text of ``bundle.json``."""
        return self.model_dump_json(indent=2) + "\n"


@cache
def manifest_type(family: Family) -> type[Manifest]:
    """The manifest of a family's bundles."""
    parts: dict[str, Any] = {
        "image_processor": (family.processor, ...),
        "tokens": (family.tokens, ...),
        "prompt": (family.prompt, ...),
    }
    return create_model("Manifest", __base__=Manifest, **parts)


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

    @property
    def decoder_file(self) -> Path:
        """Path of ``decoder.gguf``, see ``file``."""
        return self.file(DECODER_NAME)

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
            raise BundleError(f"{label(path)}: {why(error)}") from error
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
    data = parse_json(text, where, BundleError)
    version = data.get("format_version") if isinstance(data, dict) else None
    if type(version) is int and version > FORMAT_VERSION:
        raise BundleError(
            f"{where}: has format version {version}, this edge-vlm reads up to {FORMAT_VERSION};"
            " upgrade edge-vlm"
        )
    name = data.get("family", DEFAULT) if isinstance(data, dict) else DEFAULT
    try:
        family = find_family(name if isinstance(name, str) else repr(name))
    except InputError as error:
        raise BundleError(
            f"{where}: {error}; upgrade edge-vlm, or install the package that adds it"
        ) from error
    try:
        # From JSON text, so that strict mode takes arrays for tuples.
        return manifest_type(family).model_validate_json(text)
    except ValidationError as error:
        raise BundleError(f"{where}: {first_problem(error)}") from error


def _read_manifest(folder: Path) -> bytes:
    path = folder / MANIFEST_NAME
    try:
        if not folder.is_dir():
            raise BundleError(f"{label(folder)}: no such bundle folder")
        if not path.is_file():
            raise BundleError(f"{label(folder)}: is not a bundle, it has no {MANIFEST_NAME}")
    except (OSError, ValueError) as error:
        raise BundleError(f"{label(path)}: {why(error)}") from error
    return read_bounded(path, MAX_MANIFEST_BYTES, BundleError)
