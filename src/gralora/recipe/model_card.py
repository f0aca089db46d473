"""The model card of an adapter: the README.md in its folder."""

import json
import os
from typing import Any

from gralora.optional import DEFAULT_MODEL, INSTALL_DEFAULT_MODEL
from gralora.recipe.options import TrainingOptions
from gralora.recipe.result import TrainingResult


def render(options: TrainingOptions, config: Any, global_batch: int, result: TrainingResult) -> str:
    """Return the model card of an adapter that `train` writes.

    Args:
        options: Options of the run.
        config: The adapter's `GraloraConfig`.
        global_batch: Number of rows in a step.
        result: Result of the run.
    """
    data = (
        ", ".join(map(_shown, options.data)) or "the packaged task of gralora: customer messages to JSON of four fields"
    )
    state = f"; interrupted, the run has {result.total_steps} steps" if result.interrupted else ""
    if result.stopped_early:
        state = f"; stopped early, the evaluation loss fell no more (of {result.total_steps} steps)"
    facts = {
        "base model": f"`{_shown(options.model)}`",
        "data": data,
        "steps": f"{result.steps} of {global_batch} rows{state}",
        "rank r, hybrid_r": f"{config.r}, {config.hybrid_r}",
        "blocks per side k": config.gralora_k,
        "alpha": f"{config.alpha:g}",
        "target modules": f"`{options.target_modules or 'as in the adapter that it started from'}`",
        "learning rate": f"{options.lr:g}, {options.scheduler}, with warm-up",
        "seed": options.seed,
    }
    if options.start_from:
        facts["started from"] = f"`{_shown(options.start_from)}`"
    if result.losses:
        facts["loss, first and last step"] = f"{result.losses[0]:.4f}, {result.losses[-1]:.4f}"
    if result.eval_losses:
        step, loss = min(result.eval_losses, key=lambda pair: pair[1])
        facts["evaluation loss, lowest and last"] = f"{loss:.4f} (step {step}), {result.eval_losses[-1][1]:.4f}"
    if result.best_step:
        facts["kept"] = f"the adapter of step {result.best_step}, for its evaluation loss"
    if result.before is not None:
        facts["exact match on held-out rows, before"] = f"{result.before:.1%}"
    if result.after is not None:
        facts["exact match on held-out rows, after"] = f"{result.after:.1%}"
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    curve = "\n![Training loss over the steps](loss.png)\n" if result.losses else ""
    return _CARD.format(metadata=_metadata(options.model), table=table, curve=curve, load=_load_snippet(options.model))


def _shown(name: str) -> str:
    """Return a name without the folders of the machine on which the run was made."""
    return os.path.basename(name.rstrip("/")) if os.path.isabs(name) else name


def _metadata(model: str) -> str:
    # The hub accepts only its own model names here, no paths.
    is_hub_name = model.count("/") == 1 and not model.startswith((".", "/", "~")) and not model.endswith(".gguf")
    return f"base_model: {json.dumps(model)}\n" if is_hub_name else ""


def _load_snippet(model: str) -> str:
    if model == DEFAULT_MODEL or model.endswith(".gguf"):
        install = f"    # {INSTALL_DEFAULT_MODEL}\n" if model == DEFAULT_MODEL else ""
        return (
            f"{install}    from gralora import PeftModel, pretrained\n\n"
            f"    base, tokenizer = pretrained.load({model!r})\n"
            '    model = PeftModel.from_pretrained(base, "path/to/this/folder")'
        )
    return (
        "    import gralora\n"
        "    from peft import PeftModel\n"
        "    from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"    base = AutoModelForCausalLM.from_pretrained({model!r})\n"
        f"    tokenizer = AutoTokenizer.from_pretrained({model!r})\n"
        '    model = PeftModel.from_pretrained(base, "path/to/this/folder")'
    )


_CARD = """\
---
{metadata}library_name: peft
pipeline_tag: text-generation
tags:
- gralora
---

# GraLoRA adapter

Trained with [gralora](https://pypi.org/project/gralora/): Granular Low-Rank Adaptation
([Jung et al., NeurIPS 2025](https://arxiv.org/abs/2505.20355)).

| | |
| --- | --- |
{table}
{curve}
## Use

On the command line:

    gralora generate path/to/this/folder --prompt "..."

In Python:

{load}
"""
