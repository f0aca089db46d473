"""`gralora inspect`."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Annotated

from gralora.cli.options import argument, option

if TYPE_CHECKING:
    from gralora.report.inspect import LayerReport, Report

_SPACE = "  "
_NARROWEST_NAME = 12
_NAMES_SHOWN = 4


def inspect(
    adapter: Annotated[str, argument("Folder of an adapter.", "ADAPTER")],
    base: Annotated[str | None, option("Folder of the base model, for ‖ΔW‖ relative to ‖W‖.")] = None,
    every: Annotated[bool, option("Show each layer, not each kind of module.", "--all")] = False,
    plot: Annotated[str | None, option("Picture to write, .png or .svg: ‖ΔW‖ by depth and by block.")] = None,
    layer: Annotated[
        str | None, option("Layer whose blocks the picture shows.", default="the one with the largest ‖ΔW‖")
    ] = None,
    as_json: Annotated[bool, option("Print each layer as JSON instead of a table.", "--json")] = False,
    overwrite: Annotated[bool, option("Replace the picture.", "--overwrite")] = False,
) -> None:
    """Show the settings, norms and ranks of an adapter, and what can serve it."""
    if plot is None and layer is not None:
        raise ValueError("`layer` must come with `plot`.")
    if plot is None and overwrite:
        raise ValueError("`overwrite` must come with `plot`.")
    from gralora.report.inspect import inspect as measure
    from gralora.report.plot import plot as draw

    report = measure(adapter, base)
    if plot:
        draw(report, plot, layer, overwrite)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        _print_report(report, every)
        if plot:
            print(f"wrote {plot}")


def _print_report(report: Report, every: bool) -> None:
    width = shutil.get_terminal_size().columns
    for line in _table(report, every, width):
        print(line)
    print()
    summary = (
        f"{len(report.layers)} weights, {report.parameters:,} parameters, {report.bytes / 1e6:.1f} MB, "
        f"‖ΔW‖ {report.norm:.3g} in all, base {report.base_model or 'not named'}"
    )
    _print_wrapped(summary, width)
    if report.also_trained:
        more = ", …" if report.also_trained[_NAMES_SHOWN:] else ""
        _print_wrapped(f"also trained: {', '.join(report.also_trained[:_NAMES_SHOWN])}{more}", width)
    _print_wrapped(f"served on: {report.served_on}", width)


def _print_wrapped(text: str, width: int) -> None:
    print(textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False))


def _table(report: Report, every: bool, width: int) -> Iterable[str]:
    """Yield the lines of the table; names are shortened so that they fit `width`."""
    from gralora.report.groups import by_kind, shortened

    groups = [(layer.target, (layer,)) for layer in report.layers] if every else list(by_kind(report.layers))
    headings = ["r", "k", "scale", "‖ΔW‖", "‖ΔW‖/‖W‖", "eff. rank", "LoRA rank", "needed"]
    rows = [_cells(layers) for _, layers in groups]
    if not every:
        headings.insert(0, "layers")
        rows = [[str(len(layers)), *row] for row, (_, layers) in zip(rows, groups, strict=True)]
    if all(layer.relative_norm is None for layer in report.layers):
        column = headings.index("‖ΔW‖/‖W‖")
        del headings[column]
        for row in rows:
            del row[column]
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    room = width - sum(n + len(_SPACE) for n in widths)
    experts = [f" ({layers[0].experts} experts)" if layers[0].experts else "" for _, layers in groups]
    room = max(_NARROWEST_NAME, room - max(map(len, experts)))
    names = [name + count for name, count in zip(shortened([name for name, _ in groups], room), experts, strict=True)]
    first = max(map(len, ("target", *names)))
    for name, row in zip(("target", *names), (headings, *rows), strict=True):
        yield _SPACE.join([name.ljust(first), *(cell.rjust(n) for cell, n in zip(row, widths, strict=True))])


def _cells(layers: Sequence[LayerReport]) -> list[str]:
    """Return the numbers of some layers, as ranges where they differ."""
    hybrid = _range([layer.hybrid_r for layer in layers], str)
    relative = [layer.relative_norm for layer in layers if layer.relative_norm is not None]
    return [
        _range([layer.r for layer in layers], str) + (f"+{hybrid}" if hybrid != "0" else ""),
        _range([layer.k for layer in layers], str),
        _range([layer.scale for layer in layers], "{:g}".format),
        _range([layer.norm for layer in layers], "{:.3g}".format),
        _range(relative, "{:.2%}".format),
        _range([layer.effective_rank for layer in layers], "{:.1f}".format),
        _range([layer.lora_rank for layer in layers], str),
        _range([layer.needed_rank for layer in layers], str),
    ]


def _range(values: Sequence[float], text: Callable[[float], str]) -> str:
    if not values:
        return "-"
    low, high = text(min(values)), text(max(values))
    return low if low == high else f"{low}–{high}"  # noqa: RUF001 (a hyphen could be of an exponent)
