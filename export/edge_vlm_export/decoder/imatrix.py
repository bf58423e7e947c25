"""An importance matrix: how strongly each column of each weight is used, as llama.cpp defines it.

The quantizer weighs the error of a column by the mean square of the activations that it is
multiplied with. They are collected with pictures in the prompts, because the vectors of a picture
make up most positions of this model's prompts and are unlike those of text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from edge_vlm_export.decoder.reference import Reference
    from edge_vlm_export.samples.conversations import Prompt

Float32 = npt.NDArray[np.float32]
_FLOOR = 1e-6  # of the mean: a column that was never used still has to be stored somehow


class ImportanceMatrix:
    """Sums of squares of each column, by the GGUF's name of the weight."""

    def __init__(self) -> None:
        self._sums: dict[str, npt.NDArray[np.float64]] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, rows: Float32) -> None:
        """Count the vectors (n, columns) that the weight ``name`` was multiplied with."""
        squares = np.einsum("ij,ij->j", rows, rows, dtype=np.float64)
        self._sums[name] = self._sums.get(name, 0) + squares
        self._counts[name] = self._counts.get(name, 0) + len(rows)

    def values(self) -> dict[str, Float32]:
        """Mean squares, (columns,) float32 for each weight."""
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        return {
            name: (mean + _FLOOR * mean.mean()).astype(np.float32) for name, mean in means.items()
        }


def collect(
    reference: Reference,
    prompts: Sequence[Prompt],
    progress: Callable[[int], None] = lambda n_layers: None,
) -> dict[str, Float32]:
    """Run the unquantized decoder over prompts and collect what each weight is multiplied with.

    The last layer's feed-forward part and the head count the positions that text follows: the
    runtime computes them for no others.
    """
    matrix = ImportanceMatrix()
    hidden = reference.run(
        [reference.inputs(prompt) for prompt in prompts],
        [prompt.targets >= 0 for prompt in prompts],
        on_matmul=matrix.add,
        progress=progress,
    )
    for rows in hidden:
        matrix.add(reference.head_name, rows)
    return matrix.values()
