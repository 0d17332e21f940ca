"""Certified sampling inside `model.generate(custom_generate=...)`: this file travels, hf_gdc does not.

`QuasiRejectionSampler.save_pretrained` copies it beside `features.py`, `rollouts.py`, the user's feature files and the
settings. Every draw of the model is accepted with probability min(1, P(x) / (beta q(x))), so what is returned has the
distribution p_beta that the certificate is about; a draw with P(x) = 0 is never returned, and nothing else takes its place.

Left out: estimates and the choice of beta, made before saving. Shapes: B draws, P prompt, T completion tokens, V vocabulary.
"""

import json
import math
import sys
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PretrainedConfig

_HARMLESS = {"use_cache", "synced_gpus"}  # arguments of `generate` that leave the distribution alone
_references: dict[str, nn.Module] = {}  # one copy of the reference's weights for each process


class CertifiedSampler:
    """What the settings describe, for one model.

    Args:
        settings: as `QuasiRejectionSampler.save_pretrained` wrote them. features: by name, callable on rollouts.
        rollouts_class: `Rollouts`. model: the policy. tokenizer: for the features' text. reference: see `generate`.
    """

    def __init__(self, settings: dict, features: dict, rollouts_class: type, model, tokenizer=None, reference=None):
        self.settings, self.features, self.rollouts_class, self.model = settings, features, rollouts_class, model
        if tokenizer is None:
            name = model.config._name_or_path
            if not name:
                raise ValueError(
                    "this model was not loaded from anywhere: pass its tokenizer to generate(tokenizer=...)."
                )
            tokenizer = AutoTokenizer.from_pretrained(name, config=model.config)
        self.tokenizer, self.reference = tokenizer, reference
        self._check_model()

    def sample(self, prompt_ids: list[int], num_samples: int, beta: float | None = None) -> list[list[int]]:
        """Token ids of `num_samples` accepted completions, EOS included where they have one."""
        row = self._certified(prompt_ids, beta)
        log_beta = math.log(beta) if beta is not None else row["log_beta"]
        found, draws, limit = [], 0, self.settings["max_draws_per_sample"] * num_samples
        while len(found) < num_samples:
            if draws >= limit:
                raise ValueError(
                    f"only {len(found)} of {draws} draws were accepted, an acceptance rate of about "
                    f"{len(found) / draws:.2g}, and {num_samples} are wanted. Ask for fewer, or save the sampler with a "
                    "smaller beta or a larger max_draws_per_sample. Nothing that was not accepted is returned."
                )
            size = min(self.settings["batch_size"], limit - draws)
            ids_BT, mask_BT = self._draw(prompt_ids, size)
            log_w_B = self._log_weight(row, ids_BT, mask_BT)
            log_acc_B = log_w_B if log_beta is None else log_w_B - log_beta  # None: beta -> 0
            acc_B = torch.exp(log_acc_B.clamp_max(0.0)) if log_beta is not None else (log_w_B > -math.inf).double()
            accepted = torch.rand(len(acc_B), dtype=torch.float64) < acc_B
            rows, lengths = ids_BT.tolist(), mask_BT.sum(-1).tolist()
            found += [rows[n][: lengths[n]] for n in accepted.nonzero().flatten().tolist()]
            draws += len(acc_B)
        return found[:num_samples]

    def _certified(self, prompt_ids: list[int], beta: float | None) -> dict:
        for row in self.settings["prompts"]:
            if row["prompt_ids"] == prompt_ids:
                return row
        if beta is not None:
            text = self.tokenizer.decode(prompt_ids, skip_special_tokens=True)
            return {"prompt": text, "prompt_ids": prompt_ids, "columns": {}}
        raise ValueError(
            f"the prompt {self.tokenizer.decode(prompt_ids)[:60]!r} is not one of the {len(self.settings['prompts'])} that "
            "this sampler is certified for: every prompt has its own Z, hence its own beta. Make a pool for it with "
            "QuasiRejectionSampler.pool([...]) and save again, or pass beta=... (in units of P/q) and go without certificate."
        )

    @torch.no_grad()
    def _draw(self, prompt_ids: list[int], size: int) -> tuple[Tensor, Tensor]:
        """(B, T) draws of the model itself and their masks, which keep the first EOS."""
        settings = self.settings
        config = GenerationConfig(
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=settings["temperature"],
            max_new_tokens=settings["max_completion_length"],
            eos_token_id=settings["eos_ids"],
            pad_token_id=settings["pad_id"],
            num_beams=1,
            repetition_penalty=1.0,
        )
        ids_BP = torch.tensor([prompt_ids] * size, device=self.model.device)
        with _generating(self.model, config):
            # The class's method: where this sampler stands in for model.generate, that would call itself.
            out = type(self.model).generate(
                self.model, ids_BP, attention_mask=torch.ones_like(ids_BP), generation_config=config
            )
        ids_BT = out[:, len(prompt_ids) :]
        is_eos = torch.isin(ids_BT, torch.tensor(settings["eos_ids"], device=ids_BT.device))
        return ids_BT, is_eos.cumsum(-1) - is_eos.long() == 0

    def _log_weight(self, row: dict, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """(B,) log P - log q of completions of a row's prompt."""
        prompt_ids = row["prompt_ids"]
        log_q_B = log_prob(self.model, prompt_ids, ids_BT, mask_BT, self.settings["temperature"])
        size = len(ids_BT)
        lengths = mask_BT.sum(-1).tolist()
        kept = [ids[:length] for ids, length in zip(ids_BT.tolist(), lengths, strict=True)]
        prompt_BP = torch.tensor([prompt_ids] * size)
        rollouts = self.rollouts_class(
            prompt_BP,
            torch.ones_like(prompt_BP, dtype=torch.bool),
            ids_BT,
            mask_BT,
            torch.zeros(size, dtype=torch.int64),
            log_q_B,
            log_q_B,
            prompts=[row["prompt"]] * size,
            texts=self.tokenizer.batch_decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False),
            columns={name: [value] * size for name, value in row["columns"].items()},
        )
        total_B = torch.zeros(size, dtype=torch.float64)
        for factor in self.settings["factors"]:
            total_B += factor["power"] * self._log_factor(factor, rollouts, log_q_B, row)
        bad = total_B.isnan() | (total_B == math.inf)
        if bool(bad.any()):
            raise ValueError(f"log P is {float(total_B[bad][0])} for a draw: check the target's features and rewards.")
        return total_B - log_q_B

    def _log_factor(self, factor: dict, rollouts, log_q_B: Tensor, row: dict) -> Tensor:
        kind = factor["type"]
        values = [self.features[name](rollouts, allow_none=kind == "Reward") for name in factor["features"]]
        if kind == "Policy":
            return log_q_B
        if kind == "Pointwise":
            return torch.where(values[0] == 1, 0.0, -math.inf)
        if kind == "Moment":
            return _multiplier(factor, row) * values[0]
        if kind == "Reward":
            weighted = [w * v.nan_to_num(nan=0.0) for w, v in zip(factor["weights"], values, strict=True)]
            return sum(weighted) / factor["beta"]
        assert kind == "Reference", kind
        with self._reference_of(factor["reference"]) as model:
            ids_BT, mask_BT = (t.to(model.device) for t in (rollouts.completion_ids_BT, rollouts.completion_mask_BT))
            return log_prob(model, row["prompt_ids"], ids_BT, mask_BT)

    @contextmanager
    def _reference_of(self, where: dict):
        """The reference's weights: the model itself, with its adapters off, or another one loaded once."""
        if where["kind"] == "policy":
            yield self.model
        elif where["kind"] == "adapter_off":
            peft = sys.modules.get("peft.tuners.tuners_utils")  # imported already if the model has an adapter
            layers = [m for m in self.model.modules() if peft is not None and isinstance(m, peft.BaseTunerLayer)]
            if not layers:
                raise ValueError(
                    "the reference is this model without its adapter, but the model has none: load the adapter."
                )
            for layer in layers:
                layer.enable_adapters(False)
            try:
                yield self.model
            finally:
                for layer in layers:
                    layer.enable_adapters(True)
        elif isinstance(self.reference, nn.Module):
            yield self.reference.eval()
        else:
            name = where["name"] if self.reference is None else self.reference
            subfolder = where["subfolder"] if self.reference is None else ""
            key = f"{name}/{subfolder}"
            if key not in _references:
                _references[key] = _load(self.model, name, subfolder, getattr(torch, where["dtype"]))
            yield _references[key].to(self.model.device)

    def _check_model(self) -> None:
        """The certificate is about one model: its log-prob of a stored completion must come out as it was."""
        probe = self.settings["probe"]
        ids_BT = torch.tensor([probe["completion_ids"]], device=self.model.device)
        logp = float(log_prob(self.model, probe["prompt_ids"], ids_BT, torch.ones_like(ids_BT, dtype=torch.bool)))
        if abs(logp - probe["logp"]) > 0.05 + 0.02 * len(probe["completion_ids"]):  # leaves room for half precision
            raise ValueError(
                f"this is not the model that was certified: it gives a stored completion log-prob {logp:.3f}, the certified "
                f"one {probe['logp']:.3f}. Load the policy that QuasiRejectionSampler had."
            )


