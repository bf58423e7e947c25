"""edge-vlm beside PyTorch running the same architecture, in turns on the same machine.

    python benchmarks/against_pytorch.py --synthetic jina-vlm --size 2728x2046
    python benchmarks/against_pytorch.py --config models/demo/checkpoint/config.json --model demo

Needs PyTorch; edge-vlm may be in another environment (--command). Weights are random: time depends
on sizes, not on values. Each run of PyTorch is a process of its own. The full size takes 10 GB of
memory in fp32. Other arguments are those of ``edge-vlm bench``. The result is
benchmarks/results/against_pytorch.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common import bench, child, medians, save

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "export/edge_vlm_export/configs/jina-vlm/config.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIG, help="config.json of the model")
    parser.add_argument("--command", default="edge-vlm", help="the edge-vlm command")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, help="of PyTorch; its default is all cores")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options, arguments = parser.parse_known_args()
    if options.child:
        print(json.dumps(_measure(options.config, **json.loads(options.child))))
        return
    runs: dict[str, list[dict[str, float]]] = {"edge-vlm": []}
    report: dict[str, Any] = {}
    for _ in range(options.rounds):
        report = bench(options.command, "--runs", "1", "--tokens", str(options.tokens), *arguments)
        (result,) = report["results"].values()
        own = result["sizes"][0]["median"]
        runs["edge-vlm"].append(own)
        for dtype in options.dtypes:
            request = {
                "dtype": dtype,
                "crops": own["crops"],
                "prompt": own["prompt_tokens"],
                "tokens": options.tokens,
                "threads": options.threads,
            }
            runs.setdefault(f"PyTorch {dtype}", []).append(
                child(request, "--config", str(options.config))
            )
    middle = medians(runs)
    for name, values in middle.items():
        ratio = middle["edge-vlm"]["first_token_seconds"] / values["first_token_seconds"]
        print(
            f"{name}: vision {values['vision_seconds_per_tile']:.3g} s a tile, prefill"
            f" {values['prefill_seconds']:.3g} s, decode"
            f" {values['decode_tokens_per_second']:.3g} tokens/s, first token after"
            f" {values['first_token_seconds']:.3g} s; edge-vlm takes {ratio:.2f} of it",
            file=sys.stderr,
        )
    report["versions"]["torch"] = version("torch")
    save("against_pytorch", {**report, "medians": middle, "runs": runs})


def _measure(
    config: Path, *, dtype: str, crops: int, prompt: int, tokens: int, threads: int | None
) -> dict[str, float]:
    sys.path.insert(0, str(ROOT))
    import resource

    import torch

    from models.demo.model import JinaVlm

    if threads:
        torch.set_num_threads(threads)
    torch.set_default_dtype({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    settings = json.loads(config.read_text("utf-8"))
    torch.manual_seed(0)
    model = JinaVlm.from_json(settings, tied=bool(settings.get("tie_word_embeddings"))).eval()
    vision, text = model.vision, model.text
    # Blocks above the last one that is read are left out, as in the export.
    indices = [i % (vision.config.n_layers + 1) for i in vision.config.vit_layers]
    if max(indices) < vision.config.n_layers:
        vision.layers = vision.layers[: max(indices) + 1]
        vision.post_lnorm = torch.nn.Identity()
        object.__setattr__(vision.config, "vit_layers", tuple(indices))
    rows, columns = vision.config.grid_hw
    crop = torch.randn(1, rows * columns, vision.config.patch_values)
    with torch.inference_mode():
        vision(crop, torch.tensor([False]))
        started = time.perf_counter()
        for _ in range(crops):
            vision(crop, torch.tensor([False]))
        seen = time.perf_counter()
        embeds = torch.randn(1, prompt, text.config.hidden_size)
        hidden, past = text(embeds, torch.arange(prompt)[None])
        token = model.logits(hidden[:, -1:]).argmax(-1)
        prefilled = time.perf_counter()
        for index in range(tokens - 1):
            step = text.embedding(token)
            hidden, past = text(step, torch.tensor([[prompt + index]]), past=past)
            token = model.logits(hidden).argmax(-1)
        ended = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "vision_seconds_per_tile": (seen - started) / crops,
        "vision_seconds": seen - started,
        "prefill_seconds": prefilled - seen,
        "prefill_tokens_per_second": prompt / (prefilled - seen),
        "decode_tokens_per_second": (tokens - 1) / (ended - prefilled),
        "first_token_seconds": prefilled - started,
        "peak_rss_bytes": peak * (1 if sys.platform == "darwin" else 1024),
    }


if __name__ == "__main__":
    main()
