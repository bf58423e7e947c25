"""A bundle is tried once in a process of its own before this one loads it.

Both engines end the whole process where a file is not as they expect, and a graph may compute for
ever; not all of that can be seen in a file. So a child process loads the files and computes with
them what a question would: a crop, some ids, some rows. Who survives that is remembered in the
cache folder by the checksums of the files, and by all else that decides what the engines do.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_vlm.bundle.find import embedded_bundle
from edge_vlm.bundle.manifest import DECODER_NAME, VISION_NAME, Bundle
from edge_vlm.errors import BundleError, EdgeVLMError, label
from edge_vlm.machine.engine_settings import EngineSettings
from edge_vlm.machine.folders import cache_folder, write_file

if TYPE_CHECKING:
    from edge_vlm.machine.settings import MachineSettings

PARTS = (DECODER_NAME, VISION_NAME)
SECONDS = 60.0  # for a trial, and besides for each
BYTES_A_SECOND = 10e6  # of the bundle, as a slow card reads it
_VERSION = 1  # of what is tried
_ENGINES = {DECODER_NAME: "llama.cpp", VISION_NAME: "onnxruntime"}
_PACKAGES = ("edge-vlm", "llama-cpp-python", "onnxruntime")
_KERNELS = ("repack", "flash_attention", "tiles_per_call")  # settings that choose other code
_BUILD_FOLDER = re.compile(r"\S+/(?=[\w.-]+:\d+:)")  # where an engine was compiled
_log = logging.getLogger(__name__)


def try_once(
    bundle: Bundle,
    settings: MachineSettings,
    engines: EngineSettings,
    parts: Sequence[str] = PARTS,
    *,
    seconds: float = SECONDS,
) -> bool:
    """Try a bundle unless that was done before, or its maker is trusted.

    Args:
        bundle: its files were compared with their checksums.
        settings: ``trust_bundle`` and ``kv_type`` of them.
        engines: what the engines are going to be given.
        parts: files to try, of ``PARTS``.
        seconds: for everything but reading the files.

    Returns:
        Whether it was tried, now or before. The model that comes with the package needs none. Where
        no Python can be started, as in an application that is frozen, it is not, and a warning goes
        to the log. Without a folder to remember it in, it is tried each time.

    Raises:
        BundleError: an engine refused a file, did not survive it or had no end.
    """
    if not parts or settings.trust_bundle or _is_embedded(bundle):
        return False
    note = _note(bundle, settings.kv_type, engines, parts)
    if _is_ours(note):
        return True
    if not _can_start_python():
        _log.warning("%s: is loaded untried, there is no Python to try it in", bundle.path)
        return False
    _try(bundle, settings.kv_type, engines, parts, seconds)
    _remember(note)
    return True


def remember(bundle: Bundle, settings: MachineSettings, engines: EngineSettings) -> None:
    """Note that a bundle needs no trial with these settings: this machine made it."""
    if not settings.trust_bundle:
        _remember(_note(bundle, settings.kv_type, engines, PARTS))


def _try(
    bundle: Bundle, kv_type: str, engines: EngineSettings, parts: Sequence[str], seconds: float
) -> None:
    from edge_vlm.machine.child import Child, Ended

    n_bytes = sum(record.size for record in bundle.manifest.files.values())
    current = parts[0]

    def on_part(index: int, _: int) -> None:
        nonlocal current
        current = parts[index]

    try:
        with Child(seconds + n_bytes / BYTES_A_SECOND) as child:
            child.call(
                f"{__name__}:try_engines",
                on_part,
                folder=str(bundle.path.resolve()),
                parts=list(parts),
                engines=asdict(engines),
                kv_type=kv_type,
            )
    except Ended as error:
        path, how = label(bundle.path / current), _BUILD_FOLDER.sub("", error.how)
        hint = "; if you trust its maker, EDGE_VLM_TRUST_BUNDLE=1 loads it untried"
        raise BundleError(
            f"{path}: {_ENGINES[current]} was tried with it in a process of its own, which"
            f" {how}{hint if error.is_late else ''}"
        ) from error
    except EdgeVLMError as error:
        raise BundleError(str(error)) from error


def _is_embedded(bundle: Bundle) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samefile(bundle.path, embedded_bundle())
    return False


def _can_start_python() -> bool:
    name = Path(sys.executable or "").stem.lower()
    return not getattr(sys, "frozen", False) and ("python" in name or "pypy" in name)


def _note(
    bundle: Bundle, kv_type: str, engines: EngineSettings, parts: Sequence[str]
) -> Path | None:
    """The file that is there if this was tried; None if there is no place for it."""
    versions = []
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(f"{package} {metadata.version(package)}")
    decided_by = {
        "version": _VERSION,
        "bundle": bundle.manifest.to_json(),
        "parts": list(parts),
        "kernels": {name: getattr(engines, name) for name in _KERNELS},
        "kv_type": kv_type,
        "packages": versions,
        "machine": [platform.machine(), platform.system()],
    }
    digest = hashlib.sha256(json.dumps(decided_by, sort_keys=True).encode()).hexdigest()
    with contextlib.suppress(EdgeVLMError):  # without a home
        return cache_folder() / "tried" / digest
    return None


def _is_ours(note: Path | None) -> bool:
    with contextlib.suppress(OSError):
        if note is not None:
            owner = note.lstat().st_uid
            return not hasattr(os, "geteuid") or owner == os.geteuid()
    return False


def _remember(note: Path | None) -> None:
    # Only a shortcut for the next time: a full or read-only disk must not fail an answer.
    with contextlib.suppress(OSError, EdgeVLMError):
        if note is not None:
            note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_file(note, b"", private=True)


# What the child runs

_TEXT = "".join(map(chr, [*range(1, 0x250), *range(0x800, 0xD800, 0x40), 0x1F600, 0x10FFFD]))
_N_IDS, _N_ROWS = 24, 8


def try_engines(
    told: Callable[[int, int], None],
    *,
    folder: str,
    parts: Sequence[str],
    engines: dict[str, Any],
    kv_type: str,
) -> None:
    """Load the parts of a bundle and compute with them; ``told`` which one is next.

    Raises:
        EdgeVLMError: an engine refused a file or failed.
    """
    _bound_process()
    bundle, settings = Bundle.open(folder), EngineSettings(**engines)
    for index, part in enumerate(parts):
        told(index, len(parts))
        if part == DECODER_NAME:
            _try_decoder(bundle, settings, kv_type)
        else:
            _try_vision(bundle, settings)


def _bound_process() -> None:
    """No more memory than the machine has, no core file, no debugger, no dialog."""
    os.environ["GGML_NO_BACKTRACE"] = "1"
    if sys.platform == "win32":
        import ctypes

        ctypes.windll.kernel32.SetErrorMode(0x8003)  # no boxes about failures
        return
    import resource

    import psutil

    for what, limit in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_DATA, psutil.virtual_memory().total),
    ):
        with contextlib.suppress(OSError, ValueError):
            _, hard = resource.getrlimit(what)
            allowed = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(what, (allowed, hard))


def _try_decoder(bundle: Bundle, engines: EngineSettings, kv_type: str) -> None:
    import numpy as np

    from edge_vlm.decoder.decoder import LlamaDecoder

    decoder = LlamaDecoder(bundle, engines, kv_type=kv_type)
    n_ids, hidden = decoder.n_ids, bundle.manifest.decoder.hidden_size
    decoder.pieces()
    decoder.tokenize(_TEXT + decoder.chat_template)
    ids = [index * (n_ids - 1) // (_N_IDS - 1) for index in range(_N_IDS)]
    rows = np.zeros((_N_ROWS, hidden), np.float32)
    n_positions = min(2 * _N_IDS + _N_ROWS, bundle.manifest.decoder.max_sequence_length)
    with decoder.working(), decoder.context(n_positions) as context:
        context.append_tokens(ids[: n_positions // 4], logits=True)
        context.append_embeddings(rows[: n_positions // 4], logits=True)
        with decoder.sampler(temperature=0, top_p=1, min_p=0, seed=0) as greedy:
            context.append_tokens([greedy.sample(context)], logits=True)
    decoder.close()


def _try_vision(bundle: Bundle, engines: EngineSettings) -> None:
    import numpy as np

    from edge_vlm.families.base import family_of
    from edge_vlm.pictures.tower import OnnxTower

    processor = bundle.manifest.image_processor
    tower = OnnxTower(bundle, engines)
    crops = np.zeros((1, *processor.least_crop), np.float32)
    tower.encode_crops(family_of(processor).inputs(crops, processor))
    _ = tower.marker_embeddings
