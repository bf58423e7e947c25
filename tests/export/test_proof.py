"""What an export measures: the reference, the importance matrix, the comparison and its limits."""

from __future__ import annotations

import ctypes
import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from edge_vlm_export import export_checkpoint
from edge_vlm_export.decoder.logits import Run
from edge_vlm_export.decoder.quantizer import quantize_decoder
from edge_vlm_export.decoder.reference import Reference
from edge_vlm_export.families.opened import Model
from edge_vlm_export.proof.fidelity import compare, distance
from edge_vlm_export.samples.conversations import (
    BUILTIN,
    Prompt,
    builtin_samples,
    read_samples,
    split,
)
from edge_vlm_export.samples.prompts import PromptMaker
from PIL import Image

from edge_vlm.bundle.manifest import Bundle, parse_manifest
from edge_vlm.bundle.report import Report
from edge_vlm.errors import BundleError, EdgeVLMError, InputError
from tests.conftest import GOLDEN, GOLDEN_NAMES, GoldenModel
from tests.export_helpers import llama_model

pytestmark = pytest.mark.engine  # it exports models

TINY = "tiny-126-tied"
CHECKPOINT = GOLDEN / TINY / "checkpoint"


export = partial(export_checkpoint, vision="fp32")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_VLM_THREADS", "1")


def reference(name: str = TINY) -> Reference:
    folder = GOLDEN / name / "checkpoint"
    return Reference(Model(folder))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[Prompt]:
    """Two conversations about pictures."""
    folder = tmp_path_factory.mktemp("prompts") / "bundle"
    export(CHECKPOINT, folder, decoder="f32")
    with PromptMaker(Bundle.open(folder), 1) as maker:
        return [maker.make(sample) for sample in builtin_samples(1)[:2]]


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_the_reference_gives_the_published_scores(
    name: str, golden: dict[str, GoldenModel]
) -> None:
    arrays = golden[name].cases["text_only"].arrays
    exact = reference(name)
    ids = arrays["input_ids"]
    (hidden,) = exact.run([exact.embed(ids.tolist())], [np.arange(len(ids)) == len(ids) - 1])
    expected = arrays["logits_last"]
    difference = np.abs(exact.logits(hidden)[0] - expected).max() / np.ptp(expected)
    assert difference < 1e-5


def test_a_full_precision_decoder_equals_the_checkpoint(
    prompts: list[Prompt], bundle: Callable[..., Path]
) -> None:
    found = compare(bundle(TINY) / "decoder.gguf", Model(CHECKPOINT), prompts, threads=1)
    assert len(found.divergence) == sum(int((p.targets >= 0).sum()) for p in prompts) > 100
    assert found.divergence.max() < 1e-4
    assert found.same_top.mean() > 0.97
    assert found.perplexity_ratio == pytest.approx(1, abs=1e-3)


def test_a_tensor_in_the_wrong_place_is_noticed(
    prompts: list[Prompt], bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """A comparison of two GGUFs would not see that both have gate and up exchanged."""
    path = tmp_path / "decoder.gguf"
    shutil.copy(bundle(TINY) / "decoder.gguf", path)
    reader = gguf.GGUFReader(path, "r+")
    up, gate = (
        next(t for t in reader.tensors if t.name == f"blk.0.ffn_{part}.weight").data
        for part in ("up", "gate")
    )
    up[:], gate[:] = gate.copy(), up.copy()
    del reader
    assert compare(path, Model(CHECKPOINT), prompts, threads=1).divergence.mean() > 0.05


def test_distance_is_kullback_and_leibler_s() -> None:
    exact, found = np.log(np.float32([0.5, 0.25, 0.25])), np.log(np.float32([0.25, 0.5, 0.25, 9]))
    divergence, same, nll_reference, nll = distance(exact + 3, found - 5, target=2)
    assert divergence == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2), abs=1e-6)
    assert not same
    assert (nll_reference, nll) == pytest.approx((math.log(4), math.log(4)), abs=1e-6)
    assert distance(exact, exact, 0)[:2] == (0, True)


class _Tensor(ctypes.Structure):
    """ggml_tensor of the pinned release, as far as needed."""


_Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(_Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
]


