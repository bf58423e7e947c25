"""Bytes of KV cache that llama.cpp holds at the most image tokens there can be.

    python benchmarks/kv_cache.py BUNDLE

Counted is what llama.cpp gives out when it is asked for the state of a sequence: the cells in use
and a header of a few kB. The result is benchmarks/results/kv_cache.json.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
from common import save

from edge_vlm.bundle.find import find_bundle
from edge_vlm.bundle.manifest import Bundle
from edge_vlm.decoder.decoder import LlamaDecoder
from edge_vlm.machine.engine_settings import KV_TYPES
from edge_vlm.measure.bench import circumstances

POSITIONS = 2366  # 13 crops of 182 tokens: what the model's paper counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", help="folder or name of a bundle")
    parser.add_argument("--positions", type=int, default=POSITIONS)
    parser.add_argument("--kv-types", nargs="+", default=("f16", "q8_0", "q4_0"))
    options = parser.parse_args()
    bundle = Bundle.open(find_bundle(options.bundle))
    width = bundle.manifest.decoder.hidden_size
    rows = np.random.default_rng(0).normal(0, 0.02, (options.positions, width)).astype(np.float32)
    found = []
    for kv_type in options.kv_types:
        decoder = LlamaDecoder(bundle, kv_type=kv_type)
        with decoder.context(options.positions) as context:
            context.append_embeddings(rows)
            held = context.state_bytes
        decoder.close()
        computed = options.positions * bundle.manifest.decoder.kv_bytes_per_token(KV_TYPES[kv_type])
        found.append({"kv_type": kv_type, "held": held, "computed": computed})
        print(f"{kv_type}: {held} bytes, computed {computed:.0f}", file=sys.stderr)
    save("kv_cache", {**circumstances(), "positions": options.positions, "rows": found})


if __name__ == "__main__":
    main()
