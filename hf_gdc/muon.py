"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) for a whole model, as one optimizer.

`torch.optim.Muon` takes 2-D parameters alone. Here it steps the matrices of the hidden layers and AdamW the rest,
behind one set of `param_groups` and one state, so that schedulers, accelerate and checkpoints see an ordinary
optimizer. Updates are scaled to AdamW's size (Liu et al. 2025, arXiv 2502.16982), so one learning rate serves both.

Left out: sharded parameters (FSDP, DeepSpeed), whose matrices no process holds whole.
"""

import torch
from torch import nn
from transformers import PreTrainedModel


def hidden_matrices(model: PreTrainedModel) -> list[nn.Parameter]:
    """The trainable 2-D weights of a model, less its token and position embeddings and its output layer."""
    outside = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    if head is not None:
        outside.add(id(head.weight))
    return [p for p in model.parameters() if p.requires_grad and p.ndim == 2 and id(p) not in outside]


class MuonAdamW(torch.optim.Optimizer):
    """Muon for a model's hidden matrices, AdamW for embeddings, output layer, norms and biases.

    Args:
        model: a transformers model.
        lr: the learning rate of both parts.
        momentum: Muon's.
        betas, eps: AdamW's.
        weight_decay: of the hidden matrices alone.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        lr: float = 5e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        matrices = hidden_matrices(model)
        chosen = {id(p) for p in matrices}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
        self._parts = [
            torch.optim.Muon(
                matrices, lr=lr, momentum=momentum, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(rest, lr=lr, betas=betas, eps=eps, weight_decay=0.0),
        ]
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let both parts work on the groups and the state of this optimizer."""
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)  # `load_state_dict` ends here, with new groups and a new state
        self._share()

    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss
