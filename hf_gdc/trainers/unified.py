"""The unified objective: a policy P_G and an energy P_D, each moved towards the other, the energy also towards the data.

    L = D_f(P_G || P_D) + lambda * D(P_D, P_true),      P_D(x) = a(x) e^d(x) / Z

theta takes f-DPG steps to P_D times any constraints and rewards, so RLHF, GDC and GAN are in one target. d takes steps along
its own exact gradient of L (`hf_gdc.adversarial.energy_training`). The fitted energy is a factor like any other: saved with the
target, loaded, sampled with `QuasiRejectionSampler`.

Left out: moments, whose lambda is fitted to a target that stands still.
"""

from ..adversarial.arguments import UnifiedConfig
from ..adversarial.energy_training import EnergyLearner
from ..adversarial.real_text import with_completions
from ..targets import Discriminator, Reference
from ..targets.base import Factor
from .adversarial import AdversarialTrainer


class UnifiedTrainer(AdversarialTrainer):
    """Trains a policy and an energy together, on real texts.

        UnifiedTrainer("my-model", Discriminator("my-model"), args=UnifiedConfig(data_weight=2), train_dataset=texts).train()

    Args:
        model: see `PolicyGradientTrainer`, as for everything that is not said here; its start is a.
        discriminator: e^d, not dense.
        target: further factors, constraints and rewards: the policy moves to a e^d times these.
        args: a `UnifiedConfig`.
        train_dataset: rows with `text`, or with `prompt` and `completion`.
        critic: for `data_term="critic"`, a second discriminator: it learns log P_true/a, which the energy's d is compared with.

    Raises:
        ValueError: see `AdversarialTrainer`; a dense energy; a critic without its data term, or the reverse; a hard
            constraint without `reference_negatives`.
    """

    logit_is_ratio = False

    def __init__(
        self,
        model,
        discriminator: Discriminator,
        target: Factor | None = None,
        args: UnifiedConfig | None = None,
        critic: Discriminator | None = None,
        **kwargs,
    ):
        args = UnifiedConfig(output_dir="unified") if args is None else args
        if (critic is not None) != (args.data_term == "critic"):
            raise ValueError(
                "critic, a second Discriminator with a model of its own, goes with data_term='critic': give both or neither."
            )
        whole = Reference() * discriminator
        if target is not None:
            whole = whole * target
        if whole.hard and not args.reference_negatives:
            raise ValueError(
                f"{whole.formula()} forbids texts that the energy is fitted on: set reference_negatives (e.g. to the number of "
                "real texts in a set of rollouts), so that it sees what the policy no longer samples."
            )
        self.critic = critic
        super().__init__(model, discriminator, whole, args, **kwargs)

    def make_learner(self) -> EnergyLearner:
        texts = self.args.generation_batch_size // self.args.num_generations
        if self.args.reference_negatives % texts:
            raise ValueError(
                f"reference_negatives = {self.args.reference_negatives} must be a multiple of the {texts} real texts in a "
                "process's set of rollouts, so that each prompt gets as many."
            )
        critic = None if self.critic is None else self.critic.network
        return EnergyLearner(
            self.discriminator.network,
            self.args,
            self.divergence,
            self.actors,
            self._averages.add,
            game=self.game,
            log_weight=self.target.log_weight,
            critic=critic,
        )

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Every divergence between policy and target, as every trainer measures them, and what held-out texts say.

        See `PolicyGradientTrainer.evaluate` for the first. Of the second: `nll` of the real texts under the policy (nats),
        how well the energy separates real texts from samples (`discriminator/auc`), lengths, copies.
        """
        if eval_dataset is not None:
            eval_dataset = with_completions(eval_dataset)
        metrics = self.evaluate_game(eval_dataset, metric_key_prefix)
        self.log(metrics)
        return metrics | super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
