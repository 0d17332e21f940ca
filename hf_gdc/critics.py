"""Critics: values of prefixes, from the policy's own backbone pass or from one of their own.

    shared      a value head on the policy's hidden states: no second pass, and the value loss trains the backbone too
    adapter     a second adapter on the same base weights, and a head: a second pass, the policy's adapter left alone
    separate    a copy of the backbone, and a head: a second model in memory

The critic is attached to the policy's model as `critic`, so that whatever wraps the model (DDP, FSDP, DeepSpeed) trains
both; it is saved beside the model, never in its weights' file, so that the model loads as it always did.

Left out: the losses (`objectives`). Shapes: N real tokens, H hidden.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from .adapters import adapter_active, add_adapter
from .hub import local_folder
from .scoring import causal_lm, same_trainable

KINDS = ("shared", "adapter", "separate")
ADAPTER = "critic"  # also the folder's name, where PEFT saves an adapter of this name
FILE = "critic.safetensors"


class Critic(nn.Module):
    """A linear value head, which starts at 0, and a backbone of its own if there is one.

    Args:
        kind: one of `KINDS`.
        hidden_size: H. dtype, device: of the head's weights; values are computed in that type even under autocast.
        backbone: gives hidden states in place of the policy's.
    """

    def __init__(self, kind: str, hidden_size: int, dtype: torch.dtype, device, backbone: nn.Module | None = None):
        super().__init__()
        self.kind, self.backbone = kind, backbone
        self.head = nn.Linear(hidden_size, 1, dtype=dtype, device=device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, hidden_NH: Tensor, run: Callable[[nn.Module], Tensor]) -> Tensor:
        """(N,) values of the states that the hidden states belong to, in float32 at least."""
        hidden_NH = hidden_NH if self.backbone is None else run(self.backbone)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            values_N = self.head(hidden_NH.to(self.head.weight.dtype)).squeeze(-1)
        return values_N if values_N.dtype == torch.float64 else values_N.float()


def attach_critic(model: "PreTrainedModel | PeftModel", kind: str, path: str | None = None) -> Callable:
    """Make `model.critic` and give what `Scorer.critic` wants.

    Args:
        kind: one of `KINDS`.
        path: a folder of a saved critic to start from, or of the model that it was saved beside.

    Raises:
        ValueError: a kind that does not fit the model, or a folder without a critic that does.
    """
    adapted, lm = isinstance(model, PeftModel), causal_lm(model)
    if kind == "adapter" and not adapted:
        raise ValueError(
            "critic='adapter' puts a second adapter beside the policy's: give a peft_config, or use 'shared'."
        )
    if kind == "separate" and (adapted or lm.base_model is lm):
        raise ValueError(
            "critic='separate' copies the backbone of a model that is trained whole, and this one "
            f"{'has an adapter: use critic=adapter' if adapted else 'shows no backbone: use critic=shared'}."
        )
    trained = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    dtype = torch.promote_types(trained.dtype, torch.float32)  # half precision is too coarse to fit returns
    backbone = copy.deepcopy(lm.base_model).requires_grad_(True) if kind == "separate" else None
    device = lm.get_input_embeddings().weight.device
    size = lm.config.get_text_config().hidden_size
    model.critic = Critic(kind, size, dtype, device, backbone)
    if not adapted:  # the weights' file is the policy's; PEFT's has nothing but the adapters
        own = [f"critic.{name}" for name in model.critic.state_dict()]
        model._keys_to_ignore_on_save = [*(model._keys_to_ignore_on_save or ()), *own]
    if kind == "adapter" and path is None:
        add_adapter(model, ADAPTER)
        model.set_requires_grad(ADAPTER)
    if path is not None:
        load_critic(model, path)
    return model.critic if kind != "adapter" else _adapter_critic(model)


def _adapter_critic(model: PeftModel) -> Callable:
    def critic(hidden_NH: Tensor, run: Callable[[nn.Module], Tensor]) -> Tensor:
        with adapter_active(model, ADAPTER):
            hidden_NH = run(model.get_base_model().base_model)
        return model.critic(hidden_NH, run)

    return critic


def _train_both(model: PeftModel, policy: str) -> None:
    """Make the policy's adapter the active one, as trainable as it was, and the critic's trainable beside it."""
    with same_trainable(model):  # PEFT would make all of the active adapter trainable
        model.set_adapter(policy)
    model.set_requires_grad(ADAPTER)


def critic_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What belongs to the critic alone, by name."""
    named = model.named_parameters()
    return {name: p for name, p in named if name.startswith("critic.") or f".{ADAPTER}." in f"{name}."}


