"""The policy's rollouts by vLLM, through TRL, behind the call of `TransformersSampler`.

vLLM has the policy's weights, pushed before each set of rollouts, but its own kernels and precision: its samples have a
density q of their own. It reports log q of every token, and what corrects for warped sampling, pi/q, corrects for that too.

Left out: samples of the reference, estimates and evaluation, which come from transformers; exact resume, since the engine
keeps random numbers of its own. Shapes: B samples, P prompt, T completion tokens.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .critics import ADAPTER
from .rollouts import Rollouts, completion_mask
from .sampling import TransformersSampler
from .trl_compat import is_vllm_available, vllm_engine, vllm_logprobs_mode


def check_vllm(model: nn.Module) -> None:
    """Refuse what can't work before anything else is done.

    Raises:
        ValueError: vLLM is not installed, or the model has no folder or id from which it could load it.
    """
    if not is_vllm_available():
        raise ValueError(
            "use_vllm samples with vLLM, which is not installed: `pip install trl[vllm]` on a machine with a GPU, or drop "
            "use_vllm to sample with transformers."
        )
    if not model.config._name_or_path:
        raise ValueError(
            "vLLM loads the model by its path or id, and this one was not loaded from anywhere: save it with its tokenizer "
            "and pass the folder's path as the model."
        )


class VLLMSampler:
    """Samples completions with vLLM, recording its log q.

    Args:
        base: encodes prompts, decodes completions, and says which ids are EOS.
        engine: TRL's `VLLMGeneration`.
        model: the policy that the engine samples from, unwrapped.
    """

    def __init__(self, base: TransformersSampler, engine, model: nn.Module):
        self.base, self.engine, self.model = base, engine, model
        self.eos_ids, self.encode = base.eos_ids, base.encode

    @classmethod
    def from_options(
        cls, base: TransformersSampler, model: nn.Module, accelerator: Accelerator, options
    ) -> "VLLMSampler":
        """For a `PolicyGradientConfig`, whose names are TRL's."""
        own = {
            name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        }
        names = ("mode", "model_impl", "enable_sleep_mode", "gpu_memory_utilization", "tensor_parallel_size")
        names += ("server_base_url", "server_host", "server_port", "server_timeout", "group_port")
        engine = vllm_engine(
            model=model,
            accelerator=accelerator,
            processing_class=base.tokenizer,
            max_model_length=options.vllm_max_model_length,
            max_num_seqs=options.generation_batch_size * options.vllm_tensor_parallel_size,
            max_completion_length=options.max_completion_length,
            trust_remote_code=bool((options.model_init_kwargs or {}).get("trust_remote_code")),
            logprobs=0,  # those of the sampled tokens
            generation_kwargs={"stop_token_ids": base.eos_ids},
            **own | {"min_p": options.min_p or 0.0},
            **{name: getattr(options, f"vllm_{name}") for name in names},
        )
        if options.vllm_mode == "server" and base.warpers and accelerator.is_main_process:
            _check_server(engine)
        return cls(base, engine, model)

    def sync(self) -> None:
        """Push the policy's weights; on every process, before a set of rollouts."""
        with _without_critic(self.model), _unchanged_base(self.model):
            self.engine.sync_weights()

    def unwarped(self) -> TransformersSampler:
        """What samples the model itself: transformers."""
        return self.base.unwarped()

    def __call__(
        self,
        model: nn.Module,
        prompts: Sequence,
        columns: dict[str, list] | None = None,
        autocast: Callable = nullcontext,
        synced: bool = False,
    ) -> Rollouts:
        """One completion for each of the B prompts, as of the last `sync`; log pi is left to be scored.

        Args: as of `TransformersSampler`; the model says the device alone, and the engine sees to the rest.

        Raises:
            ValueError: the engine reports no log-probs, or such that are not finite.
        """
        prompt_ids, prompt_mask, keys = self.encode(prompts)
        lengths = prompt_mask.sum(-1).tolist()
        rows = [ids[len(ids) - length :] for ids, length in zip(prompt_ids.tolist(), lengths, strict=True)]
        _, completions, logprobs, _ = self.engine.generate(prompts=rows, images=None, num_generations=1)
        device = next(model.parameters()).device
        ids, logps, inside = self._padded(completions, logprobs)
        mask = inside & completion_mask(ids, self.eos_ids)
        logps = torch.where(mask, logps, 0.0)
        return Rollouts(
            prompt_ids.to(device),
            prompt_mask.to(device),
            ids.to(device),
            mask.to(device),
            keys,
            sampler_logp_B=logps.double().sum(-1),
            policy_logp_B=None,
            sampler_logps_BT=logps.to(device),
            prompts=list(prompts),
            texts=self.base.decode(ids, mask),
            columns=columns or {},
        )

    def _padded(self, completions: list[list[int]], logprobs: list | None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T) ids, log q in float32, and where completions have tokens."""
        if logprobs is None:
            raise ValueError("vLLM reported no log-probs, without which pi/q is unknown: ask its server for them.")
        rows = [[math.nan if token[0] is None else token[0] for token in row] for row in logprobs]
        logps = pad_sequence([torch.tensor(row, dtype=torch.float32) for row in rows], True)
        ids = pad_sequence([torch.tensor(row) for row in completions], True, self.base.pad_id)
        lengths = torch.tensor([len(row) for row in completions])
        bad = ~logps.isfinite().all(-1) | (lengths != torch.tensor([len(row) for row in rows]))
        if bool(bad.any()):
            raise ValueError(
                f"vLLM reported log-probs that are missing or not finite for {int(bad.sum())} of {len(rows)} completions, "
                f"such as {rows[int(bad.nonzero()[0])][:8]}: do the model's logits overflow in vLLM's precision?"
            )
        return ids, logps, torch.arange(ids.shape[1]) < lengths[:, None]


def _check_server(engine) -> None:
    mode = vllm_logprobs_mode(engine)
    if mode != "processed_logprobs":
        raise ValueError(
            f"sampling is warped (temperature, top_k, top_p, min_p or repetition_penalty), and the vLLM server reports {mode}, "
            "not those of the warped distribution: start it with `--logprobs-mode processed_logprobs` and use trl 1.16 or "
            "newer, or sample the model itself."
        )


@contextmanager
def _without_critic(model: nn.Module):
    """TRL pushes every parameter of the model, and vLLM's has no critic."""
    critic = model._modules.pop(ADAPTER, None)
    try:
        yield
    finally:
        if critic is not None:
            model._modules[ADAPTER] = critic


@contextmanager
def _unchanged_base(model: nn.Module):
    """TRL merges the adapter to push it and subtracts it again, which leaves rounding errors in the base, the reference:
    put the very weights back."""
    kept = []
    if isinstance(model, PeftModel):
        kept = [(p, p.detach().to("cpu", copy=True)) for name, p in model.named_parameters() if ".base_layer." in name]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, weights in kept:
                parameter.copy_(weights)
