"""How the next token is picked."""

from __future__ import annotations

import numpy as np

from edge_vlm.answering.options import AskOptions
from edge_vlm.decoder.context import Context
from edge_vlm.decoder.decoder import Decoder
from edge_vlm.forms.guide import Guide


class Sampler:
    """Picks the next token from a context's logits; ids that are only read never win.

    With a ``guide``, only tokens of its language do.
    """

    def __init__(
        self, decoder: Decoder, options: AskOptions, seed: int, guide: Guide | None = None
    ) -> None:
        self._api = api = decoder._api
        self._guide = guide
        chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        geometry = decoder._geometry
        n_extra = geometry.additional_vocab_size
        if n_extra:
            bias = (api.llama_logit_bias * n_extra)()
            for index in range(n_extra):
                bias[index].token = geometry.vocab_size + index
                bias[index].bias = -np.inf
            never = api.llama_sampler_init_logit_bias(decoder.n_ids, n_extra, bias)
            api.llama_sampler_chain_add(chain, never)
        if options.temperature == 0:
            api.llama_sampler_chain_add(chain, api.llama_sampler_init_greedy())
        else:
            for link in (
                api.llama_sampler_init_top_p(options.top_p, 1),
                api.llama_sampler_init_min_p(options.min_p, 1),
                api.llama_sampler_init_temp(options.temperature),
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

        def draw() -> int:
            return int(self._api.llama_sampler_sample(self._chain, context._open(), -1))

        if self._guide is None:
            return draw()
        return self._guide.choose(lambda allowed: context.forbid(~allowed), draw)
