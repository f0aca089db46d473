"""Pictures of the size of an update: by depth and module, and by block inside one layer."""

import re
from pathlib import Path
from typing import Any

import torch

from gralora.files.atomic import appearing, check_output
from gralora.files.checkpoint import open_adapter
from gralora.optional import require
from gralora.report.inspect import Report, block_norms

_FORMATS = (".png", ".svg")
_INDEX = re.compile(r"\.(\d+)\.")


def plot(report: Report, output: str | Path, layer: str | None = None, overwrite: bool = False) -> Path:
    """Draw ‖ΔW‖ by depth, a line for each kind of module, and the k×k map of block norms of one layer.

    Args:
        report: Measurements of the adapter.
        output: File to write, `….png` or `….svg`.
        layer: Layer whose blocks are shown; None is the one with the largest ‖ΔW‖.
        overwrite: Replace the file.

    Raises:
        ValueError: `output` exists or has another suffix, or `layer` is not adapted.
        ImportError: matplotlib is not installed.
    """
    path = check_output(output, overwrite, kind="file")
    if path.suffix not in _FORMATS:
        raise ValueError(f"`output` must end in .png or .svg; got output={str(path)!r}.")
    targets = [entry.target for entry in report.layers]
    if layer is not None and layer not in targets:
        raise ValueError(f"`layer` must be an adapted one; got layer={layer!r}. The first is {targets[0]!r}.")
    require("matplotlib", extra="export")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_depths(left, report)
    _draw_blocks(right, report, layer or max(report.layers, key=lambda entry: entry.norm).target)
    with appearing(path) as file:
        figure.savefig(file, dpi=120)
    return path


def _draw_depths(axes: Any, report: Report) -> None:
    relative = all(entry.relative_norm is not None for entry in report.layers)
    lines: dict[str, list[tuple[int, float]]] = {}
    for entry in report.layers:
        found = _INDEX.search(f".{entry.target}.")
        value = entry.relative_norm if relative else entry.norm
        # A parameter that is called "weight" is known by its module.
        kind = entry.target.removesuffix(".weight").rpartition(".")[2]
        lines.setdefault(kind, []).append((int(found[1]) if found else 0, value or 0.0))
    for kind, points in lines.items():
        depths, values = zip(*sorted(points), strict=True)
        axes.plot(depths, values, marker=".", label=kind)
    axes.set_xlabel("depth")
    axes.set_ylabel("‖ΔW‖ / ‖W‖" if relative else "‖ΔW‖")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _draw_blocks(axes: Any, report: Report, target: str) -> None:
    adapter = open_adapter(report.adapter)
    layer = adapter.layers[target]
    norms = torch.stack([block_norms(factors, layer.scale) for factors in adapter.matrices(target)]).norm(dim=0)
    image = axes.imshow(norms.numpy(), vmin=0, cmap="viridis")
    axes.set_title(f"{target} ({layer.experts} experts)" if layer.experts else target, fontsize="small")
    axes.set_xlabel("input block j")
    axes.set_ylabel("output block i")
    axes.set_xticks(range(norms.shape[1]))
    axes.set_yticks(range(norms.shape[0]))
    axes.figure.colorbar(image, ax=axes, label="‖block‖")
