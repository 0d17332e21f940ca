"""Log-probabilities of completions: the one scoring path that serves reference, policy and teachers.

One pass through the backbone; the vocabulary's logits exist only for the completion's real tokens, and only a chunk of
them at a time, so that memory does not grow with length x vocabulary. The forward runs inside the wrapped module's own
`__call__` (DDP, FSDP, DeepSpeed), so gradient synchronisation and sharding hooks see an ordinary forward.

Exactness: float32 log-softmax at temperature 1, position ids that skip left padding, EOS scored once where the
completion's mask keeps it. Dropout is the caller's matter (`model.eval()` or `disable_dropout`).

Left out: sampling (`rollouts`) and losses (`objectives`). Shapes: B samples, P prompt, T completion, N real tokens,
H hidden, V vocabulary.
"""

import inspect
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass
class PolicyOutput:
    """What one forward gives per token, (B, T), 0 where the completion's mask is 0: log-probs and, if asked, entropies, a
    number of the caller's choice, and a critic's values before each token."""

    logps_BT: Tensor
    entropy_BT: Tensor | None = None
    extra_BT: Tensor | None = None
    values_BT: Tensor | None = None

    @property
    def logp_B(self) -> Tensor:
        """log pi(completion | prompt), in nats."""
        return self.logps_BT.sum(-1)