@torch.no_grad()
def log_prob(model, prompt_ids: list[int], ids_BT: Tensor, mask_BT: Tensor, temperature: float = 1.0) -> Tensor:
    """(B,) log-probs of completions of one prompt, in float64 on the CPU; softmax in float32 at least."""
    vocabulary = model.config.get_text_config().vocab_size
    rows = max(1, 2**26 // (vocabulary * ids_BT.shape[1]))  # the logits that exist at once
    training, parts = model.training, []
    model.eval()
    for ids, mask in zip(ids_BT.split(rows), mask_BT.split(rows), strict=True):
        start = torch.tensor([prompt_ids], device=ids.device).expand(len(ids), -1)
        logits = model(input_ids=torch.cat([start, ids], 1), use_cache=False).logits[:, len(prompt_ids) - 1 : -1]
        exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
        logps = torch.log_softmax(logits.to(exact) / temperature, -1).gather(-1, ids[..., None]).squeeze(-1)
        parts.append((logps * mask).sum(-1).double().cpu())
    model.train(training)
    return torch.cat(parts)


def _multiplier(factor: dict, row: dict) -> float:
    """lambda of a moment, which may be its own for each group of prompts."""
    if factor["per"] is None:
        return factor["lam"]
    group = row["prompt"] if factor["per"] == "prompt" else row["columns"][factor["per"]]
    return factor["lam"].get(json.dumps(group, ensure_ascii=False) if isinstance(group, list) else str(group), 0.0)


def generate(
    settings: dict,
    features: dict,
    rollouts_class: type,
    positional: tuple,
    model,
    inputs: Tensor | None = None,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    num_return_sequences: int | None = None,
    tokenizer=None,
    reference=None,
    beta: float | None = None,
    **options,
) -> Tensor:
    """`num_return_sequences` accepted completions for each row of the input, as `generate` returns them.

    Args:
        positional, inputs, input_ids, attention_mask: token ids (rows, P), left-padded, by position or by name; none: the
            certified prompt, if there is one.
        num_return_sequences: default 1.
        tokenizer: default: the one saved beside the model.
        reference: a model or its name, in place of the one named in the settings.
        beta: in units of P/q, in place of the certified one.
        options: the many other arguments of `generate`: None, harmless, or an error.

    Returns:
        (rows * num_return_sequences, P + T) int64: the input with completions, padded on the right.
    """
    given = [x for x in (*positional, inputs, input_ids) if x is not None]
    if len(given) > 1:
        raise ValueError("the input was given more than once, by position and by name.")
    _check_options(options, settings)
    if beta is not None and not (beta > 0 and math.isfinite(beta)):
        raise ValueError(f"beta must be positive and finite, but is {beta!r}.")
    if not given and len(settings["prompts"]) > 1:
        raise ValueError(f"say which of the {len(settings['prompts'])} certified prompts: pass input_ids.")
    ids_RP = torch.as_tensor(given[0] if given else [settings["prompts"][0]["prompt_ids"]], device=model.device)
    mask_RP = torch.ones_like(ids_RP) if attention_mask is None else attention_mask.to(ids_RP.device)
    sampler = CertifiedSampler(settings, features, rollouts_class, model, tokenizer, reference)
    each = 1 if num_return_sequences is None else num_return_sequences
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(ids_RP, mask_RP, strict=True)]
    counts = {tuple(row): each * rows.count(row) for row in rows}  # equal rows share their batches
    pools = {row: sampler.sample(list(row), count, beta) for row, count in counts.items()}
    found = [pools[tuple(row)].pop(0) for row in rows for _ in range(each)]
    longest = max(len(row) for row in found)
    padded = torch.tensor([row + [settings["pad_id"]] * (longest - len(row)) for row in found], device=ids_RP.device)
    return torch.cat([ids_RP.repeat_interleave(each, 0), padded], 1)


