"""The factor e^l(x): a learned logit, as the ratio of a GAN or as an energy.

    Policy() * Discriminator(...)       ratio mode: p = q e^l / Z, l trained to be log p_data/q (GAN, GAIL, GAD)
    Reference() * Discriminator(...)    energy mode: p = a e^l / Z, an energy trained on data (Finn et al. 2016, arXiv
                                        1611.03852; residual energies, Deng et al. 2020, arXiv 2004.11714)

It composes with constraints and rewards, and is frozen unless a trainer gives it a `learner`. Left out: the networks
(`logit_networks`) and how they learn (`discriminator_training`, `energy_training`).
"""

from collections.abc import Callable
from pathlib import Path

from peft import PeftModel
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..adversarial.logit_networks import ClassifierNetwork, LogitNetwork
from ..adversarial.shared_networks import AdapterNetwork, load_network
from ..rollouts import Rollouts
from ..vocabularies import differing_tokens
from .base import Context, Factor


class Discriminator(Factor):
    """e^l(x), l a network's logit of prompt and completion, as token ids of the policy's tokenizer.

        GANTrainer("my-model", Discriminator("my-model"), train_dataset=texts)
        Discriminator("my-model", dense=True)       one logit for every prefix: credit for every token
        Discriminator()                             an adapter on the policy's own base weights (with a peft_config)

    Args:
        model: path or Hub id of a classifier with one label or of a language model, which gets a new head; or a model; or
            a `LogitNetwork` of your own; or None, as above.
        dense: score every prefix; the last prefix's logit is the completion's.
        logit_clip: c of l -> c tanh(l / c), so that |l| < c even where the sides are separable.
        batch_size: completions scored at a time.

    Raises:
        ValueError: a model with another number of labels than one, or not causal and dense; in a trainer, one with
            another vocabulary than the policy's.
    """

    def __init__(
        self,
        model: "str | PreTrainedModel | LogitNetwork | None" = None,
        dense: bool = False,
        logit_clip: float | None = None,
        batch_size: int = 64,
    ):
        if logit_clip is not None and not logit_clip > 0:
            raise ValueError(f"logit_clip must be positive, but is {logit_clip!r}.")
        self._dense, self._logit_clip, self._batch_size = dense, logit_clip, batch_size
        self._network = None if model is None else load_network(model, dense, logit_clip, batch_size)
        self.learner: Callable[[Rollouts, Rollouts], bool] | None = None

    @property
    def network(self) -> LogitNetwork:
        """What gives the logits.

        Raises:
            ValueError: an adapter that no trainer has attached to its policy yet.
        """
        if self._network is None:
            raise ValueError(
                "this Discriminator has no model: it becomes an adapter of the policy in GANTrainer and UnifiedTrainer with a "
                "peft_config; elsewhere give it a model."
            )
        return self._network

    @property
    def dense(self) -> bool:
        """Whether every prefix has a logit."""
        return self._dense if self._network is None else self._network.dense

    @property
    def is_adapter(self) -> bool:
        """Whether it shares the base weights of a policy."""
        return self._network is None or isinstance(self._network, AdapterNetwork)

    def attach(self, policy: "PreTrainedModel | PeftModel") -> None:
        """Become an adapter of this policy, if there is no network yet."""
        if self._network is None:
            self._network = AdapterNetwork(policy, self._dense, self._logit_clip, self._batch_size)

    def bind(self, context: Context) -> None:
        if context.tokenizer is not None and isinstance(self._network, ClassifierNetwork):
            _check_vocabulary(self._network.model, self._network.name, context.tokenizer)

    def log_score(self, rollouts: Rollouts) -> Tensor:
        return self.network.whole_scores(rollouts)

    def fit(self, rollouts: Rollouts, real: Rollouts | None = None) -> bool:
        """Train on fresh samples and real texts, if a trainer gave a `learner`; True if the network changed."""
        return self.learner is not None and real is not None and self.learner(rollouts, real)

    def formula(self) -> str:
        name = "adapter" if self._network is None else self._network.name
        return f"exp(l_{name}(x))"

    def to_dict(self) -> dict:
        return {"dense": self.dense, "logit_clip": self.network.logit_clip, "batch_size": self.network.batch_size}

    def save_model(self, folder: Path) -> bool:
        folder.mkdir(parents=True, exist_ok=True)
        self.network.save_pretrained(folder)
        return True

    @classmethod
    def from_dict(cls, arguments: dict, folder: Path) -> "Discriminator":
        return cls(str(folder), **arguments)


def _check_vocabulary(model: PreTrainedModel, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """The network reads the policy's token ids, so they must mean the same to it."""
    rows, top = model.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values())
    if top >= rows:
        raise ValueError(
            f"the discriminator {name} has embeddings for {rows} tokens, and the policy's tokenizer has ids up to {top}: it "
            "reads the policy's ids, so make it from a model with the policy's tokenizer, such as the policy itself."
        )
    path = Path(model.config._name_or_path)
    if not (path / "tokenizer_config.json").is_file():
        return
    differ = differing_tokens(AutoTokenizer.from_pretrained(path), tokenizer)
    if differ:
        raise ValueError(
            f"the discriminator {name} was made with another tokenizer than the policy: {len(differ)} tokens differ, such as "
            f"{differ[0]!r}. It reads the policy's ids: make it from a model with the policy's tokenizer, such as the policy."
        )
