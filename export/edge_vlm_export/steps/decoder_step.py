"""The decoder's part of an export: write, calibrate, quantize, compare."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_vlm.bundle.report import Calibration, DecoderFile, DecoderReport
from edge_vlm.machine.settings import MachineSettings
from edge_vlm_export.counted import Counted, Progress
from edge_vlm_export.decoder.gguf_file import (
    exact_precision,
    plan_decoder,
    write_decoder,
)
from edge_vlm_export.decoder.quantizer import head_types, quantize_decoder, quantized_bytes
from edge_vlm_export.decoder.reference import Reference
from edge_vlm_export.proof.decoder_report import (
    decoder_file,
    decoder_report,
    measuring_prompts,
    source_name,
)
from edge_vlm_export.samples.conversations import Prompt, read_samples, split
from edge_vlm_export.samples.prompts import PromptMaker

if TYPE_CHECKING:
    from edge_vlm.bundle.manifest import Bundle
    from edge_vlm_export.families.opened import Model
    from edge_vlm_export.steps.choices import Choices


class DecoderExport:
    """Plans the decoder when made; ``write`` carries it out.

    Raises:
        InputError: the choice does not fit the model, or the calibration folder cannot be used.
    """

    def __init__(self, model: Model, choices: Choices) -> None:
        self._model, self._choices = model, choices
        self._samples = None if choices.calibrate is None else read_samples(choices.calibrate)
        self._precision = exact_precision(model) if choices.quantizes else choices.decoder
        self._outputs = plan_decoder(model, self._precision)
        width = model.text.hidden_size
        wanted = choices.decoder_head, choices.decoder_embedding
        self._head, self._embedding = head_types(model.tied, width, *wanted)
        self.n_bytes = sum(output.n_bytes for output in self._outputs)
        n_values = sum(math.prod(output.values.shape) for output in self._outputs)
        n_table = (1 if model.tied else 2) * model.text.n_ids * width
        quantized = quantized_bytes(choices.decoder, n_values, n_table) if choices.quantizes else 0
        self.total_bytes = self.n_bytes + quantized  # on disk at once, of which
        self.scratch_bytes = self.n_bytes if choices.quantizes else 0  # for a while
        self._threads = MachineSettings.from_environment().engine_settings().threads

    def write(
        self, path: Path, name: str, bundle: Callable[[], Bundle], progress: Progress | None
    ) -> tuple[DecoderFile, DecoderReport | None]:
        """Write ``decoder.gguf`` beside ``vision.onnx`` and measure it.

        ``name`` is the model's; ``bundle`` gives the bundle as it is so far, the decoder not
        quantized yet.

        Raises:
            CheckpointError: a tensor cannot be read or does not fit the precision.
            EdgeVLMError: llama.cpp or onnxruntime failed.
        """
        model, choices = self._model, self._choices
        written = Counted("decoder", self.n_bytes, progress)
        write_decoder(
            path, model, self._outputs, precision=self._precision, name=name, written=written
        )
        calibrating, measuring = self._prompts(bundle, progress)
        calibration = self._quantize(path, calibrating, progress) if choices.quantizes else None
        report = None
        if choices.measures_decoder:
            report = decoder_report(
                path,
                model,
                measuring,
                source=source_name(choices.calibrate),
                max_divergence=choices.max_divergence,
                threads=self._threads,
                progress=Counted("compare", 0, progress).reach,
            )
        return decoder_file(path, calibration), report

    def _quantize(
        self, path: Path, prompts: list[Prompt], progress: Progress | None
    ) -> Calibration | None:
        """Put the quantized file in place of the other."""
        scratch, matrix = path.with_name("decoder.tmp"), None
        if prompts:
            matrix = path.with_name("imatrix.npz")
            step = Counted("importance", self._model.text.n_layers, progress)
            importance: Any = Reference(self._model).importance(prompts, step.reach)
            np.savez(matrix, **importance)
        quantize_decoder(
            path,
            scratch,
            self._choices.decoder,
            threads=self._threads,
            head=self._head,
            embedding=self._embedding,
            imatrix=matrix,
            progress=Counted("quantize", self.total_bytes - self.n_bytes, progress).reach,
        )
        scratch.replace(path)
        if matrix is None:
            return None
        matrix.unlink()
        return Calibration(
            source=source_name(self._choices.calibrate),
            n_prompts=len(prompts),
            n_positions=sum(len(prompt.ids) for prompt in prompts),
        )

    def _prompts(
        self, bundle: Callable[[], Bundle], progress: Progress | None
    ) -> tuple[list[Prompt], list[Prompt]]:
        """Those to calibrate with and those to measure on; the engines are freed again."""
        if self._samples is None and not self._choices.measures_decoder:
            return [], []
        stage = Counted("examples", 0, progress)
        calibrating: list[Prompt] = []
        measuring: list[Prompt] = []
        with PromptMaker(bundle(), self._threads) as maker:
            for sample in split(self._samples)[0] if self._samples else ():
                calibrating.append(maker.make(sample))
                stage.reach(len(calibrating), len(self._samples or ()))
            before = len(calibrating)
            if self._choices.measures_decoder:
                measuring = measuring_prompts(
                    self._samples, maker, lambda done, n: stage.reach(before + done, before + n)
                )
        return calibrating, measuring
