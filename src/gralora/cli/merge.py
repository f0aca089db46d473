"""`gralora merge`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from gralora.checks import dtype_name
from gralora.cli.options import argument, option

if TYPE_CHECKING:
    from rich.console import Console

    from gralora.export.merged_model import MergeReport


def merge(
    base: Annotated[str, argument("Base model: a folder, a name on the hub or a GGUF file.", "BASE")],
    adapter: Annotated[str, argument("Folder of the adapter.", "ADAPTER")],
    output: Annotated[str, argument("Folder to write.", "OUTPUT")],
    dtype: Annotated[
        str, option("float32, bfloat16, float16, or auto for the stored dtype of the base.", default="auto")
    ] = "auto",
    adapters: Annotated[list[str], option("Another adapter to add; repeatable.", "--adapter")] = [],  # noqa: B006
    weights: Annotated[
        list[float], option("Factor of each adapter's update, in their order.", "--weight", default=1)
    ] = [],  # noqa: B006
    requantize: Annotated[
        bool, option("Keep the format of a quantised base; excludes --dtype.", "--requantize")
    ] = False,
    overwrite: Annotated[bool, option("Replace a model at OUTPUT.", "--overwrite")] = False,
) -> None:
    """Merge an adapter into its base model and write a plain transformers model.

    The output appears when it is complete. It is read back and compared with base + update.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from gralora.export.merged_model import MergeOptions, merge_to_folder
    from gralora.recipe.progress import ConsoleReporter, quiet_libraries

    options = MergeOptions(base, (adapter, *adapters), output, tuple(weights), dtype, requantize, overwrite)
    console = Console()
    columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=Console(stderr=True))

    def on_layer(done: int, total: int) -> None:
        # Not before the first layer: a refusal would leave an empty line behind.
        progress.start()
        bar = progress.task_ids[0] if progress.task_ids else progress.add_task("merging")
        progress.update(bar, completed=done, total=total)

    with quiet_libraries(ConsoleReporter()):
        try:
            report = merge_to_folder(options, on_layer)
        finally:
            if progress.live.is_started:
                progress.stop()
    _print(console, report)


def _print(console: Console, report: MergeReport) -> None:
    if report.dequantised:
        console.print(
            "The base is quantised: its weights were dequantised and merged into "
            f"{dtype_name(report.dtype)}. --requantize keeps the format.",
            highlight=False,
        )
    if report.requantisation:
        from rich.table import Table

        table = Table("layer", "relative error against base + update", title="quantised again")
        for name, error in report.requantisation.items():
            table.add_row(name, f"{error:.2e}")
        console.print(table)
    if report.sampled:
        console.print(
            f"Largest deviation from base + update over {len(report.sampled)} layers read back: {report.deviation:.2e} "
            f"(rounding to {dtype_name(report.dtype)} included)",
            highlight=False,
        )
    if not report.tokenizer:
        console.print("No tokenizer was found in the adapters or the base; none was written.", highlight=False)
    console.print(f"Merged {report.layers} layers into {report.output}", highlight=False, soft_wrap=True)
