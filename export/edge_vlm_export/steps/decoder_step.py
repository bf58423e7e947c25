"""The decoder's part of an export: write, calibrate, quantize, compare."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from edge_vlm.bundle.manifest import DECODER_NAME, Bundle
from edge_vlm.bundle.report import Calibration, DecoderFile, DecoderReport
from edge_vlm.machine.settings import MachineSettings
from edge_vlm_export.counted import Counted, Progress
from edge_vlm_export.decoder import imatrix
from edge_vlm_export.decoder.gguf_file import (
    exact_precision,
    plan_decoder,
    write_decoder,
)
from edge_vlm_export.decoder.quantizer import (
    Stored,
    head_types,
    quantize_decoder,
    quantized_bytes,
    save_imatrix,
)
from edge_vlm_export.decoder.reference import Reference
from edge_vlm_export.families.opened import Model
from edge_vlm_export.proof.decoder_report import (
    decoder_file,
    decoder_report,
    measuring_prompts,
    source_name,
)
from edge_vlm_export.samples.conversations import read_samples, split
from edge_vlm_export.samples.prompts import Prompt, PromptMaker
from edge_vlm_export.steps.choices import DecoderChoice

_SCRATCH_NAME = "decoder.tmp"
_IMATRIX_NAME = "imatrix.tmp"


class DecoderExport:
    """Plans the decoder when made; ``write`` carries it out.

    Raises:
        InputError: the choice does not fit the model, or the calibration folder cannot be used.
    """

    def __init__(self, model: Model, choice: DecoderChoice) -> None:
        self._model, self._choice = model, choice
        self._samples = None if choice.calibrate is None else read_samples(choice.calibrate)
        self._measure = choice.quantized if choice.measure is None else choice.measure
        self._precision = exact_precision(model) if choice.quantized else choice.kind
        self._outputs = plan_decoder(model, self._precision)
        width = model.text.hidden_size
        self._head, self._embedding = head_types(model.tied, width, choice.head, choice.embedding)
        self.n_bytes = sum(output.n_bytes for output in self._outputs)
        n_values = sum(math.prod(output.shape) for output in self._outputs)
        n_table = (1 if model.tied else 2) * model.text.n_ids * width
        self._n_quantized = (
            quantized_bytes(choice.kind, n_values, n_table) if choice.quantized else 0
        )
        self._threads = MachineSettings.from_environment().engine_settings().threads

    @property
    def scratch_bytes(self) -> int:
        """Of ``total_bytes``, those that are needed only for a while."""
        return self.n_bytes if self._choice.quantized else 0

    @property
    def total_bytes(self) -> int:
        """The most that is on disk at once."""
        return self.n_bytes + self._n_quantized

    def write(
        self,
        folder: Path,
        name: str,
        bundle: Callable[[], Bundle],
        progress: Progress | None,
    ) -> tuple[DecoderFile, DecoderReport | None]:
        """Write ``decoder.gguf`` to ``folder`` and measure it.

        Args:
            folder: where ``vision.onnx`` is already.
            name: the model's.
            bundle: gives the bundle as it is so far, the decoder not quantized yet.
            progress: see ``export_checkpoint``.

        Raises:
            CheckpointError: a tensor cannot be read or does not fit the precision.
            EdgeVLMError: llama.cpp or onnxruntime failed.
        """
        path = folder / DECODER_NAME
        write_decoder(
            path,
            self._model,
            self._outputs,
            precision=self._precision,
            name=name,
            written=Counted("decoder", self.n_bytes, progress),
        )
        calibrating, measuring = self._prompts(bundle, progress)
        stored = [
            Stored(output.name, output.kind.name.lower(), math.prod(output.shape), output.n_bytes)
            for output in self._outputs
        ]
        calibration = None
        if self._choice.quantized:
            matrix = self._collect(folder / _IMATRIX_NAME, calibrating, progress)
            if matrix:
                calibration = Calibration(
                    source=source_name(self._choice.calibrate),
                    n_prompts=len(calibrating),
                    n_positions=sum(len(prompt.ids) for prompt in calibrating),
                )
            scratch = folder / _SCRATCH_NAME
            stored = quantize_decoder(
                path,
                scratch,
                self._choice.kind,
                threads=self._threads,
                head=self._head,
                embedding=self._embedding,
                imatrix=matrix,
                progress=Counted("quantize", self._n_quantized, progress).reach,
            )
            scratch.replace(path)
            if matrix:
                matrix.unlink()
        report = None
        if self._measure:
            report = decoder_report(
                path,
                self._model,
                measuring,
                source=source_name(self._choice.calibrate),
                max_divergence=self._choice.max_divergence,
                threads=self._threads,
                progress=Counted("compare", 0, progress).reach,
            )
        return decoder_file(path.stat().st_size, stored, calibration), report

    def _prompts(
        self, bundle: Callable[[], Bundle], progress: Progress | None
    ) -> tuple[list[Prompt], list[Prompt]]:
        """Those to calibrate with and those to measure on; the engines are freed again."""
        if self._samples is None and not self._measure:
            return [], []
        stage = Counted("examples", 0, progress)
        calibrating: list[Prompt] = []
        with PromptMaker(bundle(), self._threads) as maker:
            for sample in split(self._samples)[0] if self._samples else ():
                calibrating.append(maker.make(sample))
                stage.reach(len(calibrating), len(self._samples or ()))
            measuring = (
                measuring_prompts(
                    self._samples,
                    maker,
                    lambda done, total: stage.reach(
                        len(calibrating) + done, len(calibrating) + total
                    ),
                )
                if self._measure
                else []
            )
        return calibrating, measuring

    def _collect(self, path: Path, prompts: list[Prompt], progress: Progress | None) -> Path | None:
        if not prompts:
            return None
        reference = Reference(self._model)
        stage = Counted("importance", self._model.text.n_layers, progress)
        save_imatrix(path, imatrix.collect(reference, prompts, stage.reach))
        return path