def test_the_importance_matrix_is_what_llama_multiplies_with(
    prompts: list[Prompt], bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp's evaluation callback on the same prompts, pictures included."""
    sums: dict[str, npt.NDArray[np.float64]] = {}
    counts: dict[str, int] = {}

    def seen(address: int, ask: bool, _data: object) -> bool:
        tensor = ctypes.cast(address, ctypes.POINTER(_Tensor)).contents
        weight = tensor.src[0].contents.name.decode() if tensor.src[0] else ""
        if not weight.endswith(".weight") or not tensor.src[1]:
            return not ask
        inputs = tensor.src[1].contents
        columns, n = inputs.ne[0], inputs.ne[1]
        if inputs.type != 0 or columns != tensor.src[0].contents.ne[0] or "norm" in weight:
            return not ask
        if not ask:
            values = ctypes.cast(inputs.data, ctypes.POINTER(ctypes.c_float))
            rows = np.ctypeslib.as_array(values, (n, columns)).astype(np.float64)
            sums[weight] = sums.get(weight, 0) + np.square(rows).sum(axis=0)
            counts[weight] = counts.get(weight, 0) + n
        return True

    callback = llama_cpp.ggml_backend_sched_eval_callback(seen)
    defaults = llama_cpp.llama_context_default_params

    def with_callback() -> Any:
        params = defaults()
        params.cb_eval = callback
        return params

    monkeypatch.setattr(llama_cpp.llama_cpp, "llama_context_default_params", with_callback)
    with llama_model(bundle(TINY) / "decoder.gguf", vocab_only=False) as model:
        run = Run(model, 512, 1)
        for prompt in prompts:
            assert list(run.logits(prompt.ids, prompt.rows, prompt.targets >= 0))
        run.close()
    found = reference().importance(prompts)
    assert len(found) == 2 * 7 + 1
    assert sums.keys() == found.keys()
    for name, values in found.items():
        np.testing.assert_allclose(values, sums[name] / counts[name], rtol=5e-3, atol=1e-5)


def test_the_quantizer_heeds_the_importance_matrix(
    bundle: Callable[..., Path], tmp_path: Path
) -> None:
    source = bundle(TINY) / "decoder.gguf"
    exact = {tensor.name: tensor.data for tensor in gguf.GGUFReader(source).tensors}
    name = "blk.0.ffn_down.weight"
    columns = exact[name].shape[-1]
    weights = np.where(np.arange(columns) % 8 == 0, 100, 0.01).astype(np.float32)
    matrix = tmp_path / "imatrix.npz"
    np.savez(matrix, **{name: weights})
    errors = []
    for imatrix in (None, matrix):
        target = tmp_path / "decoder.gguf"
        quantize_decoder(source, target, "q4_0", threads=1, imatrix=imatrix)
        stored = next(t for t in gguf.GGUFReader(target).tensors if t.name == name)
        values = gguf.quants.dequantize(stored.data, stored.tensor_type)
        errors.append(float((np.square(values - exact[name]) * weights).sum()))
    assert errors[1] < 0.8 * errors[0]


def test_limits_decide_whether_a_bundle_is_written(tmp_path: Path) -> None:
    reports: list[Report] = []
    out = tmp_path / "bundle"
    options: dict[str, Any] = {"decoder": "q4_0", "on_report": reports.append}
    with pytest.raises(EdgeVLMError, match=r"mean divergence .* is above 0.2; nothing was written"):
        export(CHECKPOINT, out, **options)
    assert list(tmp_path.iterdir()) == []
    export(CHECKPOINT, out, allow_loss=True, **options)
    manifest = Bundle.open(out).manifest
    assert manifest.format_version == 3
    assert manifest.report == reports[0] == reports[1]
    assert manifest.report.decoder is not None
    assert manifest.report.decoder.divergence_mean > 0.2
    assert manifest.report.decoder_file.types == {"q4_0": 14, "f32": 9, "q8_0": 1}
    assert manifest.report.decoder_file.kept == ("token_embd.weight",)
    export(CHECKPOINT, out, overwrite=True, decoder="q8_0", calibrate=BUILTIN)
    report = Bundle.open(out).manifest.report
    assert report is not None
    assert report.decoder is not None
    assert report.decoder.divergence_mean < 0.02
    calibration = report.decoder_file.calibration
    assert calibration is not None
    assert (calibration.source, calibration.n_prompts, report.decoder.n_prompts) == (BUILTIN, 21, 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda report: report["decoder"].update(divergence_mean=-1), "divergence_mean"),
        (lambda report: report["decoder"].update(same_top=1.5), "same_top"),
        (lambda report: report["decoder"].update(perplexity="1"), "perplexity"),
        (lambda report: report["decoder"].update(source="a\x1b[2J"), "source"),
        (lambda report: report["decoder_file"].update(kept=["x" * 201]), "kept"),
        (
            lambda report: report["decoder_file"].update(types={str(n): 1 for n in range(65)}),
            "types",
        ),
        (lambda report: report.update(extra=1), "extra"),
        (lambda report: report.pop("decoder_file"), "decoder_file"),
    ],
)
def test_a_report_is_validated(
    change: Callable[[dict[str, Any]], Any], message: str, bundle: Callable[..., Path]
) -> None:
    data = json.loads((bundle(TINY) / "bundle.json").read_bytes())
    data["report"]["decoder"] = {
        "source": "builtin",
        "n_prompts": 1,
        "n_positions": 50,
        "divergence_mean": 0.1,
        "divergence_worst": 0.4,
        "same_top": 0.9,
        "perplexity": 7.5,
        "perplexity_ratio": 1.01,
        "max_divergence": 0.2,
    }
    parse_manifest(json.dumps(data).encode(), "good")
    change(data["report"])
    with pytest.raises(BundleError, match=f"report.*{message}"):
        parse_manifest(json.dumps(data).encode(), "bad")


