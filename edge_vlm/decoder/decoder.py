"""The language model of a bundle: vocabulary, contexts that hold a KV cache, the next token."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_vlm.decoder.context import Context, ContextSettings
from edge_vlm.decoder.llama import Weights
from edge_vlm.errors import BundleError, DecoderError
from edge_vlm.machine import process
from edge_vlm.machine.engine_settings import EngineSettings, untuned
from edge_vlm.machine.memory import give_back_memory

if TYPE_CHECKING:
    from edge_vlm.bundle.manifest import Bundle


class LlamaDecoder:
    """Vocabulary, chat template and contexts of a bundle's ``decoder.gguf``.

    With ``in_turns``, the weights are loaded when a context is used and can be released again;
    contexts survive that. A context keeps its KV caches, of which it may have two, within
    ``kv_budget`` bytes where it can choose. The file's header is compared with the manifest unless
    it ``is_checked``.

    Raises:
        BundleError: llama.cpp cannot load it, or it differs from the manifest.
        InputError: a GPU was asked for, and this llama.cpp cannot use one.
    """

    def __init__(
        self,
        bundle: Bundle,
        engines: EngineSettings | None = None,
        *,
        kv_type: str = "f16",
        kv_budget: int | None = None,
        layers_on_gpu: str | int = 0,
        in_turns: bool = False,
        logs: bool = False,
        is_checked: bool = False,
    ) -> None:
        process.check_fork()
        engines = engines or untuned(bundle.manifest.decoder.precision)
        self._settings = ContextSettings(engines, kv_type, kv_budget)
        self._closed = False
        self._weights = Weights(bundle, engines, layers_on_gpu, in_turns, is_checked)
        process.set_logs(logs)
        self._api = self._weights.api
        self._geometry = self._weights.geometry
        self._guard = threading.RLock()
        self._n_working = 0
        self._contexts: weakref.WeakSet[Context] = weakref.WeakSet()

    @property
    def n_ids(self) -> int:
        """Size of the token table, the ids that are only read included."""
        return self._weights.n_ids

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._weights.is_loaded

    @property
    def load_seconds(self) -> float:
        """Of what was loaded after the vocabulary, until now."""
        return self._weights.load_seconds

    @property
    def chat_template(self) -> str:
        """Text of the chat template in the GGUF.

        Raises:
            BundleError: there is none.
        """
        if not self._weights.template:
            raise BundleError(f"{self._weights.path}: has no chat template")
        return bytes(self._weights.template).decode("utf-8", "replace")

    @property
    def identity(self) -> dict[str, Any]:
        """What the numbers in a context's KV cache depend on besides its input."""
        engines = self._settings.engines
        return {
            "decoder": self._weights.sha256,
            "llama.cpp": version("llama-cpp-python"),
            "features": self._api.llama_print_system_info().decode(),
            "gpu_layers": self._weights.n_gpu_layers,
            "kv_type": self._settings.kv_type,
            "flash_attention": self._settings.flash_attention,
            "batch_size": engines.batch_size,
            "threads": [engines.prefill_threads, engines.threads],
            "repack": engines.repack,
        }

    def use(self, engines: EngineSettings) -> None:
        """Change the settings for contexts made from now on; ``repack`` and ``mmap`` stay."""
        engines = replace(engines, repack=self._weights.repack, mmap=self._weights.mmap)
        self._settings = replace(self._settings, engines=engines)

    def tokenize(self, text: str) -> list[int]:
        """Ids of plain text: special tokens are neither recognised nor added."""
        data = text.encode("utf-8")
        ids = (self._api.llama_token * (len(data) + 1))()
        vocab = self._weights.vocab
        n = self._api.llama_tokenize(vocab, data, len(data), ids, len(ids), False, False)
        if n < 0:
            raise DecoderError("llama.cpp could not tokenize the text")
        return list(ids[:n])

    def piece(self, token: int) -> bytes:
        """Bytes that a token stands for; none for special tokens. May be part of a character."""
        vocab, to_piece = self._weights.vocab, self._api.llama_token_to_piece
        buffer = ctypes.create_string_buffer(256)
        n = to_piece(vocab, token, buffer, len(buffer), 0, False)
        if n < 0:
            buffer = ctypes.create_string_buffer(-n)
            n = to_piece(vocab, token, buffer, len(buffer), 0, False)
        return buffer.raw[:n]

    def pieces(self) -> list[bytes]:
        """``piece`` of all ids in order; none for ids that are only read, and for tokens of the
        user's that look like special ones.
        """
        found = [self.piece(token) for token in range(self._geometry.vocab_size)]
        for token, piece in enumerate(found):
            if piece.startswith(b"<") and piece.endswith(b">"):
                attributes = self._api.llama_vocab_get_attr(self._weights.vocab, token)
                if attributes & self._api.LLAMA_TOKEN_ATTR_USER_DEFINED:
                    found[token] = b""
        return found + [b""] * (self.n_ids - len(found))

    def context(self, n_positions: int) -> Context:
        """A context with room for at least ``n_positions``, which it takes when it is first used.

        Raises:
            DecoderError: the model was closed.
        """
        with self._guard:
            if self._closed:
                raise DecoderError("the model was closed")
            context = Context(self._weights, self._settings, n_positions, self._free_if_unused)
            self._contexts.add(context)
            return context

    def sampler(self, *, temperature: float, top_p: float, min_p: float, seed: int) -> Sampler:
        """Use it in a ``with`` statement; see ``Sampler``."""
        return Sampler(self._weights, temperature=temperature, top_p=top_p, min_p=min_p, seed=seed)

    def close(self) -> None:
        """Free the weights, or leave that to the last context that is still open."""
        self._closed = True
        self._free_if_unused()

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """``release`` does nothing meanwhile, and its threads are patient with each other.

        Raises:
            DecoderError: see ``process.check_fork``.
        """
        process.note_work()
        with self._guard:
            self._n_working += 1
        engines, waiting = self._settings.engines, self._weights.waiting
        n_threads = min(engines.threads, engines.prefill_threads)
        try:
            with waiting.watching(n_threads) if waiting else contextlib.nullcontext():
                yield
        finally:
            with self._guard:
                self._n_working -= 1

    def release(self) -> None:
        """Give the weights' memory back until a context needs them; contexts keep their content.

        Nothing happens while a context is at work, and without ``in_turns``.
        """
        with self._guard:
            if self._weights.in_turns and not self._n_working and self._weights.is_loaded:
                for context in self._contexts:
                    context.park()
                self._weights.unload()
                give_back_memory()

    def _free_if_unused(self) -> None:
        with self._guard:
            if self._closed and not any(context.is_open for context in self._contexts):
                self._weights.close()


