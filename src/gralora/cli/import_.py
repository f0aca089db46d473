"""`gralora import`."""

from typing import Annotated

from gralora.cli.options import argument, option


def import_(
    adapter: Annotated[str, argument("Folder of the adapter to convert.", "ADAPTER")],
    output: Annotated[str, argument("Folder to write.", "OUTPUT")],
    k: Annotated[int, option("For a LoRA: blocks per side.", default=2)] = 2,
    hybrid: Annotated[
        bool, option("For a LoRA: keep it as the hybrid part, and add new blocks that start at zero.", "--hybrid")
    ] = False,
    r: Annotated[
        int | None,
        option("With --hybrid: rank of the new blocks.", default="the LoRA's rank, rounded up to a multiple of k"),
    ] = None,
    overwrite: Annotated[bool, option("Replace an adapter at OUTPUT.", "--overwrite")] = False,
) -> None:
    """Convert a LoRA adapter, or one written by the GraLoRA authors' repository, to GraLoRA.

    The result computes the same update. A LoRA becomes a GraLoRA of k times its rank, whose blocks can then be
    trained independently.
    """
    from gralora.files.adapter_config import read_config
    from gralora.importing.authors import import_original
    from gralora.importing.lora import from_lora

    if read_config(adapter).get("peft_type") == "LORA":
        imported = from_lora(adapter, output, k=k, hybrid=hybrid, r=r, overwrite=overwrite)
    else:
        imported = import_original(adapter, output, overwrite=overwrite)
    config = imported.config
    print(
        f"wrote {output}: GraLoRA with r={config['r']}, hybrid_r={config['hybrid_r']}, k={config['gralora_k']}, "
        f"alpha={config['alpha']:g}"
    )
