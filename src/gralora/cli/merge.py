"""`gralora merge`."""

from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from gralora.export.merged_model import MergeOptions, MergeReport, merge_to_folder
from gralora.recipe.progress import ConsoleReporter, quiet_libraries


def merge(
    base: Annotated[str, typer.Argument(help="Base model: a folder, a name on the hub or a GGUF file.")],
    adapter: Annotated[str, typer.Argument(help="Folder of the adapter.")],
    output: Annotated[str, typer.Argument(help="Folder to write.")],
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16 or float16; auto is as the base is stored.")
    ] = "auto",
    another: Annotated[list[str], typer.Option("--adapter", help="Another adapter to add; repeatable.")] = [],  # noqa: B006
    weight: Annotated[
        list[float], typer.Option(help="Factor of each adapter's update, ADAPTER first; 1 by default.")
    ] = [],  # noqa: B006
    requantize: Annotated[bool, typer.Option("--requantize", help="Keep the format of a quantised base.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model at OUTPUT.")] = False,
) -> None:
    """Merge an adapter into its base model and write a plain transformers model.

    It appears when it is whole; what was written is read back and compared with base + update.
    """
    options = MergeOptions(base, (adapter, *another), output, tuple(weight), dtype, requantize, overwrite)
    console = Console()
    columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with quiet_libraries(ConsoleReporter()), Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("merging", total=None)
        report = merge_to_folder(options, lambda done, total: progress.update(bar, completed=done, total=total))
    _print(console, report)


def _print(console: Console, report: MergeReport) -> None:
    if report.dequantised:
        console.print(
            "The base is quantised: its weights were dequantised and merged into "
            f"{str(report.dtype).removeprefix('torch.')}. --requantize keeps the format.",
            highlight=False,
        )
    if report.requantisation:
        table = Table("layer", "relative error against base + update", title="quantised again")
        for name, error in report.requantisation.items():
            table.add_row(name, f"{error:.2e}")
        console.print(table)
    if report.sampled:
        console.print(
            f"Largest deviation from base + update over {len(report.sampled)} layers read back: {report.deviation:.2e} "
            f"(rounding to {str(report.dtype).removeprefix('torch.')} included)",
            highlight=False,
        )
    console.print(f"Merged {report.layers} layers into {report.output}", highlight=False, soft_wrap=True)