class Sampler:
    """Picks the next token from a context's logits; ids that are only read never win.

    Args:
        weights: of the model.
        temperature: 0 takes the likeliest token.
        top_p: keep the likeliest tokens that together reach this probability.
        min_p: keep tokens at least this fraction as likely as the likeliest.
        seed: of the draws.
    """

    def __init__(
        self, weights: Weights, *, temperature: float, top_p: float, min_p: float, seed: int
    ) -> None:
        self._api = api = weights.api
        chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        ids = (*weights.unspoken, *range(weights.geometry.vocab_size, weights.n_ids))
        if ids:
            bias = (api.llama_logit_bias * len(ids))()
            for entry, token in zip(bias, ids, strict=True):
                entry.token, entry.bias = token, -np.inf
            never = api.llama_sampler_init_logit_bias(weights.n_ids, len(ids), bias)
            api.llama_sampler_chain_add(chain, never)
        if temperature == 0:
            api.llama_sampler_chain_add(chain, api.llama_sampler_init_greedy())
        else:
            for link in (
                api.llama_sampler_init_top_p(top_p, 1),
                api.llama_sampler_init_min_p(min_p, 1),
                api.llama_sampler_init_temp(temperature),
                api.llama_sampler_init_dist(seed),
            ):
                api.llama_sampler_chain_add(chain, link)
        self._chain = chain

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._api.llama_sampler_free(self._chain)

    def sample(self, context: Context) -> int:
        """The next token."""
        return context.sample(self._chain)
