"""Rollouts: prompts with sampled completions, and what has been computed about them.

A completion ends with its first EOS, which belongs to it and is scored; one cut at the maximum length is an element of the
space as it stands.

Left out: making them (`sampling`), scoring under other models (`scoring`). Shapes: B samples, P prompt, T completion tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Rollouts:
    """A batch of prompts with sampled completions, and what has been computed about them.

    Token tensors live where the model does; numbers per sample, (B,), on the CPU in float64 (keys in int64).

    Attributes:
        prompt_ids_BP, prompt_mask_BP: left-padded prompts (int64) and their mask (bool).
        completion_ids_BT, completion_mask_BT: right-padded completions; the mask keeps the first EOS, if there is one.
        prompt_key_B: int64 key of the prompt's token ids; samples with equal keys share one Z.
        sampler_logp_B: log q(completion | prompt) of what produced it, in nats.
        policy_logp_B: log pi of the policy at the time of the rollout; the same tensor where the policy was sampled from
            without warping; None until it is scored, where another engine sampled.
        sampler_logps_BT: per-token log q, or None.
        policy_logps_BT, reference_logps_BT: per-token log pi at the time of the rollout and log a, where a method asks.
        values_BT: a critic's values before each token; advantages_BT, returns_BT: what a method made of them.
        log_score_B, log_z_B, baseline_B: log P, log Z and the baseline, set once by the trainer.
        log_p_BT, baseline_BT: log p of each prefix and the baseline of its token's credit, where a target has prefixes.
        prompts: B prompts, text or chat messages. columns: the dataset's other columns, B values each.
        texts: the decoded completions (special tokens skipped).
        scores: what factors computed once: features' values and log-probs of other models, (B,) each.
    """

    prompt_ids_BP: Tensor
    prompt_mask_BP: Tensor
    completion_ids_BT: Tensor
    completion_mask_BT: Tensor
    prompt_key_B: Tensor
    sampler_logp_B: Tensor
    policy_logp_B: Tensor | None
    sampler_logps_BT: Tensor | None = None
    log_score_B: Tensor | None = None
    log_z_B: Tensor | None = None
    baseline_B: Tensor | None = None
    log_p_BT: Tensor | None = None
    baseline_BT: Tensor | None = None
    policy_logps_BT: Tensor | None = None
    reference_logps_BT: Tensor | None = None
    values_BT: Tensor | None = None
    advantages_BT: Tensor | None = None
    returns_BT: Tensor | None = None
    prompts: list = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    columns: dict[str, list] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)
    differentiable = False  # tokens are not; images are (`image_batches`)

    def __len__(self) -> int:
        return len(self.completion_ids_BT)

    def feature_arguments(self) -> dict:
        """What features are called with beside the columns."""
        return {"prompts": self.prompts, "completions": self.completions, "completion_ids": self.completion_ids()}

    def describe(self, row: int) -> str:
        """A sample in a message."""
        return f"sample {row}: {self.texts[row][:80]!r}"

    @property
    def completions(self) -> list:
        """Completions as features see them: text, or one assistant message where the prompt is a chat."""
        return [
            [{"role": "assistant", "content": text}] if isinstance(prompt, list) else text
            for prompt, text in zip(self.prompts, self.texts, strict=True)
        ]

    @property
    def lengths_B(self) -> Tensor:
        return self.completion_mask_BT.sum(-1)

    def completion_ids(self) -> list[list[int]]:
        """Token ids of the completions, without padding."""
        ids, lengths = self.completion_ids_BT.tolist(), self.lengths_B.tolist()
        return [row[:length] for row, length in zip(ids, lengths, strict=True)]

    def select(self, index: Tensor) -> "Rollouts":
        """The samples at these positions (int64), in this order; completions are trimmed to their longest."""
        rows = index.tolist()

        def pick(value):
            if isinstance(value, Tensor):
                return value[index]
            if isinstance(value, dict):
                return {key: pick(item) for key, item in value.items()}
            return [value[row] for row in rows] if value else value

        chosen = Rollouts(**{f.name: pick(getattr(self, f.name)) for f in fields(self)})
        longest = int(chosen.lengths_B.max()) if rows else 0
        for name in [f.name for f in fields(self) if f.name.endswith("_BT")]:
            if getattr(chosen, name) is not None:
                setattr(chosen, name, getattr(chosen, name)[:, :longest])
        return chosen

    def tokens_to(self, device) -> "Rollouts":
        """A copy with the token tensors on a device."""
        tokens = {f.name: getattr(self, f.name) for f in fields(self) if f.name.endswith(("_BP", "_BT"))}
        return replace(self, **{name: value if value is None else value.to(device) for name, value in tokens.items()})

    def state_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @staticmethod
    def concatenate(parts: "Sequence[Rollouts]") -> "Rollouts":
        """One batch of several; prompts are padded on the left, completions on the right."""

        def join(values: list, name: str):
            first = values[0]
            if first is None:
                return None
            if isinstance(first, dict):
                return {key: join([value[key] for value in values], key) for key in first}
            if not isinstance(first, Tensor):
                return [item for value in values for item in value]
            if first.dim() == 2:
                width = max(value.shape[1] for value in values)
                left = name.startswith("prompt")
                values = [
                    nn.functional.pad(v, (width - v.shape[1], 0) if left else (0, width - v.shape[1])) for v in values
                ]
            return torch.cat(values)

        return Rollouts(**{f.name: join([getattr(part, f.name) for part in parts], f.name) for f in fields(Rollouts)})


def completion_mask(ids_BT: Tensor, eos_ids: Sequence[int]) -> Tensor:
    """(B, T) bool: True up to and including the first EOS after the prompt; pad ids play no part."""
    is_eos = torch.isin(ids_BT, torch.tensor(list(eos_ids), device=ids_BT.device))
    return is_eos.cumsum(-1) - is_eos.long() == 0
