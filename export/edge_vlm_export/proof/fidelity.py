"""How close a decoder file answers to the checkpoint, position by position.

Both see the same prompts, pictures included, and are compared wherever text follows: there the
model has to predict a token; inside a picture it never does. llama.cpp runs in a process of its
own, and no more than the logits of one batch are held.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_vlm.machine.child import call_apart
from edge_vlm_export.decoder.reference import Reference
from edge_vlm_export.families.opened import Model
from edge_vlm_export.samples.conversations import Prompt

Float64 = npt.NDArray[np.float64]
_POSITIONS_AT_ONCE = 128  # for which the reference's logits are computed


@dataclass(frozen=True)
class Fidelity:
    """One number for each compared position; likelihoods are in nats."""

    divergence: Float64  # Kullback-Leibler, of the file's distribution from the checkpoint's
    same_top: npt.NDArray[np.bool_]
    nll_reference: Float64  # of the token that follows
    nll: Float64

    @property
    def perplexity_ratio(self) -> float:
        """The file's perplexity over the checkpoint's."""
        return float(np.exp(self.nll.mean() - self.nll_reference.mean()))


def compare(
    gguf: Path,
    model: Model,
    prompts: Sequence[Prompt],
    *,
    threads: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Fidelity:
    """Compare the decoder file ``gguf`` with the checkpoint it was made from.

    ``threads`` are llama.cpp's; ``progress`` is called with steps done and their total.

    Raises:
        EdgeVLMError: llama.cpp cannot load or run the file.
    """
    reference = Reference(model)
    n_layers = model.text.n_layers
    total = n_layers + len(prompts)
    hidden = reference.run(
        [reference.inputs(prompt) for prompt in prompts],
        [prompt.targets >= 0 for prompt in prompts],
        progress=lambda layers: progress(layers, total),
        positions=[prompt.positions for prompt in prompts],
    )
    with tempfile.TemporaryDirectory(prefix="edge-vlm-") as folder:
        data = Path(folder) / "prompts.npz"
        arrays: dict[str, Any] = {}
        for index, (prompt, rows) in enumerate(zip(prompts, hidden, strict=True)):
            arrays |= {f"ids{index}": prompt.ids, f"rows{index}": prompt.rows}
            arrays[f"hidden{index}"] = rows
            if prompt.positions is not None:
                arrays[f"positions{index}"] = prompt.positions
        np.savez(data, **arrays)
        found = call_apart(
            f"{__name__}:compare_here",
            lambda done, _: progress(n_layers + done, total),
            gguf=str(gguf),
            checkpoint=str(model.folder.resolve()),
            data=str(data),
            n_prompts=len(prompts),
            threads=threads,
        )
    return Fidelity(*map(np.array, zip(*found, strict=True)))


def compare_here(
    progress: Callable[[int, int], None],
    *,
    gguf: str,
    checkpoint: str,
    data: str,
    n_prompts: int,
    threads: int,
) -> list[tuple[float, bool, float, float]]:
    """``compare`` in this process, from files; what ``distance`` gives for each position."""
    from edge_vlm_export.decoder.logits import Run, loaded

    reference = Reference(Model(Path(checkpoint)))
    parts: list[tuple[float, bool, float, float]] = []
    with np.load(data) as arrays, loaded(Path(gguf), vocab_only=False) as llama:
        prompts = [
            Prompt(arrays[f"ids{i}"], arrays[f"rows{i}"], arrays.get(f"positions{i}"))
            for i in range(n_prompts)
        ]
        run = Run(llama, max(len(prompt.ids) for prompt in prompts), threads)
        try:
            for index, prompt in enumerate(prompts):
                hidden, targets = arrays[f"hidden{index}"], prompt.targets
                wanted = targets >= 0
                exact: list[npt.NDArray[np.float32]] = []
                seen = run.logits(prompt.ids, prompt.rows, wanted, prompt.positions)
                for n, (position, logits) in enumerate(seen):
                    if not exact:
                        exact = list(reference.logits(hidden[n : n + _POSITIONS_AT_ONCE]))
                    parts.append(distance(exact.pop(0), logits, int(targets[position])))
                progress(index + 1, n_prompts)
        finally:
            run.close()
    return parts


def distance(
    exact: npt.NDArray[np.float32], logits: npt.NDArray[np.float32], target: int
) -> tuple[float, bool, float, float]:
    """Divergence, same best id, and both negative log-likelihoods of ``target``.

    ``logits`` may go on with ids that are only read; they are left out.
    """
    wanted = _log_softmax(exact)
    found = _log_softmax(logits[: len(exact)])
    divergence = float(np.sum(np.exp(wanted) * (wanted - found)))
    same = bool(np.argmax(exact) == np.argmax(logits[: len(exact)]))
    return max(divergence, 0.0), same, float(-wanted[target]), float(-found[target])


def _log_softmax(logits: npt.NDArray[np.float32]) -> Float64:
    shifted: Float64 = logits.astype(np.float64) - logits.max()
    shifted -= np.log(np.exp(shifted).sum())
    return shifted
