"""What the exporter's tests share: checkpoints to damage, and llama.cpp at its lowest level."""

from __future__ import annotations

import ctypes
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
from edge_vlm_export import export_checkpoint
from onnx import TensorProto, helper
from safetensors.numpy import load_file, save_file

from edge_vlm import Answer, EdgeVLM, MachineSettings
from edge_vlm.errors import CheckpointError
from tests.conftest import GOLDEN

# Full precision is exact, quick, and measures nothing.
export_exact = partial(export_checkpoint, vision="fp32", decoder="f16")

Arrays = dict[str, npt.NDArray[Any]]


def copy_checkpoint(name: str, target: Path, link_weights: bool = False) -> Path:
    """A checkpoint that may be changed, except for weights that are only linked."""
    target.mkdir()
    for path in (GOLDEN / name / "checkpoint").iterdir():
        if link_weights and path.suffix == ".safetensors":
            (target / path.name).symlink_to(path)
        else:
            shutil.copy(path, target)
    return target


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    """Apply ``change`` to the content of a JSON file."""
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def set_key(path: Path, dotted: str, value: Any) -> None:
    """Set one key; numbers in the dotted name index arrays."""

    def change(data: Any) -> None:
        *parents, last = (int(key) if key.isdigit() else key for key in dotted.split("."))
        for key in parents:
            data = data[key]
        data[last] = value

    edit_json(path, change)


def edit_tensors(checkpoint: Path, change: Callable[[Arrays], Any]) -> None:
    """Apply ``change`` to the tensors of a checkpoint with a single weights file."""
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def refused(checkpoint: Path, *fragments: str) -> str:
    """Export a checkpoint that has to be refused; returns the message, which has one line."""
    out = checkpoint.parent / "outputs" / "bundle"
    out.parent.mkdir()
    with pytest.raises(CheckpointError) as caught:
        export_exact(checkpoint, out)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    assert len(message) < 600, message
    for fragment in fragments:
        assert fragment in message
    assert list(out.parent.iterdir()) == []
    return message


@contextmanager
def llama_model(path: Path, vocab_only: bool) -> Iterator[Any]:
    """A model in llama.cpp, without its log."""
    receiver, user_data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(receiver), ctypes.byref(user_data))
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p())
    try:
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = vocab_only
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        assert model, path
        try:
            yield model
        finally:
            llama_cpp.llama_model_free(model)
    finally:
        llama_cpp.llama_log_set(receiver, user_data)


def llama_tokenize(vocab: Any, text: str) -> list[int]:
    """Ids of plain text: no special token is recognized or added."""
    data = text.encode("utf-8")
    ids = (llama_cpp.llama_token * (len(data) + 1))()
    n_ids = llama_cpp.llama_tokenize(vocab, data, len(data), ids, len(ids), False, False)
    assert n_ids >= 0
    return list(ids[:n_ids])


def last_logits(model: Any, ids: list[int]) -> npt.NDArray[np.float32]:
    """Scores of all ids for the token after ``ids``; cache and attention in float32."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 256
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    # llama.cpp's flash attention rounds to half precision inside, also with a float32 cache.
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, params)
    assert context
    try:
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, len(ids))) == 0
        n_ids = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        logits = llama_cpp.llama_get_logits_ith(context, -1)
        return np.ctypeslib.as_array(logits, (n_ids,)).copy()
    finally:
        llama_cpp.llama_free(context)


@cache
def int8_products_saturate() -> bool:
    """Whether onnxruntime's products of uint8 and int8 add up in int16, as on x86 without VNNI.

    There an int8 tower is less exact than its export says: onnxruntime, "Quantize ONNX Models".
    """
    inputs = [
        helper.make_tensor_value_info("a", TensorProto.UINT8, [1, 64]),
        helper.make_tensor_value_info("b", TensorProto.INT8, [64, 64]),
    ]
    outputs = [helper.make_tensor_value_info("c", TensorProto.INT32, [1, 64])]
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["a", "b"], ["c"])], "product", inputs, outputs
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    feed = {"a": np.full((1, 64), 255, np.uint8), "b": np.full((64, 64), 127, np.int8)}
    return bool((session.run(None, feed)[0] != 64 * 255 * 127).any())


def turn(text: str, *pictures: Path) -> dict[str, Any]:
    """A user's message in OpenAI's form."""
    shown = [{"type": "image_url", "image_url": {"url": str(path)}} for path in pictures]
    return {"role": "user", "content": [*shown, {"type": "text", "text": text}]}


def check_caches(folder: Path, picture: Path, cache: Path, *, n_crops: int, restored: int) -> None:
    """An answer is the same from memory, from disk in another process's place, and from neither.

    The picture has ``n_crops``; more than ``restored`` tokens come from disk.
    """
    question = "Where is the circle: left or right?"
    fresh = MachineSettings(threads=1, kv_type="f32", cache=None)
    with EdgeVLM.load(folder, settings=fresh) as vlm:
        expected = vlm.ask(picture, question, max_tokens=8)
        again = vlm.ask(picture, question, max_tokens=8)
        assert (expected.cached_crops, again.cached_crops) == (0, n_crops)
        encoded = vlm.ask(vlm.encode(picture), question, max_tokens=8)
        with vlm.chat(max_tokens=8) as chat:
            said = chat.ask(picture, question)
    found = [again, encoded, said]
    kept = MachineSettings(threads=1, kv_type="f32", cache=str(cache))
    for _ in range(2):
        with EdgeVLM.load(folder, settings=kept) as vlm:
            found.append(vlm.ask(picture, question, max_tokens=8))
    assert {answer.token_ids for answer in found} == {expected.token_ids}
    assert found[-1].restored_tokens > restored
    assert found[-1].encoded_crops == 0


def check_schema(vlm: EdgeVLM, picture: Path) -> None:
    """An answer has the form of a schema."""
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    answer = vlm.ask(picture, "How many?", schema=schema, max_tokens=24)
    assert isinstance(answer.parsed["n"], int)


def check_choices(vlm: EdgeVLM, picture: Path) -> Answer:
    """An answer is one of two choices, which have all the probability."""
    chosen = vlm.ask(picture, "Left or right?", choices=["left", "right"])
    assert chosen.answer in ("left", "right")
    assert chosen.choices is not None
    assert sum(chosen.choices.values()) == pytest.approx(1)
    return chosen