def causal_lm(model: nn.Module) -> nn.Module:
    """The causal LM itself, under a PEFT wrapper if there is one."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def evaluating(model: nn.Module):
    """Dropout and the like off for the duration."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def same_trainable(model: nn.Module):
    """PEFT freezes every adapter that it switches off: give each parameter back what it had."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, trainable in before:
            parameter.requires_grad_(trainable)


class Scorer:
    """Scores completions under one causal LM.

    Args:
        model: the unwrapped model (`PreTrainedModel` or `PeftModel`), before `accelerator.prepare`.
        autocast: gives the context for mixed precision, e.g. `accelerator.autocast`.
        chunk_elements: the most logits (tokens x vocabulary) that exist at once.

    `critic`, which may be set, gives values (N,) of the real tokens from `critic(hidden_NH, run)`: from the backbone's
    hidden states (N, H), or from those that `run(backbone)` gives of another one for the same inputs. It is a part of the
    wrapped module.
    """

    def __init__(self, model: nn.Module, autocast=nullcontext, chunk_elements: int = 2**24):
        self.critic: Callable | None = None
        self.model, self.autocast, self.chunk_elements = model, autocast, chunk_elements
        parameters = inspect.signature(causal_lm(model).forward).parameters
        self._accepts = {name for name in ("position_ids", "logits_to_keep") if name in parameters}
        self._head_is_separate = _head_is_separate(causal_lm(model))

    def __call__(
        self,
        prompt_ids_BP: Tensor,
        prompt_mask_BP: Tensor,
        completion_ids_BT: Tensor,
        completion_mask_BT: Tensor,
        module: nn.Module | None = None,
        entropy: bool = False,
        extra: Callable[[Tensor, slice], Tensor] | None = None,
        values: bool = False,
    ) -> PolicyOutput:
        """Log-probs of the completions.

        Args:
            prompt_ids_BP, prompt_mask_BP: left-padded prompts, mask 1 on real tokens.
            completion_ids_BT, completion_mask_BT: right-padded completions; the mask keeps the first EOS.
            module: the accelerate-wrapped model to run through (needed where gradients are wanted).
            entropy: also give the entropies of the next-token distributions, without gradient.
            extra: one more number per token, (n,), from the log-probs (n, V) of the n of all real tokens that the slice
                says, with gradient. Called once more in the backward pass where tokens come in chunks.
            values: also give the critic's values.
        """
        inputs, keep = self._inputs(prompt_ids_BP, prompt_mask_BP, completion_ids_BT, completion_mask_BT)
        length, targets_N = keep.shape[1], completion_ids_BT[keep]
        if self._head_is_separate or values:
            whole = self.model.forward  # the wrapper's call replaces it meanwhile
            per_token = _run_inside(
                self.model if module is None else module,
                self.model,
                lambda: self._backbone_pass(whole, inputs, keep, targets_N, entropy, extra, values),
            )
        else:
            with self.autocast():
                logits_BTV = (self.model if module is None else module)(**inputs).logits[:, -length:]
            per_token = _token_stats(logits_BTV[keep], targets_N, entropy, extra, slice(0, len(targets_N)))

        def spread(numbers_N: Tensor) -> Tensor:
            return torch.zeros(keep.shape, dtype=numbers_N.dtype, device=keep.device).masked_scatter(keep, numbers_N)

        return PolicyOutput(**{name: spread(numbers_N) for name, numbers_N in per_token.items()})

    @torch.no_grad()
    def token_logits(self, rollouts) -> Callable[[slice], Tensor]:
        """The logits (n, V) at a slice of the completions' real tokens, without gradient; the head runs when asked."""
        inputs, keep = self._inputs(
            rollouts.prompt_ids_BP,
            rollouts.prompt_mask_BP,
            rollouts.completion_ids_BT,
            rollouts.completion_mask_BT,
        )
        lm, length = causal_lm(self.model), keep.shape[1]
        if not self._head_is_separate:
            logits_NV = self.model(**inputs).logits[:, -length:][keep]
            return lambda part: logits_NV[part]
        hidden_NH = lm.base_model(**inputs).last_hidden_state[:, -length:][keep]
        head = lm.get_output_embeddings()

        def logits(part: slice) -> Tensor:
            with torch.no_grad(), torch.autocast(hidden_NH.device.type, enabled=False):  # called inside the policy's
                return head(hidden_NH[part])

        return logits

    def _inputs(
        self, prompt_ids_BP: Tensor, prompt_mask_BP: Tensor, completion_ids_BT: Tensor, completion_mask_BT: Tensor
    ) -> tuple[dict[str, Any], Tensor]:
        """Arguments of the model's forward, and where completions have real tokens, (B, T) bool."""
        length = completion_ids_BT.shape[1]
        ids = torch.cat([prompt_ids_BP, completion_ids_BT[:, :-1]], 1)  # the last token is only a target
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        if not bool(prompt_mask_BP.all()):  # right padding needs no mask: causality hides it from the real tokens
            mask = torch.cat([prompt_mask_BP, completion_mask_BT[:, :-1]], 1).long()
            inputs["attention_mask"] = mask
            if "position_ids" in self._accepts:
                inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
        if not self._head_is_separate and "logits_to_keep" in self._accepts:
            inputs["logits_to_keep"] = length
        return inputs, completion_mask_BT.bool()

    def _backbone_pass(
        self, whole: Callable, inputs: dict, keep_BT: Tensor, targets_N: Tensor, entropy: bool, extra, values: bool
    ) -> dict[str, Tensor]:
        """Numbers (N,) of the real tokens; `whole` is the model's own forward."""
        lm, length = causal_lm(self.model), keep_BT.shape[1]

        def run(backbone: nn.Module) -> Tensor:
            plain = {name: value for name, value in inputs.items() if name != "logits_to_keep"}
            return backbone(**plain).last_hidden_state[:, -length:][keep_BT]

        with self.autocast():
            if self._head_is_separate:
                hidden_NH = run(lm.base_model)
                per_token = self._in_chunks(lm.get_output_embeddings(), hidden_NH, targets_N, entropy, extra)
            else:
                out = whole(**inputs, output_hidden_states=True)
                hidden_NH, logits_NV = out.hidden_states[-1][:, -length:][keep_BT], out.logits[:, -length:][keep_BT]
                per_token = _token_stats(logits_NV, targets_N, entropy, extra, slice(0, len(targets_N)))
            return per_token | ({"values_BT": self.critic(hidden_NH, run)} if values else {})

    def rollouts(
        self, rollouts, module: nn.Module | None = None, entropy: bool = False, extra=None, values: bool = False
    ) -> PolicyOutput:
        """The same for `Rollouts`."""
        return self(
            rollouts.prompt_ids_BP,
            rollouts.prompt_mask_BP,
            rollouts.completion_ids_BT,
            rollouts.completion_mask_BT,
            module,
            entropy,
            extra,
            values,
        )

    def _in_chunks(
        self, head: nn.Module, hidden_NH: Tensor, targets_N: Tensor, entropy: bool, extra
    ) -> dict[str, Tensor]:
        size, total = max(1, self.chunk_elements // head.weight.shape[0]), len(targets_N)

        def chunk_stats(hidden: Tensor, targets: Tensor, part: slice) -> dict[str, Tensor]:
            return _token_stats(head(hidden), targets, entropy, extra, part)

        parts = [slice(at, min(at + size, total)) for at in range(0, total, size)]
        if len(parts) == 1:
            return chunk_stats(hidden_NH, targets_N, parts[0])
        stats = [checkpoint(chunk_stats, hidden_NH[p], targets_N[p], p, use_reentrant=False) for p in parts]
        return {name: torch.cat([chunk[name] for chunk in stats]) for name in stats[0]}


def _token_stats(logits_NV: Tensor, targets_N: Tensor, entropy: bool, extra, part: slice) -> dict[str, Tensor]:
    """log pi(target) with gradient and what else is asked for, from float32 logits (float64 stays float64)."""
    dtype = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
    logp_NV = torch.log_softmax(logits_NV, -1, dtype=dtype)
    logps_N = logp_NV.gather(-1, targets_N[:, None]).squeeze(-1)
    stats = {"logps_BT": logps_N}
    if entropy:
        with torch.no_grad():
            stats["entropy_BT"] = -(logp_NV.exp() * logp_NV.clamp_min(torch.finfo(dtype).min)).sum(-1)
    if extra is not None:
        stats["extra_BT"] = extra(logp_NV, part).to(dtype)
    return stats


@torch.no_grad()
def _head_is_separate(lm: nn.Module) -> bool:
    """Whether logits are just head(backbone): some models scale or cap them (Gemma 2, Cohere), which chunks would miss."""
    head, backbone = lm.get_output_embeddings(), lm.base_model
    if head is None or backbone is lm:
        return False
    training = lm.training
    lm.eval()
    ids = torch.arange(4, device=head.weight.device)[None] % head.weight.shape[0]
    hidden = getattr(backbone(input_ids=ids, use_cache=False), "last_hidden_state", None)
    separate = hidden is not None and torch.equal(head(hidden), lm(input_ids=ids, use_cache=False).logits)
    lm.train(training)
    return separate


def _run_inside(module: nn.Module, inner: nn.Module, function) -> Any:
    """Call `module` with `function` standing in for `inner.forward`, so the wrapper's hooks run around it."""
    own_forward = inner.__dict__.get("forward")  # accelerate's mixed precision leaves one on the instance
    inner.forward = function
    try:
        return module()
    finally:
        if own_forward is None:
            del inner.forward
        else:
            inner.forward = own_forward