def _check_options(options: dict, settings: dict) -> None:
    fixed = {
        "do_sample": True,
        "max_new_tokens": settings["max_completion_length"],
        "temperature": settings["temperature"],
        "top_k": 0,
        "top_p": 1.0,
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "pad_token_id": settings["pad_id"],
        "return_dict_in_generate": False,
    }
    for name, value in options.items():
        if value is None or name in _HARMLESS or name in fixed and value == fixed[name]:
            continue
        known = f"; it is {fixed[name]!r} in the certificate" if name in fixed else ""
        raise ValueError(
            f"{name}={value!r} is not what was certified{known}. Leave it out: this sampler takes input_ids, attention_mask, "
            "num_return_sequences, tokenizer, reference and beta."
        )


def _load(model, name: str, subfolder: str, dtype: torch.dtype) -> nn.Module:
    """The reference has nearly always the policy's class, whose code is here already; another class must be transformers'."""
    try:
        kind = PretrainedConfig.get_config_dict(name, subfolder=subfolder)[0].get("model_type")
    except OSError as error:
        raise ValueError(
            f"the reference model is not at {name!r}: pass generate(reference=...) with a path, a Hub id or a model."
        ) from error
    own = type(model) if kind == model.config.model_type else AutoModelForCausalLM
    return own.from_pretrained(name, subfolder=subfolder, dtype=dtype).eval().requires_grad_(False)


@contextmanager
def _generating(model, config: GenerationConfig):
    """Dropout off, and our generation config in the place of the model's, which `generate` would fill gaps from."""
    own, training = model.generation_config, model.training
    model.generation_config = config
    model.eval()
    try:
        yield
    finally:
        model.generation_config = own
        model.train(training)
