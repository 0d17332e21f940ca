"""TRL 1.12's own `PPOTrainer`, the last that TRL had, on the empty prompt or prompts of one length, and reward functions.

TRL's code runs as it is. It asks for a reward model and a value model, and gets them here: `FunctionReward` costs what the
functions cost; `ValueModel` is the policy's backbone again with a linear head, as `AutoModelForSequenceClassification`
would make it. TRL 1.12 must come first on PYTHONPATH (`make test-trl-ppo` puts it into `.trl-1.12`).
"""

import copy
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_gdc.encoding import tokenize_prompts

PADDING = -1


def import_ppo() -> tuple[type, type]:
    """TRL's `PPOConfig` and `PPOTrainer`.

    Raises:
        ValueError: this TRL has none.
    """
    try:
        from trl.experimental.ppo import PPOConfig, PPOTrainer
    except ImportError as error:
        raise ValueError(
            "this TRL has no PPO: 1.12 was the last. `make test-trl-ppo` puts it into the folder .trl-1.12; set "
            "PYTHONPATH=.trl-1.12."
        ) from error
    return PPOConfig, PPOTrainer


class FunctionReward(nn.Module):
    """Reward functions as the reward model that TRL's PPO wants: `score(backbone(ids).hidden_states[-1])` at the last token.

    Args:
        functions: with TRL's reward signature; their rewards are added up.
        tokenizer: of the policy.
        prompt_length: tokens of every prompt.
    """

    base_model_prefix = "backbone"

    def __init__(self, functions: Sequence[Callable], tokenizer: PreTrainedTokenizerBase, prompt_length: int):
        super().__init__()
        self.functions, self.tokenizer, self.prompt_length = functions, tokenizer, prompt_length
        self.backbone = _Ids()

    def score(self, ids_BL: Tensor) -> Tensor:
        """(B, L, 1): the completion's reward, at every token alike."""
        rows = [[i for i in row if i != PADDING] for row in ids_BL.tolist()]  # behind the completion
        prompts = self.tokenizer.batch_decode([row[: self.prompt_length] for row in rows], skip_special_tokens=True)
        ids = [row[self.prompt_length :] for row in rows]
        given = {"prompts": prompts, "completion_ids": ids}
        given["completions"] = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        rewards_B = torch.tensor([function(**given) for function in self.functions], device=ids_BL.device).sum(0)
        return rewards_B[:, None, None].expand(*ids_BL.shape, 1)


class _Ids(nn.Module):
    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_):
        return SimpleNamespace(hidden_states=[input_ids.masked_fill(~attention_mask, PADDING)])


class ValueModel(nn.Module):
    """A copy of a causal LM's backbone, and a head that starts at 0."""

    base_model_prefix = "backbone"

    def __init__(self, lm: PreTrainedModel):
        super().__init__()
        self.backbone = copy.deepcopy(lm.base_model)
        self.score = nn.Linear(lm.config.hidden_size, 1, dtype=lm.dtype, device=lm.device)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)


def trl_ppo(
    model: PreTrainedModel,
    functions: Sequence[Callable],
    args,
    prompts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    callbacks: list | None = None,
):
    """TRL's `PPOTrainer`, ready to train.

    Args:
        model: the policy; the reference and the value model are copies of it.
        functions: rewards.
        args: TRL's `PPOConfig`.
        prompts: text, all of one length in tokens.

    Raises:
        ValueError: prompts of several lengths, or a padding token that is EOS, which this trainer takes for padding.
    """
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        raise ValueError(
            "TRL 1.12's PPO needs a padding token that is not EOS: set tokenizer.pad_token to another one."
        )
    ids = tokenize_prompts(list(prompts), tokenizer)
    lengths = {len(row) for row in ids}
    if len(lengths) != 1:
        raise ValueError(f"the prompts must have one length in tokens, but have {sorted(lengths)}: pad or cut them.")
    _, trainer = import_ppo()
    return trainer(
        args,
        tokenizer,
        model,
        ref_model=copy.deepcopy(model),
        reward_model=FunctionReward(functions, tokenizer, lengths.pop()),
        train_dataset=Dataset.from_dict({"input_ids": ids}),
        value_model=ValueModel(model),
        callbacks=callbacks,
    )
