"""An estimate of the memory that a training run takes."""

import heapq
from typing import Any

import torch
from torch import Tensor


def estimate_memory(trainer: Any) -> dict[str, int]:
    """Return bytes by part: the frozen weights, the adapter with gradients and optimizer, and the activations.

    The activations are those that one forward pass of the longest rows keeps for backward, counted as it runs.
    A step also needs workspace, and the allocator rounds up: expect a tenth more.

    Args:
        trainer: A trainer that is ready to train, on one process.
    """
    parameters = list(trainer.model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    weights = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parameters}
    buffers = {b.untyped_storage().data_ptr(): b.untyped_storage().nbytes() for b in trainer.model.buffers()}
    adapter = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    # Gradients have the adapter's dtype; the optimizers differ, and Adam's two moments are the common case.
    return {
        "frozen weights": sum((weights | buffers).values()) - adapter,
        "adapter, gradients, optimizer": adapter + trained * (4 + 8),
        "activations": _activations(trainer, set(weights) | set(buffers)),
    }


def _activations(trainer: Any, known: set[int]) -> int:
    count = trainer.args.per_device_train_batch_size
    rows = heapq.nlargest(count, trainer.train_dataset, key=lambda row: len(row["input_ids"]))
    columns = ("input_ids", "labels", "position_ids", "seq_lengths")
    batch = trainer.data_collator([{k: v for k, v in row.items() if k in columns} for row in rows])
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model = trainer.model
    if trainer.args.gradient_checkpointing:  # the Trainer turns it on when the training begins
        model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    was_training = model.training
    model.train()
    try:
        with (
            torch.random.fork_rng(),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            trainer.compute_loss_context_manager(),
        ):
            loss = trainer.compute_loss(model, trainer._prepare_inputs(batch))
    finally:
        model.train(was_training)
    del loss
    return sum(kept.values())
