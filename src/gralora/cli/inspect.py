"""`gralora inspect`."""

import json
from typing import Annotated

import typer

from gralora.report.inspect import Report
from gralora.report.inspect import inspect as measure
from gralora.report.plot import plot as draw


def inspect(
    adapter: Annotated[str, typer.Argument(help="Folder of an adapter.", show_default=False)],
    base: Annotated[
        str | None, typer.Option(help="Folder of the base model, for ‖ΔW‖ relative to ‖W‖.", show_default=False)
    ] = None,
    plot: Annotated[
        str | None, typer.Option(help="Picture to write, .png or .svg: ‖ΔW‖ by depth, blocks.", show_default=False)
    ] = None,
    layer: Annotated[
        str | None, typer.Option(help="Whose blocks the picture shows. [default: the largest]", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the picture.")] = False,
) -> None:
    """Say what an adapter is and does, layer by layer, and what it can be served on."""
    report = measure(adapter, base)
    if plot:
        draw(report, plot, layer, overwrite)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        _print_table(report)
        if plot:
            print(f"wrote {plot}")


def _print_table(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("target", overflow="fold")
    for heading in ("r", "k", "scale", "‖ΔW‖", "‖ΔW‖/‖W‖", "eff. rank", "LoRA rank", "needed"):
        table.add_column(heading, justify="right")
    for entry in report.layers:
        table.add_row(
            entry.target,
            f"{entry.r}+{entry.hybrid_r}" if entry.hybrid_r else str(entry.r),
            str(entry.k),
            f"{entry.scale:g}",
            f"{entry.norm:.3g}",
            "-" if entry.relative_norm is None else f"{entry.relative_norm:.2%}",
            f"{entry.effective_rank:.1f}",
            str(entry.lora_rank),
            str(entry.needed_rank),
        )
    Console().print(table)
    print(
        f"{len(report.layers)} modules, {report.parameters:,} parameters, {report.bytes / 1e6:.1f} MB, "
        f"‖ΔW‖ {report.norm:.3g} in all, base {report.base_model or 'not named'}"
    )
    if report.also_trained:
        print(f"also trained: {', '.join(report.also_trained[:4])}" + (", …" if report.also_trained[4:] else ""))
    print(f"served on: {report.served_on}")
