"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) for a whole model, as one optimizer.

`torch.optim.Muon` takes 2-D parameters alone. Here it steps the matrices of the hidden layers and AdamW the rest,
behind one set of `param_groups` and one state, so that schedulers, accelerate and checkpoints see an ordinary
optimizer. Updates are scaled to AdamW's size (Liu et al. 2025, arXiv 2502.16982), so one learning rate serves both.
Matrices of one shape are orthogonalised together: torch takes one after the other, which for small ones is mostly overhead.

Left out: sharded parameters (FSDP, DeepSpeed), whose matrices no process holds whole.
"""

from collections import defaultdict

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def hidden_matrices(model: PreTrainedModel) -> list[nn.Parameter]:
    """The trainable 2-D weights of a model, less its token and position embeddings and its output layer."""
    outside = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    if head is not None:
        outside.add(id(head.weight))
    return [p for p in model.parameters() if p.requires_grad and p.ndim == 2 and id(p) not in outside]


def orthogonalise(updates_NRC: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """N matrices (R, C) with their singular values moved to about 1 by Newton-Schulz iterations, in bfloat16 as torch's."""
    a, b, c = coefficients
    x = updates_NRC.bfloat16()
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = x / torch.stack([matrix.norm() for matrix in x]).clamp(min=eps)[:, None, None]
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


class BatchedMuon(torch.optim.Muon):
    """torch's Muon with `adjust_lr_fn="match_rms_adamw"`, which takes the same steps with all matrices of one shape at once."""

    LARGEST = 2**24  # elements of a batch: what it costs is memory for a few copies of them in bfloat16

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
            grads, buffers = [p.grad for p in params], [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
            updates = torch._foreach_lerp(grads, buffers, group["momentum"]) if group["nesterov"] else buffers
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            for part in self._batches(params):
                shape = params[part[0]].shape
                settings = group["ns_coefficients"], group["ns_steps"], group["eps"]
                directions = orthogonalise(torch.stack([updates[i] for i in part]), *settings)
                rate = group["lr"] * (0.2 * max(shape) ** 0.5)
                torch._foreach_add_([params[i] for i in part], list(directions.unbind()), alpha=-rate)

    def _batches(self, params: list[Tensor]) -> list[list[int]]:
        """Their indices, in lists of one shape, device and type, none with more than LARGEST elements."""
        alike = defaultdict(list)
        for i, p in enumerate(params):
            alike[p.shape, p.device, p.dtype].append(i)
        batches = []
        for (shape, *_), members in alike.items():
            most = max(1, self.LARGEST // shape.numel())
            batches += [members[i : i + most] for i in range(0, len(members), most)]
        return batches


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
            BatchedMuon(matrices, lr=lr, momentum=momentum, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
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
