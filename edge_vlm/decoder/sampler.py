"""How the next token is picked."""

from __future__ import annotations

import numpy as np

from edge_vlm.decoder.context import Context
from edge_vlm.decoder.llama import Weights


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
        n_extra = weights.geometry.additional_vocab_size
        if n_extra:
            bias = (api.llama_logit_bias * n_extra)()
            for index in range(n_extra):
                bias[index].token = weights.geometry.vocab_size + index
                bias[index].bias = -np.inf
            never = api.llama_sampler_init_logit_bias(weights.n_ids, n_extra, bias)
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
