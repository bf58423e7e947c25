"""Where checkpoints keep their chat template."""

from __future__ import annotations

from pathlib import Path

from edge_vlm.errors import CheckpointError
from edge_vlm_export.checkpoint.config_file import is_text, read_object, read_text

MAX_TEMPLATE_BYTES = 1 << 20


def read_chat_template(folder: Path) -> str:
    """``chat_template.jinja``, or what ``chat_template.json`` or the tokenizer's config says.

    Raises:
        CheckpointError: there is none, or it is no text of at most 1 MiB.
    """
    path = folder / "chat_template.jinja"
    template = read_text(path, MAX_TEMPLATE_BYTES) if path.exists() else None
    for name in ("chat_template.json", "tokenizer_config.json"):
        if template is None and (folder / name).exists():
            template = _default(read_object(folder / name).get("chat_template"))
    if template is None:
        raise CheckpointError(
            f"{path}: is missing, and neither chat_template.json nor tokenizer_config.json has a"
            " chat_template"
        )
    if not template.strip() or len(template) > MAX_TEMPLATE_BYTES:
        raise CheckpointError(f"{folder}: the chat template is empty or larger than 1 MiB")
    if not is_text(template) or "\0" in template:
        raise CheckpointError(f"{folder}: the chat template is not valid Unicode text")
    return template


def _default(value: object) -> str | None:
    """A template, or that of several which is named so."""
    if isinstance(value, list):
        named = [item for item in value if isinstance(item, dict)]
        value = next((i.get("template") for i in named if i.get("name") == "default"), None)
    return value if isinstance(value, str) else None
