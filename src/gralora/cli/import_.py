"""`gralora import`."""

from pathlib import Path
from typing import Annotated

import typer

from gralora.files.checkpoint import read_config
from gralora.importing.authors import import_original
from gralora.importing.lora import from_lora


def import_(
    adapter: Annotated[str, typer.Argument(help="Folder of the adapter to take over.", show_default=False)],
    output: Annotated[str, typer.Argument(help="Folder to write.", show_default=False)],
    k: Annotated[int, typer.Option(help="Of a LoRA: blocks per side.")] = 2,
    hybrid: Annotated[
        bool, typer.Option("--hybrid", help="Of a LoRA: keep it as the hybrid part, beside new blocks at zero.")
    ] = False,
    r: Annotated[
        int | None,
        typer.Option(help="With --hybrid: rank of the new blocks. [default: that of the LoRA]", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter at OUTPUT.")] = False,
) -> None:
    """Take over a LoRA adapter, or one written by the GraLoRA authors' repository.

    The result is the same map. A LoRA of rank q becomes a GraLoRA of rank k·q, whose blocks can then move on their own.
    """
    if read_config(Path(adapter)).get("peft_type") == "LORA":
        imported = from_lora(adapter, output, k=k, hybrid=hybrid, r=r, overwrite=overwrite)
    else:
        imported = import_original(adapter, output, overwrite=overwrite)
    config = imported.config
    print(
        f"wrote {output}: GraLoRA with r={config['r']}, hybrid_r={config['hybrid_r']}, k={config['gralora_k']}, "
        f"alpha={config['alpha']:g}"
    )
