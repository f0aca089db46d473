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
    columns = {heading: [cell(layers) for _, layers in groups] for heading, cell in _COLUMNS.items()}
    if every:
        del columns["", "layers"]
    if all(layer.relative_norm is None for layer in report.layers):
        del columns["‖ΔW‖", "/‖W‖"]
    columns = {heading: [*heading, *cells] for heading, cells in columns.items()}
    widths = [max(map(len, cells)) for cells in columns.values()]
    experts = [f" ({layers[0].experts} experts)" if layers[0].experts else "" for _, layers in groups]
    taken = sum(widths) + max(map(len, experts))
    space = "  " if width - taken - 2 * len(widths) >= _NARROWEST_NAME else " "
    room = max(_NARROWEST_NAME, width - taken - len(space) * len(widths))
    names = zip(shortened([name for name, _ in groups], room), experts, strict=True)
    first = ["", "target", *(name + count for name, count in names)]
    widest = max(map(len, first))
    for name, *row in zip(first, *columns.values(), strict=True):
        cells = [name.ljust(widest), *(cell.rjust(n) for cell, n in zip(row, widths, strict=True))]
        yield space.join(cells).rstrip()


def _range(values: Iterable[float], text: Callable[[float], str], coarse: Callable[[float], str] | None = None) -> str:
    """Return one number, or the lowest and the highest in a coarser form."""
    values = list(values)
    if not values:
        return "-"
    low, high = min(values), max(values)
    if text(low) == text(high):
        return text(low)
    return "–".join(dict.fromkeys(map(coarse or text, (low, high))))  # noqa: RUF001 (a hyphen could be an exponent's)


def _ranks(layers: Sequence[LayerReport]) -> str:
    hybrid = _range((layer.hybrid_r for layer in layers), str)
    return _range((layer.r for layer in layers), str) + (f"+{hybrid}" if hybrid != "0" else "")


def _two_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:#.2g}"


# The cells of a row by the two lines of the heading.
_COLUMNS: dict[tuple[str, str], Callable[[Sequence[LayerReport]], str]] = {
    ("", "layers"): lambda layers: str(len(layers)),
    ("", "r"): _ranks,
    ("", "k"): lambda layers: _range((layer.k for layer in layers), str),
    ("", "scale"): lambda layers: _range((layer.scale for layer in layers), "{:g}".format),
    ("", "‖ΔW‖"): lambda layers: _range((layer.norm for layer in layers), "{:.3g}".format, _two_digits),
    ("‖ΔW‖", "/‖W‖"): lambda layers: _range(
        (layer.relative_norm for layer in layers if layer.relative_norm is not None), "{:.2%}".format, "{:.1%}".format
    ),
    ("eff.", "rank"): lambda layers: _range(
        (layer.effective_rank for layer in layers), "{:.1f}".format, "{:.0f}".format
    ),
    ("LoRA", "rank"): lambda layers: _range((layer.lora_rank for layer in layers), str),
    ("", "needed"): lambda layers: _range((layer.needed_rank for layer in layers), str),
}
