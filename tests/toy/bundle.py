"""The toy model as a bundle's folder; its decoder is a file that no llama.cpp would load."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from edge_vlm.bundle.manifest import (
    DECODER_NAME,
    FORMAT_VERSION,
    MANIFEST_NAME,
    VISION_NAME,
    FileRecord,
    Manifest,
    ModelIdentity,
    manifest_type,
)
from edge_vlm.families.jina_vlm.family import FAMILY
from tests.toy import sizes

if TYPE_CHECKING:
    from edge_vlm.families.base import Family

VISION_FILE = Path(__file__).parent / "vision.onnx"
DECODER_BYTES = b"a toy model's decoder is written in Python, see tests/fake_engine.py\n" * 64


def toy_manifest(files: dict[str, bytes], family: Family = FAMILY) -> Manifest:
    """For the files' contents."""
    return manifest_type(family)(
        format_version=FORMAT_VERSION,
        family=family.name,
        model=ModelIdentity(name="toy", license="Apache-2.0", source="tests/toy"),
        image_processor=family.processor(**sizes.PROCESSOR.model_dump()),
        vision=sizes.VISION,
        decoder=sizes.DECODER,
        tokens=sizes.TOKENS,
        prompt=sizes.PROMPT,
        files={
            name: FileRecord(size=len(data), sha256=hashlib.sha256(data).hexdigest())
            for name, data in files.items()
        },
        created_with={},
    )


def write_toy_bundle(folder: Path, family: Family = FAMILY) -> Path:
    """A new bundle in ``folder``, which is returned."""
    files = {VISION_NAME: VISION_FILE.read_bytes(), DECODER_NAME: DECODER_BYTES}
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / MANIFEST_NAME).write_text(toy_manifest(files, family).to_json(), encoding="utf-8")
    return folder
