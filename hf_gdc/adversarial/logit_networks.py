"""Networks that read a completion's token ids and say how real it looks: a logit for the whole, or for every prefix.

Any model of transformers will do that has a head for sequence classification (causal or bidirectional) or, dense, for token
classification on a causal body, where one forward gives the logits of all prefixes; or a second adapter on the policy's base
weights (`shared_networks`). They read the ids that the policy's tokenizer made, and no text, so that tokenisation can't tell
the sides apart.

Left out: training (`discriminator_training`). Shapes: B completions, T completion tokens (1 for a logit of the whole), S
tokens of prompt and completion, H hidden.
"""

import weakref
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import is_parametrized
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from ..rollouts import Rollouts
from ..scoring import evaluating


class LogitNetwork(nn.Module):
    """A network of logits. One of your own gives `forward` and, to be saved, `save_pretrained`.

    Attributes:
        dense: `forward` gives a logit for every prefix; the last is the completion's.
        logit_clip: c of l -> c tanh(l / c), which keeps logits of separable sides finite; None: as they are.
        batch_size: completions scored at a time.
        name: what it is called in formulas and messages.
    """

    dense = False
    name = "network"

    def __init__(self, logit_clip: float | None = None, batch_size: int = 64):
        super().__init__()
        self.logit_clip, self.batch_size = logit_clip, batch_size
        self.autocast: Callable = nullcontext
        self._memo: tuple[weakref.ref, Tensor] | None = None

    def forward(self, rollouts: Rollouts) -> Tensor:
        """(B, T) logits of the prefixes, whatever where the completion's mask is False; or (B, 1)."""
        raise NotImplementedError

    def logits(self, rollouts: Rollouts) -> Tensor:
        """`forward`, clipped, in float32 at least and with gradient."""
        with self.autocast():
            logits_BT = self(rollouts)
        logits_BT = logits_BT if logits_BT.dtype == torch.float64 else logits_BT.float()
        clip = self.logit_clip
        return logits_BT if clip is None else clip * torch.tanh(logits_BT / clip)

    @torch.no_grad()
    def score(self, rollouts: Rollouts) -> Tensor:
        """(B, T) or (B, 1) logits without gradient, float64 on the CPU; once for each batch until the network changes."""
        if self._memo is not None and self._memo[0]() is rollouts:
            return self._memo[1]
        self.follow(rollouts)
        length, found = rollouts.completion_ids_BT.shape[1], []
        with self.in_mode(training=False):
            for part in torch.arange(len(rollouts)).split(self.batch_size):
                logits_BT = self.logits(rollouts.select(part).tokens_to(self.device)).double().cpu()
                found.append(
                    nn.functional.pad(logits_BT, (0, length - logits_BT.shape[1])) if self.dense else logits_BT
                )
        logits_BT = torch.cat(found)
        self._memo = (weakref.ref(rollouts), logits_BT)
        return logits_BT

    def prefix_scores(self, rollouts: Rollouts) -> Tensor:
        """(B, T) of a dense network, as `score`, the last prefix's repeated behind the end."""
        logits_BT, mask_BT = self.score(rollouts), rollouts.completion_mask_BT.cpu()
        return torch.where(mask_BT, logits_BT, logits_BT.gather(1, mask_BT.sum(1, keepdim=True) - 1))

    def whole_scores(self, rollouts: Rollouts) -> Tensor:
        """(B,) logits of the whole completions, as `score`."""
        return self.prefix_scores(rollouts)[:, -1] if self.dense else self.score(rollouts)[:, 0]

    @property
    def body(self) -> nn.Module:
        """The module whose mode, training or evaluating, counts."""
        return self

    @contextmanager
    def in_mode(self, training: bool):
        """Dropout and the like on or off for the duration."""
        before = self.body.training
        self.body.train(training)
        try:
            yield
        finally:
            self.body.train(before)

    def forget(self) -> None:
        """The weights have changed: scores are due again."""
        self._memo = None

    def follow(self, rollouts: Rollouts) -> None:
        """Go to the rollouts' device."""
        if rollouts.completion_ids_BT.device.type != "cpu":
            self.to(rollouts.completion_ids_BT.device)

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of its own, by name."""
        return dict(self.named_parameters())

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What training moves."""
        return list(self.own_parameters().values())

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.own_parameters().values()), torch.device("cpu"))

    def own_state(self) -> dict[str, Tensor]:
        """Weights and buffers of its own."""
        return self.state_dict()

    def load_own_state(self, state: dict[str, Tensor]) -> None:
        self.load_state_dict(state)
        self.forget()

    def apply_spectral_norm(self) -> None:
        """Bound every linear layer's largest singular value by 1 (Miyato et al. 2018, arXiv 1802.05957)."""
        raise ValueError(f"spectral_norm divides the weights of a network of its own, and {self.name} has none.")

    def embeddings(self) -> nn.Module:
        """The layer whose outputs gradient penalties differentiate by."""
        raise ValueError(f"r1 and r2 need an embedding layer, and {self.name} shows none.")

    def save_pretrained(self, folder: Path) -> None:
        raise ValueError(f"{self.name} can't be saved: give it a save_pretrained, or use a model of transformers.")


def compact(rollouts: Rollouts) -> tuple[Tensor, Tensor, Tensor]:
    """Prompt and completion without the padding between: ids (B, S) padded on the right, mask, and prompt lengths (B,)."""
    ids = torch.cat([rollouts.prompt_ids_BP, rollouts.completion_ids_BT], 1)
    mask = torch.cat([rollouts.prompt_mask_BP, rollouts.completion_mask_BT], 1).bool()
    order = (~mask).long().argsort(dim=1, stable=True)[:, : int(mask.sum(1).max())]
    mask = mask.gather(1, order)
    return torch.where(mask, ids.gather(1, order), 0), mask, rollouts.prompt_mask_BP.sum(1)


