"""A discriminator on the policy's own base weights: a second adapter, and a linear head on its hidden states.

Left out: classifiers of their own (`logit_networks`). Shapes: B completions, T completion tokens, S tokens of prompt and
completion, H hidden.
"""

from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..adapters import adapter_active, adapter_parameters, add_adapter
from ..rollouts import Rollouts
from .logit_networks import ClassifierNetwork, LogitNetwork, compact, load_classifier, read_out

ADAPTER = "discriminator"  # also the folder's name, where PEFT saves an adapter of this name
HEAD = "discriminator_head.safetensors"


class AdapterNetwork(LogitNetwork):
    """A second adapter on the base weights of the policy, and a linear head on its hidden states, which starts at 0.

    Raises:
        ValueError: a policy without an adapter, or one that shows no backbone.
    """

    def __init__(self, policy: PeftModel, dense: bool, logit_clip: float | None = None, batch_size: int = 64):
        super().__init__(logit_clip, batch_size)
        if not isinstance(policy, PeftModel):
            raise ValueError(
                "a Discriminator without a model is a second adapter beside the policy's: give a peft_config, or the "
                "discriminator a model of its own."
            )
        lm = policy.get_base_model()
        if lm.base_model is lm:
            raise ValueError(
                f"{type(lm).__name__} shows no backbone to read hidden states of: give a model of its own."
            )
        self.dense, self.name, self._policy = dense, "adapter", (policy,)  # in a tuple: the policy is no part of it
        if ADAPTER not in policy.peft_config:
            add_adapter(policy, ADAPTER)
        policy.set_requires_grad(ADAPTER)
        like = lm.get_input_embeddings().weight
        adapter = next(iter(adapter_parameters(policy, ADAPTER).values()))
        self.head = nn.Linear(lm.config.get_text_config().hidden_size, 1, dtype=adapter.dtype, device=like.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def policy(self) -> PeftModel:
        return self._policy[0]

    def forward(self, rollouts: Rollouts) -> Tensor:
        ids_BS, mask_BS, prompts_B = compact(rollouts)
        with adapter_active(self.policy, ADAPTER):
            body = self.policy.get_base_model().base_model
            hidden_BSH = body(input_ids=ids_BS, attention_mask=mask_BS.long(), use_cache=False).last_hidden_state
        with torch.autocast(hidden_BSH.device.type, enabled=False):
            logits_BS = self.head(hidden_BSH.to(self.head.weight.dtype)).squeeze(-1)
        return read_out(logits_BS, mask_BS, prompts_B, rollouts.completion_ids_BT.shape[1] if self.dense else None)

    def own_parameters(self) -> dict[str, nn.Parameter]:
        head = {f"head.{name}": parameter for name, parameter in self.head.named_parameters()}
        return adapter_parameters(self.policy, ADAPTER) | head

    def own_state(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.own_parameters().items()}

    @torch.no_grad()
    def load_own_state(self, state: dict[str, Tensor]) -> None:
        for name, parameter in self.own_parameters().items():
            parameter.copy_(state[name])
        self.forget()

    @property
    def body(self) -> nn.Module:
        return self.policy

    def embeddings(self) -> nn.Module:
        return self.policy.get_base_model().get_input_embeddings()

    def save_pretrained(self, folder: Path) -> None:
        self.policy.save_pretrained(folder, selected_adapters=[ADAPTER])
        save_file({name: value.detach().cpu() for name, value in self.head.state_dict().items()}, folder / HEAD)


def load_network(
    model: "str | PreTrainedModel | LogitNetwork", dense: bool, logit_clip: float | None, batch_size: int
) -> LogitNetwork:
    """A network from a path or Hub id (also of a causal language model, whose new head is random), a model, or itself.

    Raises:
        ValueError: as `ClassifierNetwork` does; a saved adapter whose base can't be found.
    """
    if isinstance(model, LogitNetwork):
        model.batch_size = batch_size
        model.logit_clip = model.logit_clip if logit_clip is None else logit_clip
        return model
    if isinstance(model, str):
        if (Path(model) / HEAD).is_file():
            return _load_adapter(Path(model), dense, logit_clip, batch_size)
        model = load_classifier(model, dense)
    return ClassifierNetwork(model, dense, logit_clip, batch_size)


def _load_adapter(folder: Path, dense: bool, logit_clip: float | None, batch_size: int) -> AdapterNetwork:
    try:
        policy = AutoPeftModelForCausalLM.from_pretrained(folder / ADAPTER, adapter_name=ADAPTER)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the discriminator in {str(folder)!r} is an adapter, and the model under it can't be loaded: {error}"
        ) from error
    network = AdapterNetwork(policy, dense, logit_clip, batch_size)
    network.head.load_state_dict(load_file(folder / HEAD))
    return network
