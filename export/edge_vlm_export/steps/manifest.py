"""``bundle.json``: identity, geometry, tokens and file hashes of a bundle."""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

from edge_vlm.bundle.manifest import (
    FORMAT_VERSION,
    FileRecord,
    Manifest,
    ModelIdentity,
    manifest_type,
)
from edge_vlm.bundle.report import Report
from edge_vlm.errors import CheckpointError
from edge_vlm.families.jina_vlm.family import FAMILY
from edge_vlm.families.jina_vlm.processor import JinaPrompt, JinaTokens
from edge_vlm.families.sizes import Decoder, Vision
from edge_vlm_export.checkpoint.json_file import read_text
from edge_vlm_export.checkpoint.tokenizer import Tokenizer
from edge_vlm_export.families.jina_vlm.config import IMAGE_PROMPT_TOKEN, Settings

UNKNOWN_LICENSE = "unknown"
WRITERS = ("edge-vlm", "gguf", "llama-cpp-python", "numpy", "onnx")
MAX_README_BYTES = 4 << 20
HASH_BLOCK = 4 << 20


def model_identity(folder: Path, settings: Settings, name: str | None) -> ModelIdentity:
    """Name, licence and origin of the model.

    The name is the given one, else a hub name found in the path of a hub cache
    (``models--owner--model/snapshots/revision``) or in ``config.json``, else the folder's name.
    The licence is the one that the front matter of ``README.md`` declares, else the first line of a
    ``LICENSE`` file, else "unknown": it is never guessed from the name.

    Raises:
        CheckpointError: ``README.md`` or the licence file cannot be read as text.
    """
    cached = re.search(
        r"models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})$", folder.absolute().as_posix()
    )
    origin = f"{cached[1]}/{cached[2]}" if cached else settings.name or folder.resolve().name
    return ModelIdentity(
        name=name or origin[:200] or "model",
        license=_license(folder)[:200],
        source=origin[:1000],
        revision=cached[3] if cached else None,
    )


def build_manifest(
    settings: Settings,
    tokenizer: Tokenizer,
    identity: ModelIdentity,
    files: dict[str, FileRecord],
    *,
    vision: str,
    decoder: str,
    tied: bool,
    report: Report | None,
) -> Manifest:
    """The manifest of a bundle; ``vision`` and ``decoder`` name the precisions."""
    text = settings.text
    return manifest_type(FAMILY)(
        format_version=FORMAT_VERSION,
        family=FAMILY.name,
        model=identity,
        image_processor=settings.image_processor,
        vision=Vision(
            precision=vision,
            n_layers=settings.vision.n_used_layers,
            hidden_size=settings.vision.hidden_size,
            output_size=settings.vision.output_size,
            n_heads=settings.vision.attention.n_heads,
            ffn_size=settings.vision.ffn_size,
            feature_size=settings.vision.feature_size,
            projector_size=settings.vision.projector_size,
        ),
        decoder=Decoder(
            precision=decoder,
            n_layers=text.n_layers,
            hidden_size=text.hidden_size,
            ffn_size=text.ffn_size,
            n_heads=text.attention.n_heads,
            n_kv_heads=text.attention.n_kv_heads,
            head_dim=text.attention.head_dim,
            vocab_size=text.vocab_size,
            additional_vocab_size=text.additional_vocab_size,
            max_sequence_length=text.max_sequence_length,
            tied_head=tied,
        ),
        tokens=JinaTokens(
            bos=tokenizer.bos,
            stop=settings.stop_ids,
            im_start=tokenizer.special["<im_start>"],
            im_end=tokenizer.special["<im_end>"],
            im_patch=tokenizer.special["<im_patch>"],
            im_col=tokenizer.special["<im_col>"],
            image=tokenizer.special[IMAGE_PROMPT_TOKEN],
            special=tokenizer.special,
        ),
        prompt=JinaPrompt(
            always_start_with_space=settings.always_start_with_space,
            image_prompt_token=IMAGE_PROMPT_TOKEN,
            normalizer=tokenizer.normalizer,
        ),
        files=files,
        created_with=versions(),
        report=report,
    )


def record_files(
    paths: Iterable[Path], read: Callable[[int], None] = lambda n_bytes: None
) -> dict[str, FileRecord]:
    """Size and SHA-256 of files, as read back from disk."""
    return {path.name: _record(path, read) for path in paths}


def unhashed(paths: Iterable[Path]) -> dict[str, FileRecord]:
    """Records of files still in the making."""
    return {path.name: FileRecord(size=path.stat().st_size, sha256="0" * 64) for path in paths}


def versions() -> dict[str, str]:
    """Versions of what writes a bundle."""
    found = {"python": platform.python_version()}
    for name in WRITERS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a source tree
            found[name] = "unknown"
    return found


def _record(path: Path, read: Callable[[int], None]) -> FileRecord:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK):
            digest.update(block)
            size += len(block)
            read(len(block))
    return FileRecord(size=size, sha256=digest.hexdigest())


def _license(folder: Path) -> str:
    readme = folder / "README.md"
    if readme.exists():
        front = re.match(r"---\r?\n(.*?)\r?\n---", read_text(readme, MAX_README_BYTES), re.DOTALL)
        fields = dict(
            line.split(":", 1) for line in (front[1] if front else "").splitlines() if ":" in line
        )
        for key in ("license", "license_name"):
            value = fields.get(key, "").strip().strip("\"'")
            if value and value != "other":
                return value
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md"):
        if (folder / name).exists():
            for line in read_text(folder / name, MAX_README_BYTES).splitlines():
                if line.strip(" #\t"):
                    return line.strip(" #\t")
            raise CheckpointError(f"{folder / name}: is empty")
    return UNKNOWN_LICENSE
