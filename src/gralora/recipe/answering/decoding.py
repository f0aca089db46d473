"""Generating tokens: what scoring and answering share."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gralora.recipe.data import template_stop_ids


def generate_ids(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    max_new_tokens: int,
    streamer: Any = None,
    in_step: bool = False,
    **sampling: Any,
) -> torch.Tensor:
    """Return the tokens that the model adds to each prompt, padded at the end.

    An answer ends at a stop token of the model, of the tokenizer or of the chat template.

    Args:
        model: A causal language model.
        tokenizer: The tokenizer of the model.
        prompts: Tokens of each prompt.
        max_new_tokens: Maximum length of an answer.
        streamer: Receives the tokens one by one; a transformers streamer takes a single prompt.
        in_step: Whether several processes share one model, so that none may stop before the others.
        **sampling: Fields of transformers' `GenerationConfig`.
    """
    from transformers import GenerationConfig

    padding = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    longest = max(map(len, prompts))
    # Left, so that the last position of every row is the last token of its prompt.
    ids = torch.tensor([[padding] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    known = getattr(model.generation_config, "eos_token_id", None)
    stops = {*([known] if isinstance(known, int) else known or ()), *template_stop_ids(tokenizer)}
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stops) or None,
        pad_token_id=padding,
        use_cache=True,
        **sampling,
    )
    with torch.no_grad(), _without_router_losses(model):
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=settings,
            streamer=streamer,
            synced_gpus=in_step,
        )
    return output[:, longest:]


@contextmanager
def _without_router_losses(model: Any) -> Iterator[None]:
    """Keep a mixture of experts from computing its load-balancing loss.

    Training turns it on in the config, and it fails on the few tokens of a step of generation, for which the mask of
    all tokens is too long.
    """
    config = getattr(model, "config", None)
    configs = {} if config is None else {id(c): c for c in (config, config.get_text_config())}
    asking = [c for c in configs.values() if getattr(c, "output_router_logits", False)]
    for c in asking:
        c.output_router_logits = False
    try:
        yield
    finally:
        for c in asking:
            c.output_router_logits = True
