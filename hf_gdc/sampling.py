"""Sampling completions with transformers' `generate`.

At temperature 1 and without truncation unless the user asks, and `sampler_logp_B` is the log density of what was really
sampled: it is recorded from the very logits that the tokens were drawn from, so no second pass is needed and a warped
distribution is accounted for.

Left out: scoring under other models (`scoring`). Shapes: B samples, P prompt, T completion tokens, V vocabulary.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .encoding import tokenize_prompts
from .kv_cache import roomy_cache
from .partition import prompt_key
from .rollouts import Rollouts, completion_mask
from .scoring import causal_lm, evaluating


class _Draw(LogitsProcessor):
    """Draws the next token by inverting the distribution function and leaves it as the only choice.

    One uniform number per row, where torch's multinomial draws one per token of the vocabulary (half of a small model's
    sampling time); and the log-probs of what was drawn are at hand, under the model and as warped.
    """

    def __init__(self, warpers: Sequence[LogitsProcessor]):
        self.warpers = warpers
        self.policy_logps: list[Tensor] = []
        self.sampler_logps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        warped = scores
        for warper in self.warpers:
            warped = warper(input_ids, warped)
        exact = torch.float32 if scores.device.type == "mps" else torch.float64  # MPS has no float64
        cumulative = torch.softmax(warped, -1).cumsum(-1, dtype=exact)
        uniform = torch.rand(len(scores), 1, dtype=exact, device=scores.device)
        token = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
        token = token.clamp_max(scores.shape[-1] - 1)
        self.policy_logps.append((scores.gather(-1, token) - scores.logsumexp(-1, keepdim=True)).squeeze(-1))
        if self.warpers:
            self.sampler_logps.append((warped.gather(-1, token) - warped.logsumexp(-1, keepdim=True)).squeeze(-1))
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0.0)


# Options of `generate` that leave the distribution of completions alone.
_NEUTRAL = {"cache_implementation", "cache_config", "compile_config", "disable_compile", "use_cache"}


class TransformersSampler:
    """Samples completions with `generate`, recording log q.

    Args:
        tokenizer: with an EOS.
        max_completion_length: T, in tokens.
        max_context: the model's context length, or None where it has no limit.
        temperature, top_k, top_p, min_p, repetition_penalty: warping; the defaults sample the model itself.
        chat_template_kwargs: passed to the chat template.
        generation_kwargs: further options of `generate` that don't change the distribution.

    Raises:
        ValueError: a tokenizer without EOS, or generation_kwargs that would change the distribution unseen.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_completion_length: int,
        max_context: int | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        chat_template_kwargs: dict | None = None,
        generation_kwargs: dict | None = None,
        eos_ids: Sequence[int] = (),
    ):
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no EOS token, so a completion could never end. Set one that the model was trained "
                "with, e.g. tokenizer.eos_token = '</s>'."
            )
        unknown = sorted(set(generation_kwargs or {}) - _NEUTRAL)
        if unknown:
            raise ValueError(
                f"generation_kwargs {', '.join(unknown)} may change what is sampled without changing log q. Use the "
                "options temperature, top_k, top_p, min_p, repetition_penalty and max_completion_length; allowed here: "
                f"{', '.join(sorted(_NEUTRAL))}."
            )
        self.tokenizer = tokenizer
        self.eos_ids = sorted({tokenizer.eos_token_id, *eos_ids})
        self.max_completion_length, self.max_context = max_completion_length, max_context
        self.chat_template_kwargs = chat_template_kwargs
        self.generation_kwargs = generation_kwargs or {}
        warpers: list[LogitsProcessor] = []
        if repetition_penalty != 1.0:
            warpers.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
        if temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(temperature))
        if top_k > 0:
            warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1.0:
            warpers.append(TopPLogitsWarper(top_p))
        if min_p is not None:
            warpers.append(MinPLogitsWarper(min_p))
        self.warpers = warpers

    @classmethod
    def from_options(cls, tokenizer: PreTrainedTokenizerBase, model: nn.Module, options) -> "TransformersSampler":
        """For a model and a `PolicyGradientConfig`: its context length, its EOS ids and the options' own names."""
        eos_ids = model.generation_config.eos_token_id
        return cls(
            tokenizer,
            options.max_completion_length,
            max_context=getattr(model.config.get_text_config(), "max_position_embeddings", None),
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            repetition_penalty=options.repetition_penalty,
            chat_template_kwargs=options.chat_template_kwargs,
            generation_kwargs=options.generation_kwargs,
            eos_ids=eos_ids if isinstance(eos_ids, list) else [] if eos_ids is None else [eos_ids],
        )

    def sync(self) -> None:
        """Take over the policy's weights before a set of rollouts: nothing to do, since it samples from them."""

    def unwarped(self) -> "TransformersSampler":
        """The same sampler of the model itself."""
        plain = copy.copy(self)
        plain.warpers = []
        return plain

    def encode(self, prompts: Sequence) -> tuple[Tensor, Tensor, Tensor]:
        """Left-padded ids (B, P), mask and keys (B,) of prompts.

        Raises:
            ValueError: a prompt leaves no room for the completion in the model's context.
        """
        distinct = {repr(prompt): prompt for prompt in prompts}  # a group's copies are tokenised once
        ids = tokenize_prompts(list(distinct.values()), self.tokenizer, self.chat_template_kwargs)
        longest = max(ids, key=len)
        if self.max_context is not None and len(longest) + self.max_completion_length > self.max_context:
            raise ValueError(
                f"a prompt of {len(longest)} tokens and max_completion_length={self.max_completion_length} exceed the "
                f"model's context of {self.max_context}. Shorten the prompts (this one begins "
                f"{self.tokenizer.decode(longest)[:60]!r}) or lower max_completion_length."
            )
        place = {text: n for n, text in enumerate(distinct)}
        index = torch.tensor([place[repr(prompt)] for prompt in prompts])
        flipped = pad_sequence([torch.tensor(row).flip(0) for row in ids], batch_first=True, padding_value=-1)
        padded = flipped.flip(1)
        keys = torch.tensor([prompt_key(row) for row in ids])
        mask = padded >= 0
        return torch.where(mask, padded, self.pad_id)[index], mask[index], keys[index]

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.eos_ids[0]

    @torch.no_grad()
    def __call__(
        self,
        model: nn.Module,
        prompts: Sequence,
        columns: dict[str, list] | None = None,
        autocast: Callable = nullcontext,
        synced: bool = False,
    ) -> Rollouts:
        """One completion for each of the B prompts.

        Args:
            model: an unwrapped causal LM; its own generation defaults are not used.
            prompts: text or chat messages, one for each sample (repeat a prompt to sample it several times).
            columns: the dataset's other columns.
            autocast: context of mixed precision.
            synced: keep generating until every process is done (sharded models).
        """
        prompt_ids, prompt_mask, keys = self.encode(prompts)
        device = next(model.parameters()).device
        prompt_ids, prompt_mask = prompt_ids.to(device), prompt_mask.to(device)
        draw = _Draw(self.warpers)
        config = GenerationConfig(
            do_sample=False,  # the processor draws: see _Draw
            max_new_tokens=self.max_completion_length,
            repetition_penalty=1.0,
            num_beams=1,
            eos_token_id=self.eos_ids,
            pad_token_id=self.pad_id,
            **{"use_cache": True, **self.generation_kwargs},
        )
        cache = None
        if not self.generation_kwargs.keys() & {"use_cache", "cache_implementation"}:
            cache = roomy_cache(causal_lm(model), prompt_ids.shape[1] + self.max_completion_length)
        with _neutral_generation_config(model, config), _contiguous_rows(model), autocast(), evaluating(model):
            sequences = model.generate(
                prompt_ids,
                **({} if cache is None else {"past_key_values": cache}),
                attention_mask=prompt_mask.long(),
                generation_config=config,
                logits_processor=LogitsProcessorList([draw]),
                synced_gpus=synced,
            )
        completion_ids = sequences[:, prompt_ids.shape[1] :]
        mask = completion_mask(completion_ids, self.eos_ids)
        policy_logps = torch.where(mask, torch.stack(draw.policy_logps, 1), 0.0)
        sampler_logps = torch.where(mask, torch.stack(draw.sampler_logps, 1), 0.0) if self.warpers else policy_logps
        policy_logp = policy_logps.sum(-1).cpu().double()
        return Rollouts(
            prompt_ids,
            prompt_mask,
            completion_ids,
            mask,
            keys,
            sampler_logp_B=sampler_logps.sum(-1).cpu().double() if self.warpers else policy_logp,
            policy_logp_B=policy_logp,
            sampler_logps_BT=sampler_logps,
            prompts=list(prompts),
            texts=self.decode(completion_ids, mask),
            columns=columns or {},
        )

    def decode(self, completion_ids_BT: Tensor, mask_BT: Tensor) -> list[str]:
        ids, lengths = completion_ids_BT.tolist(), mask_BT.sum(-1).tolist()
        rows = [row[:length] for row, length in zip(ids, lengths, strict=True)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@contextmanager
def _neutral_generation_config(model: nn.Module, config: GenerationConfig):
    """`generate` fills unset options from the model's own generation config: put ours in its place meanwhile."""
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def _contiguous_rows(model: nn.Module):
    """Hand the head contiguous rows. It gets a slice, the prompts' last tokens, and for a slice torch's matmul copies a frozen
    head's weights once per sample (torch 2.13; six times the whole sampling time, and gigabytes, at 64 samples of 8 tokens)."""
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, rows: tuple(x.contiguous() for x in rows))
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def unsharded(module: nn.Module, accelerator):
    """The plain model under a wrapped one, with its full parameters for the duration (FSDP2, DeepSpeed ZeRO-3)."""
    model = accelerator.unwrap_model(module)
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            yield model
        return
    shards = [part for part in model.modules() if isinstance(part, FSDPModule)]
    for part in shards:
        part.unshard()
    try:
        yield model
    finally:
        for part in shards:
            part.reshard()