def test_bundles_without_a_report_stay_valid(bundle: Callable[..., Path]) -> None:
    data = json.loads((bundle(TINY) / "bundle.json").read_bytes())
    with pytest.raises(BundleError, match="report: needs format_version 2"):
        parse_manifest(json.dumps(data | {"format_version": 1}).encode(), "x")
    del data["report"]
    old = parse_manifest(json.dumps(data | {"format_version": 1}).encode(), "x")
    assert old.report is None
    assert "report" not in json.loads(old.to_json())


def test_builtin_samples_are_the_same_each_time_and_split_evenly() -> None:
    first, second = builtin_samples(), builtin_samples()
    assert all(np.array_equal(a.picture, b.picture) for a, b in zip(first, second, strict=True))
    assert [sample.turns for sample in first] == [sample.turns for sample in second]
    training, held_out = split(first)
    assert (len(training), len(held_out)) == (21, 7)
    assert len({sample.turns[0][0].split()[0] for sample in held_out}) > 3
    assert not {id(s) for s in training} & {id(s) for s in held_out}


def picture_folder(path: Path) -> Path:
    path.mkdir()
    for name in ("a.png", "b.jpg"):
        Image.new("RGB", (40, 30), (200, 30, 60)).save(path / name)
    return path


def test_a_folder_of_pictures_with_questions(tmp_path: Path) -> None:
    folder = picture_folder(tmp_path / "pictures")
    (folder / "a.txt").write_text("What?\tRed\n\nWarum?\n", encoding="utf-8")
    (folder / "questions.json").write_text(
        json.dumps([{"image": "a.png", "question": "¿Color?", "answer": "rojo"}]), encoding="utf-8"
    )
    first, second = read_samples(folder)
    assert first.turns == (("¿Color?", "rojo"), ("What?", "Red"), ("Warum?", None))
    assert [message.role for message in first.messages] == ["user", "assistant"] * 2 + ["user"]
    assert second.turns == (("Was ist auf diesem Bild zu sehen?", None),)
    out = export(
        CHECKPOINT, tmp_path / "bundle", decoder="q8_0", calibrate=folder, max_divergence=5
    )
    report = Bundle.open(out).manifest.report
    assert report is not None
    assert report.decoder_file.calibration is not None
    assert report.decoder_file.calibration.source == "folder"


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        ("[", "not valid JSON"),
        ("{}", "must be a list"),
        ('[{"image": "a.png"}]', "lacks image or question"),
        ('[{"image": "../a.png", "question": "?"}]', "is no picture there"),
        ('[{"image": "a.png", "question": "?", "answer": 3}]', "is no text"),
    ],
)
def test_malformed_questions_are_refused(tmp_path: Path, questions: str, message: str) -> None:
    folder = picture_folder(tmp_path / "pictures")
    (folder / "questions.json").write_text(questions)
    with pytest.raises(InputError, match=message):
        read_samples(folder)


def test_folders_that_cannot_calibrate_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    with pytest.raises(InputError, match="no such folder of pictures"):
        export(CHECKPOINT, out, decoder="q4_0", calibrate=tmp_path / "none")
    with pytest.raises(InputError, match="has no picture"):
        export(CHECKPOINT, out, decoder="q4_0", calibrate=tmp_path)
    with pytest.raises(InputError, match="calibrate: f16 stores every weight alike"):
        export(CHECKPOINT, out, decoder="f16", calibrate=BUILTIN)
    assert list(tmp_path.iterdir()) == []