def read_out(logits_BS: Tensor, mask_BS: Tensor, prompts_B: Tensor, length: int | None) -> Tensor:
    """(B, length) logits after each completion token; without a length (B, 1), after the last."""
    if length is None:
        return logits_BS.gather(1, mask_BS.sum(1, keepdim=True) - 1)
    at_BT = prompts_B[:, None] + torch.arange(length, device=logits_BS.device)
    return logits_BS.gather(1, at_BT.clamp_max(logits_BS.shape[1] - 1))


class ClassifierNetwork(LogitNetwork):
    """A model of transformers with one label, for sequences or, `dense`, for tokens.

    Raises:
        ValueError: another number of labels; a dense model whose body is not causal.
    """

    def __init__(self, model: PreTrainedModel, dense: bool, logit_clip: float | None = None, batch_size: int = 64):
        super().__init__(logit_clip, batch_size)
        self.model, self.dense = model, dense
        self.name = Path(model.config._name_or_path).name or type(model).__name__
        self._frozen = {id(parameter) for parameter in model.parameters() if not parameter.requires_grad}
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if model.config.num_labels != 1:
            raise ValueError(
                f"the discriminator {self.name} has {model.config.num_labels} labels, and a logit is one number: load it with "
                "num_labels=1."
            )
        self._token_head = _token_head(model)
        if dense and not _is_causal(model):
            raise ValueError(
                f"{self.name} gives no causal logit for each token, so it can't score prefixes: take a causal language "
                "model's AutoModelForTokenClassification with num_labels=1, or dense=False."
            )

    def forward(self, rollouts: Rollouts) -> Tensor:
        ids_BS, mask_BS, prompts_B = compact(rollouts)
        if self.context is not None and ids_BS.shape[1] > self.context:
            raise ValueError(
                f"the discriminator {self.name} reads {self.context} tokens, and a prompt with its completion has "
                f"{ids_BS.shape[1]}: shorten the prompts or lower max_completion_length."
            )
        inputs = {"input_ids": ids_BS, "attention_mask": mask_BS.long()}
        if self.dense:
            logits_BS = self.model(**inputs).logits.squeeze(-1)
        elif self._token_head is None:
            return self.model(**inputs).logits
        else:  # a decoder reads the last token that is not its padding, which may be the EOS: read the mask's last
            with _captured(self._token_head) as found, _every_token_counts(self.model.config.get_text_config()):
                self.model(**inputs)
            logits_BS = found[-1].squeeze(-1)
        return read_out(logits_BS, mask_BS, prompts_B, rollouts.completion_ids_BT.shape[1] if self.dense else None)

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if id(parameter) not in self._frozen]

    def apply_spectral_norm(self) -> None:
        for module in self.model.modules():
            if isinstance(module, (nn.Linear, Conv1D)) and not is_parametrized(module):
                spectral_norm(module)

    def embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def save_pretrained(self, folder: Path) -> None:
        mark, plain = ".parametrizations.weight.", {}
        with self.in_mode(training=False):
            for name, value in self.model.state_dict().items():
                stem, _, leaf = name.partition(mark)
                if leaf in ("", "original"):  # of a normalised layer, what its weight comes to
                    plain[f"{stem}.weight" if leaf else name] = self.model.get_submodule(stem).weight if leaf else value
        self.model.save_pretrained(folder, state_dict=plain)


def load_classifier(name: str, dense: bool) -> PreTrainedModel:
    """The classifier at a path or Hub id; a language model gets a head with new weights."""
    config = AutoConfig.from_pretrained(name)
    trained = any("Classification" in architecture for architecture in config.architectures or ())
    if trained and config.num_labels != 1:
        raise ValueError(
            f"the discriminator {name} has {config.num_labels} labels ({', '.join(map(str, config.id2label.values()))}), and a "
            "logit is one number: take a model with one, or a language model, which gets a new head."
        )
    auto = AutoModelForTokenClassification if dense else AutoModelForSequenceClassification
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # a new head is what is wanted
    try:
        return auto.from_pretrained(name, num_labels=1)
    finally:
        transformers_logging.set_verbosity(level)


@contextmanager
def _captured(module: nn.Module):
    found: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, __, output: found.append(output))
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def _every_token_counts(config):
    """No token is padding to the model's own pooling, which is not used."""
    own, config.pad_token_id = config.pad_token_id, -1
    try:
        yield
    finally:
        config.pad_token_id = own


@torch.no_grad()
def _outputs(model: PreTrainedModel, ids: Tensor, *heads: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """The model's logits, and what the heads gave."""
    config = model.config.get_text_config()
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(_every_token_counts(config))
        found = [stack.enter_context(_captured(head)) for head in heads]
        logits = model(input_ids=ids.to(model.device), attention_mask=torch.ones_like(ids).to(model.device)).logits
    return logits, [outputs[-1] for outputs in found if outputs]


def _token_head(model: PreTrainedModel) -> nn.Module | None:
    """The linear layer that gives every token a logit, of which a decoder then reads one; None where there is none."""
    heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1]
    ids = torch.tensor([[1, 0, 1]])
    for head in heads:
        _, outputs = _outputs(model, ids, head)
        if outputs and outputs[0].shape[:2] == ids.shape:
            return head
    return None


def _is_causal(model: PreTrainedModel) -> bool:
    first, _ = _outputs(model, torch.tensor([[1, 0, 1]]))
    second, _ = _outputs(model, torch.tensor([[1, 0, 0]]))
    return first.dim() == 3 and torch.allclose(first[:, :2], second[:, :2], rtol=1e-4, atol=1e-7)
