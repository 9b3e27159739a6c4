"""Muon for the matrices inside the blocks, AdamW for everything else, as one optimizer for the Trainer."""

from collections.abc import Callable

import torch
from torch import nn


class MuonAdamW(torch.optim.Optimizer):
    """Two library optimizers behind one interface.

    Muon orthogonalises the momentum of weight matrices, which brings induction (copying) many steps earlier than AdamW
    does on small models; embeddings, norms and biases are not matrices in that sense and stay with AdamW.

    Args:
        model: a causal language model, or a part of one; its embedding and output head count as AdamW's.
        learning_rate: shared peak rate; Muon's update is scaled to AdamW's root mean square.
        weight_decay: decoupled, on the matrices only.
    """

    def __init__(self, model: nn.Module, learning_rate: float, weight_decay: float = 0.01) -> None:
        tables = (model.get_input_embeddings(), model.get_output_embeddings())
        embeddings = {id(table.weight) for table in tables if table is not None}
        matrices, others = [], []
        for parameter in model.parameters():
            is_matrix = parameter.ndim == 2 and id(parameter) not in embeddings
            (matrices if is_matrix else others).append(parameter)
        self.parts = [
            torch.optim.Muon(
                matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw", nesterov=True
            ),
            torch.optim.AdamW(others, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.95), fused=True),
        ]
        super().__init__([*matrices, *others], {"lr": learning_rate})
        # the very groups of the parts, so that a scheduler moves their rates
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of all parameters."""
        loss = closure() if closure else None
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict:
        """State of both parts."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore what `state_dict` gave."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
