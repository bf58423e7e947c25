"""The language model's weights and vocabulary in llama.cpp."""

from __future__ import annotations

import threading
import time
import weakref
from typing import Any

from edge_vlm.bundle.manifest import DECODER_NAME, Bundle
from edge_vlm.decoder import llama
from edge_vlm.errors import BundleError
from edge_vlm.machine import process
from edge_vlm.machine.engine_settings import EngineSettings
from edge_vlm.machine.providers import gpu_layers


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
        self.path = bundle.file(DECODER_NAME)
        self.geometry = bundle.manifest.decoder
        self.sha256 = bundle.manifest.files[DECODER_NAME].sha256
        self.repack, self.mmap, self.in_turns = engines.repack, engines.mmap, in_turns
        self.waiting = llama.load(engines.spinning)
        self.api = llama.api()
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
        model = llama.load_model(self.path, params, mapped=self.mmap)
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