def split_critic(optimizer: torch.optim.Optimizer, model: nn.Module, rate: float) -> None:
    """Give the critic groups of its own, with the learning rate `rate`."""
    own = {id(parameter) for parameter in critic_parameters(model).values()}
    for group in list(optimizer.param_groups):
        critic = [parameter for parameter in group["params"] if id(parameter) in own]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
        if critic:
            optimizer.add_param_group({**group, "params": critic, "lr": rate})


def add_critic(optimizer: torch.optim.Optimizer, model: nn.Module, rate: float | None, scheduled: bool) -> None:
    """Add the critic to a user's optimizer; where a scheduler counts the groups, to its first one.

    Args:
        rate: the critic's learning rate; None for the optimizer's.
        scheduled: the user gave a scheduler too.

    Raises:
        ValueError: a rate of its own, and a scheduler.
    """
    parameters = list(critic_parameters(model).values())
    if not scheduled:
        optimizer.add_param_group({"params": parameters} | ({} if rate is None else {"lr": rate}))
    elif rate is None:
        optimizer.param_groups[0]["params"].extend(parameters)
    else:
        raise ValueError(
            "a scheduler of your own knows no group for the critic: drop critic_learning_rate, or give the optimizer alone."
        )


def save_critic(model: nn.Module, folder: str, state_dict: dict[str, Tensor] | None = None) -> None:
    """Write the critic into FOLDER/critic; an adapter is written there by PEFT with the policy's.

    Args:
        state_dict: of the whole model, where that is sharded.
    """
    state_dict = model.state_dict() if state_dict is None else state_dict
    own = {
        name.removeprefix("critic."): value.detach().cpu().contiguous()
        for name, value in state_dict.items()
        if name.startswith("critic.")
    }
    place = Path(folder, ADAPTER)
    place.mkdir(parents=True, exist_ok=True)
    save_file(own, place / FILE)


def load_critic(model: nn.Module, folder: str) -> None:
    """Load what `save_critic` wrote, with the adapter if the model has one for its critic.

    Args:
        folder: where, or an id of the Hub.

    Raises:
        ValueError: there is no critic, or it is of another kind or size.
    """
    folder = local_folder(folder, [f"*{FILE}", f"{ADAPTER}/*"])
    places = [place for place in (Path(folder, ADAPTER), Path(folder)) if (place / FILE).is_file()]
    if not places:
        raise ValueError(f"there is no critic in {str(folder)!r}: neither {FILE} nor {ADAPTER}/{FILE} is there.")
    try:
        model.critic.load_state_dict(load_file(places[0] / FILE))
    except RuntimeError as error:
        raise ValueError(
            f"the critic in {str(places[0])!r} is of another kind or size than this one: {error}"
        ) from error
    adapted = (places[0] / "adapter_config.json").is_file()
    if adapted != (model.critic.kind == "adapter"):
        raise ValueError(
            f"the critic in {str(places[0])!r} has {'an' if adapted else 'no'} adapter, so it does not fit "
            f"critic={model.critic.kind!r}."
        )
    if adapted:
        policy = model.active_adapter
        with same_trainable(model):
            model.load_adapter(str(places[0]), ADAPTER, is_trainable=True)
        _train_both(model, policy)
