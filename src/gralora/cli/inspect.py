"""`gralora inspect`."""

import json
from typing import Annotated

from gralora.cli.options import argument, option
from gralora.report.inspect import Report
from gralora.report.inspect import inspect as measure
from gralora.report.plot import plot as draw


def inspect(
    adapter: Annotated[str, argument("Folder of an adapter.", "ADAPTER")],
    base: Annotated[str | None, option("Folder of the base model, for ‖ΔW‖ relative to ‖W‖.")] = None,
    plot: Annotated[str | None, option("Picture to write, .png or .svg: ‖ΔW‖ by depth and by block.")] = None,
    layer: Annotated[
        str | None, option("Layer whose blocks the picture shows.", default="the one with the largest ‖ΔW‖")
    ] = None,
    as_json: Annotated[bool, option("Print JSON instead of a table.", "--json")] = False,
    overwrite: Annotated[bool, option("Replace the picture.", "--overwrite")] = False,
) -> None:
    """Show the settings, norms and ranks of an adapter, layer by layer, and what can serve it."""
    if plot is None and layer is not None:
        raise ValueError("`layer` must come with `plot`.")
    if plot is None and overwrite:
        raise ValueError("`overwrite` must come with `plot`.")
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
            f"{entry.target} ({entry.experts} experts)" if entry.experts else entry.target,
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
        f"{len(report.layers)} weights, {report.parameters:,} parameters, {report.bytes / 1e6:.1f} MB, "
        f"‖ΔW‖ {report.norm:.3g} in all, base {report.base_model or 'not named'}"
    )
    if report.also_trained:
        print(f"also trained: {', '.join(report.also_trained[:4])}" + (", …" if report.also_trained[4:] else ""))
    print(f"served on: {report.served_on}")
