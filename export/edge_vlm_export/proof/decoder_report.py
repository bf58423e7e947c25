"""The report of an export: how close the written files are to the checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np

from edge_vlm.bundle.report import Calibration, DecoderFile, DecoderReport
from edge_vlm.errors import EdgeVLMError
from edge_vlm_export.decoder.quantizer import type_bits
from edge_vlm_export.proof.fidelity import compare
from edge_vlm_export.samples.conversations import BUILTIN, Sample, builtin_samples, split

if TYPE_CHECKING:
    from edge_vlm_export.families.opened import Model
    from edge_vlm_export.samples.conversations import Prompt
    from edge_vlm_export.samples.prompts import PromptMaker

ENOUGH_POSITIONS = 512  # of held-out prompts when nothing is calibrated
MAX_LIKELIHOOD = 600.0  # nats; keeps a perplexity finite


def source_name(calibrate: str | Path | None) -> str:
    """How a report calls the samples: a folder's path says too much about a machine."""
    return BUILTIN if calibrate is None or str(calibrate) == BUILTIN else "folder"


def measuring_prompts(
    samples: Sequence[Sample] | None,
    maker: PromptMaker,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Prompt]:
    """Held-out prompts to compare decoders on.

    Without samples, as many built-in ones as ``ENOUGH_POSITIONS`` takes: one with the released
    sizes, several with a small model. With samples, all their held-out ones.
    """
    held_out = split(samples)[1] if samples is not None else []
    chosen = held_out or split(builtin_samples())[1]
    prompts: list[Prompt] = []
    for sample in chosen:
        prompts.append(maker.make(sample))
        progress(len(prompts), len(chosen))
        if not held_out and sum(len(prompt.ids) for prompt in prompts) >= ENOUGH_POSITIONS:
            break
    progress(len(prompts), len(prompts))
    return prompts


def decoder_report(
    gguf: Path,
    model: Model,
    prompts: Sequence[Prompt],
    *,
    source: str,
    max_divergence: float,
    threads: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> DecoderReport:
    """Compare ``gguf`` with the checkpoint.

    Raises:
        EdgeVLMError: llama.cpp cannot load or run it.
    """
    found = compare(gguf, model, prompts, threads=threads, progress=progress)
    return DecoderReport(
        source=source,
        n_prompts=len(prompts),
        n_positions=len(found.divergence),
        divergence_mean=float(found.divergence.mean()),
        divergence_worst=float(np.quantile(found.divergence, 0.99)),
        same_top=float(found.same_top.mean()),
        perplexity=float(np.exp(min(found.nll.mean(), MAX_LIKELIHOOD))),
        perplexity_ratio=min(found.perplexity_ratio, 1e300),
        max_divergence=max_divergence,
    )


def decoder_file(path: Path, calibration: Calibration | None) -> DecoderFile:
    """Types and sizes of what is stored, read back: the quantizer has rules of its own.

    Raises:
        EdgeVLMError: the file cannot be read.
    """
    try:
        tensors = gguf.GGUFReader(path).tensors
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise EdgeVLMError(f"{path}: cannot be read back ({error})") from error
    types = {tensor.name: tensor.tensor_type.name.lower() for tensor in tensors}
    # Norms are f32 in every file.
    weights = [name for name, kind in types.items() if kind != "f32"] or list(types)
    usual = type_bits(Counter(types[name] for name in weights).most_common(1)[0][0])
    n_bytes = sum(int(tensor.n_bytes) for tensor in tensors)
    n_values = sum(int(tensor.n_elements) for tensor in tensors)
    return DecoderFile(
        n_bytes=path.stat().st_size,
        bits_per_weight=8 * n_bytes / n_values,
        types=dict(Counter(types.values()).most_common()),
        kept=tuple(name for name in weights if type_bits(types[name]) > usual),
        calibration=calibration,
    )
