"""llama.cpp in this process: the library, loaded once, and a model's weights and vocabulary.

llama-cpp-python's low-level functions mirror ``llama.h`` of the pinned release.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_vlm.decoder.waiting import Patience
from edge_vlm.errors import BundleError
from edge_vlm.machine import process
from edge_vlm.machine.memory import forget_mapped
from edge_vlm.machine.process import llama_log, long_waits, waits_are_decided
from edge_vlm.machine.providers import gpu_layers

if TYPE_CHECKING:
    from edge_vlm.bundle.manifest import Bundle
    from edge_vlm.machine.engine_settings import EngineSettings

_FORGET_EVERY = 1 / 32  # of a file that is loaded


def load(spinning: bool) -> Patience | None:
    """Load llama.cpp so that how long its threads wait can be changed, and who changes it.

    None, if they are to spin always or the user has decided. The first call counts: see
    ``patience``.
    """
    if spinning or waits_are_decided():
        return None
    with long_waits():
        import llama_cpp  # noqa: F401 (loaded here for what libgomp reads)
    return _patience()


@cache
def api() -> Any:
    """llama-cpp-python's low-level module with its backend started."""
    import llama_cpp

    module = llama_cpp.llama_cpp
    module.llama_log_set(llama_log, ctypes.c_void_p())
    module.llama_backend_init()
    return module


def build_info() -> tuple[str, bool]:
    """llama.cpp's own description of its build, and whether it can use a GPU."""
    text = api().llama_print_system_info().decode("utf-8", "replace")
    return text, bool(api().llama_supports_gpu_offload())


def ggml_type(name: str) -> int:
    """The number of a tensor type."""
    return int(getattr(api(), f"GGML_TYPE_{name.upper()}"))


def load_model(path: Path, params: Any, *, mapped: bool) -> Any:
    """llama.cpp's model; None if it refuses. What it has read of a ``mapped`` file is let go of.

    Matrices that are interleaved are copied, one after the other; otherwise copies and file would
    count together before the last one is done. llama.cpp works in a thread of its own, because
    Ctrl-C raises in the main thread, and a callback from C cannot pass that on. It ends the load.
    """
    stopped = threading.Event()
    forgotten = -1.0

    def on_progress(done: float, _user_data: object) -> bool:
        nonlocal forgotten
        if mapped and (done == 1 or done >= forgotten + _FORGET_EVERY):
            forgotten = done
            forget_mapped(path)
        return not stopped.is_set()

    params.progress_callback = api().llama_progress_callback(on_progress)
    with ThreadPoolExecutor(1) as pool:
        try:
            return pool.submit(
                api().llama_model_load_from_file, str(path).encode(), params
            ).result()
        except BaseException:
            stopped.set()
            raise


@cache
def abort_when_set() -> Any:
    """An abort callback without Python in it, for a ``CancelToken``'s buffer.

    llama.cpp asks it before every operator, from its own threads; a Python function would take the
    interpreter's lock thousands of times a second. strlen() of a token's buffer is 0 until the
    token is set and 1 afterwards, which is just what the callback has to answer.
    """
    libc = ctypes.CDLL("msvcrt" if sys.platform == "win32" else None)
    return ctypes.cast(libc.strlen, api().ggml_abort_callback)


@cache
def never_abort() -> Any:
    """No abort callback."""
    return api().ggml_abort_callback()


@cache
def _patience() -> Patience:
    return Patience(api()._lib)


class Weights:
    """A bundle's ``decoder.gguf``: the vocabulary always, the matrices once they are asked for.

    Args:
        bundle: where the file is.
        engines: ``repack``, ``mmap`` and ``spinning`` of them.
        layers_on_gpu: a count, auto or all.
        in_turns: load the matrices when they are asked for; they may be let go of again.

    Raises:
        BundleError: llama.cpp cannot load it, or it differs from the manifest.
        InputError: a GPU was asked for, and this llama.cpp cannot use one.
    """

    def __init__(
        self, bundle: Bundle, engines: EngineSettings, layers_on_gpu: str | int, in_turns: bool
    ) -> None:
        self.path = bundle.decoder_file
        self.geometry = bundle.manifest.decoder
        self.sha256 = bundle.manifest.files[self.path.name].sha256
        self.repack, self.mmap, self.in_turns = engines.repack, engines.mmap, in_turns
        self.waiting = load(engines.spinning)
        self.api = api()
        self.n_gpu_layers = gpu_layers(layers_on_gpu, self.api.llama_supports_gpu_offload())
        self.load_seconds = 0.0  # of matrices that were loaded after the vocabulary, until now
        self._guard = threading.RLock()
        self._model: Any = None
        # Freed when unloaded or forgotten, but never under a context, which keeps a reference.
        self._free: weakref.finalize[..., Weights] | None = None
        if in_turns:
            vocabulary = self._load(vocab_only=True)
            weakref.finalize(self, self.api.llama_model_free, vocabulary)
        else:
            vocabulary = self.model()
        self.vocab = self.api.llama_model_get_vocab(vocabulary)
        self.template = self.api.llama_model_chat_template(vocabulary, None)

    @property
    def n_ids(self) -> int:
        """Size of the token table, the ids that are only read included."""
        return int(self.api.llama_vocab_n_tokens(self.vocab))

    @property
    def is_loaded(self) -> bool:
        """Whether the matrices are in memory."""
        return self._model is not None

    def model(self) -> Any:
        """llama.cpp's model with its matrices, loaded unless it is there.

        Raises:
            BundleError: as for the class.
        """
        with self._guard:
            if self._model is None:
                started = time.perf_counter()
                self._model = model = self._load(vocab_only=False)
                self._free = weakref.finalize(self, self.api.llama_model_free, model)
                self._check_geometry()
                if self.in_turns:
                    self.load_seconds += time.perf_counter() - started
            return self._model

    def unload(self) -> None:
        """Free the matrices."""
        if self._free:
            self._free()
        self._free = self._model = None

    def _load(self, *, vocab_only: bool) -> Any:
        api = self.api
        params = api.llama_model_default_params()
        params.n_gpu_layers = self.n_gpu_layers
        params.vocab_only = vocab_only
        params.use_extra_bufts = self.repack
        params.load_mode = api.LLAMA_LOAD_MODE_MMAP if self.mmap else api.LLAMA_LOAD_MODE_NONE
        process.forget_errors()
        model = load_model(self.path, params, mapped=self.mmap)
        if not model:
            raise BundleError(f"{self.path}: llama.cpp cannot load it{process.because()}")
        return model

    def _check_geometry(self) -> None:
        api, model, geometry = self.api, self._model, self.geometry
        found = {
            "hidden_size": api.llama_model_n_embd(model),
            "n_layers": api.llama_model_n_layer(model),
            "n_heads": api.llama_model_n_head(model),
            "n_kv_heads": api.llama_model_n_head_kv(model),
        }
        expected: dict[str, int] = {name: getattr(geometry, name) for name in found}
        found["vocabulary"] = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        expected["vocabulary"] = geometry.vocab_size + geometry.additional_vocab_size
        for name, value in found.items():
            if value != expected[name]:
                self.unload()
                raise BundleError(
                    f"{self.path}: has {name} {value}, the manifest says {expected[name]}"
                )
