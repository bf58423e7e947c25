"""``edge-vlm info``."""

from __future__ import annotations

import dataclasses

import click

from edge_vlm.cli.options import output_options
from edge_vlm.cli.streams import write_json
from edge_vlm.cli.table import echo_lines


@click.command("info")
@click.argument("model", required=False, envvar="EDGE_VLM_MODEL")
@click.option("--verify", "again", is_flag=True, help="Hash every file again, also large ones.")
@output_options
def command(model: str | None, again: bool, as_json: bool) -> None:
    """Show what a bundle is and whether its files are intact.

    Files are compared with the checksums in the manifest; a large file that was found right and
    did not change since is not hashed again, unless --verify is given.
    """
    from edge_vlm.bundle.checksums import verify
    from edge_vlm.cli.choose import open_bundle
    from edge_vlm.errors import BundleError, label
    from edge_vlm.planning.tuning import load_tuning, tuning_line

    bundle = open_bundle(model)
    failure: BundleError | None = None
    try:
        verify(bundle, again=again)
    except BundleError as error:
        failure = error
    manifest = bundle.manifest
    tuning = load_tuning(manifest)
    if as_json:
        data = {
            "path": str(bundle.path),
            "verified": failure is None,
            "tuning": dataclasses.asdict(tuning) if tuning else None,
            **manifest.model_dump(),
        }
        write_json(data)
    else:
        processor, decoder = manifest.image_processor, manifest.decoder
        revision = f" at {manifest.model.revision}" if manifest.model.revision else ""
        lines = {
            "model": manifest.model.name,
            "licence": manifest.model.license or "not stated",
            "source": f"{manifest.model.source}{revision}",
            "folder": label(bundle.path),
            "vision": f"{manifest.vision.precision}, {manifest.vision.n_layers} layers",
            "decoder": f"{decoder.precision}, {decoder.n_layers} layers of width"
            f" {decoder.hidden_size}, {decoder.vocab_size} ids",
            "pictures": processor.description,
            "KV cache": f"{decoder.kv_bytes_per_token()} bytes a token (f16)",
            "files": ", ".join(f"{n} {r.size / 1e6:.1f} MB" for n, r in manifest.files.items()),
            "written by": ", ".join(f"{n} {v}" for n, v in manifest.created_with.items()),
            "verified": "no" if failure else "yes",
            "tuned": tuning_line(tuning) if tuning else "no; 'edge-vlm tune' does it",
        }
        echo_lines(lines, 11)
    if failure:
        raise failure
