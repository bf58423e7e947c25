"""``edge-vlm verify``."""

from __future__ import annotations

from pathlib import Path

import click

from edge_vlm.cli.exporter import exporter
from edge_vlm.cli.options import FILE, UserPath, output_options
from edge_vlm.cli.streams import write, write_json


@click.command("verify")
@click.argument("model", required=False, envvar="EDGE_VLM_MODEL")
@click.option(
    "--against",
    type=UserPath(path_type=Path),
    metavar="CHECKPOINT",
    help="Measure the bundle against this checkpoint folder; needs edge-vlm[export].",
)
@click.option(
    "--adapter",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="With --against: the LoRA adapter that was merged into it.",
)
@click.option(
    "--samples",
    type=FILE,
    metavar="FOLDER|builtin",
    help="Measure on the held-out ones of these pictures; by default on a few built-in ones.",
)
@output_options
def command(
    model: str | None,
    against: Path | None,
    adapter: Path | None,
    samples: str | None,
    as_json: bool,
) -> None:
    """Check a bundle: hash its files, run a picture through it, show its report.

    The report is what the exporter measured. With --against it is measured again, and the command
    fails when a limit is not kept.

    \b
    edge-vlm verify ./jina-vlm-bundle
    edge-vlm verify ./jina-vlm-bundle --against ./jina-vlm
    """
    for option, value in (("--samples", samples), ("--adapter", adapter)):
        if value is not None and against is None:
            raise click.UsageError(f"{option} is for --against")
    measure = exporter("measure_bundle", "verify --against") if against is not None else None

    from edge_vlm.bundle.checksums import verify
    from edge_vlm.cli.choose import open_bundle
    from edge_vlm.cli.display import Steps
    from edge_vlm.errors import EdgeVLMError, label
    from edge_vlm.machine.settings import MachineSettings
    from edge_vlm.measure.check import check_sanity

    bundle = open_bundle(model)
    report, measured = bundle.manifest.report, None
    with Steps() as steps:
        verify(bundle, again=True, progress=lambda done, total: steps.show("hash", done, total))
        check_sanity(bundle, MachineSettings.from_environment())
        if measure:
            measured = measure(
                bundle, against, adapter=adapter, samples=samples, progress=steps.show
            )
    if as_json:
        data = {
            "path": str(bundle.path),
            "intact": True,
            "report": report.model_dump() if report else None,
            "measured": measured.model_dump() if measured else None,
            "failures": measured.failures if measured else [],
        }
        write_json(data)
    else:
        write(f"{label(bundle.path)}: intact, and it computes")
        for title, shown in (("as exported", report), ("measured now", measured)):
            if shown is not None:
                write(f"\n{title}\n{shown.text()}")
        if report is None:
            write("it has no report")
    if measured and measured.failures:
        raise EdgeVLMError(" and ".join(measured.failures))
