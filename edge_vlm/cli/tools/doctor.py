"""``edge-vlm doctor``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from edge_vlm.cli.options import output_options
from edge_vlm.cli.session import session
from edge_vlm.cli.streams import write, write_json
from edge_vlm.cli.table import echo_lines

if TYPE_CHECKING:
    from edge_vlm.measure.doctor import Report


@click.command("doctor")
@output_options
def command(as_json: bool) -> None:
    """Show what this machine is, how the engines were built, and what would make it faster.

    Nothing is changed and nothing leaves the machine. The exit code is 1 when an engine does not
    load.
    """
    from edge_vlm.measure.doctor import examine

    report = examine()
    if as_json:
        write_json(report.to_dict())
    else:
        _show(report, session().verbose)
    if report.errors:
        raise SystemExit(1)


def _show(report: Report, verbose: bool) -> None:
    import platform

    from edge_vlm.measure.doctor import instruction_sets

    machine = report.machine
    limit = f", limited to {machine.cpu_limit:g}" if machine.cpu_limit else ""
    memory_limit = f", limited to {_gb(machine.memory_limit)}" if machine.memory_limit else ""
    lines = {
        "system": f"{machine.system}, {machine.architecture}, Python {platform.python_version()}",
        "processor": machine.processor,
        "instructions": " ".join(instruction_sets(machine)) or "none that the engines use",
        "cores": f"{machine.physical_cores or 'unknown'} physical, {machine.logical_cores} logical,"
        f" {machine.usable_cores} usable{limit}; {report.threads} threads by default",
        "memory": f"{_gb(machine.memory)}, {_gb(machine.memory_available)} available{memory_limit}",
        "packages": ", ".join(f"{name} {version}" for name, version in report.packages.items()),
        "providers": ", ".join(report.providers) or "none",
        "vision": f"on {report.vision_provider}",
        "decoder": "on the GPU" if report.gpu_offload else "on cpu",
    }
    for backend, features in report.llama_build.items():
        names = (k if v == "1" else f"{k}={v}" for k, v in features.items() if v != "0")
        lines[f"llama.cpp {backend}"] = " ".join(names)
    if verbose:
        lines["all features"] = " ".join(sorted(machine.features))
    echo_lines(lines, 14)
    for error in report.errors:
        write(f"\nbroken: {error}")
    for advice in report.advice:
        write(f"\n{advice.problem}: {advice.effect}")
        if advice.command:
            write(f"  {advice.command}")
    if not report.advice and not report.errors:
        write("\nNothing to improve was found.")


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
