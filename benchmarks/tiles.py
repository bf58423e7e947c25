"""What a picture costs as the number of its tiles grows.

    python benchmarks/tiles.py --synthetic jina-vlm

Arguments are those of ``edge-vlm bench``. The result is benchmarks/results/tiles.json.
"""

from __future__ import annotations

import sys

from common import bench, bench_arguments, save


def main() -> None:
    arguments = bench_arguments(__doc__)
    if "--size" not in arguments:
        arguments += ["--size", "2728x2046"]
    points = []
    report: dict[str, object] = {}
    for tiles in range(1, 13):
        report = bench("edge-vlm", "--max-tiles", str(tiles), *arguments)
        (result,) = report["results"].values()
        entry = result["sizes"][0]["median"]
        if points and entry["crops"] == points[-1]["crops"]:
            continue  # there is no tiling of so many tiles for this shape
        points.append(entry)
        print(f"{entry['crops']} crops: {entry['first_token_seconds']:.2f} s", file=sys.stderr)
    save("tiles", {**report, "points": points})


if __name__ == "__main__":
    main()
