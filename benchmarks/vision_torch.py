"""The vision tower as PyTorch itself exports it to ONNX, to compare speeds with.

    python benchmarks/vision_torch.py --out torch.onnx
    python benchmarks/vision_speed.py --against torch.onnx

Needs PyTorch. Weights are random; the sizes are the released model's.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from models.demo.model import VisionConfig, VisionModel

CONFIG = Path(__file__).parents[1] / "export/edge_vlm_export/configs/jina-vlm/config.json"
USED_BLOCKS = 25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=USED_BLOCKS, help="blocks to run")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    config = VisionConfig.from_json(json.loads(CONFIG.read_text("utf-8"))["vision_config"])
    used = (arguments.layers - 1, max(0, arguments.layers - 7))
    config = replace(config, n_layers=arguments.layers, vit_layers=used)
    torch.manual_seed(0)
    model = VisionModel(config).eval()
    rows, columns = config.grid_hw
    example = (torch.zeros(1, rows * columns, config.patch_values), torch.tensor([True]))
    torch.onnx.export(
        model,
        example,
        str(arguments.out),
        input_names=["crops", "is_last"],
        output_names=["embeddings"],
        opset_version=20,
        dynamo=False,
    )


if __name__ == "__main__":
    main()
