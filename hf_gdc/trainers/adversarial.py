"""What adversarial trainers share: f-DPG to a target with a factor that learns from real texts.

The policy's side is `GDCTrainer`'s. Before a set of rollouts is weighed, the discriminator learns from it and from the real
texts of its rows. A run has three phases, counted in optimizer steps of the policy: `mle_steps` of maximum likelihood on the
real texts, `discriminator_warmup_steps` in which the policy stands still, and the game.

Left out: which target (`gan`, `unified`). Shapes: B samples of this process, N of all processes.
"""

from pathlib import Path

import torch
from torch import Tensor

from ..adversarial.arguments import AdversarialConfig
from ..adversarial.demonstrations import Demonstrations
from ..adversarial.discriminator_training import DiscriminatorLearner
from ..adversarial.game import Game
from ..adversarial.losses import dual
from ..adversarial.real_text import RealTexts, check_size, is_unconditional, with_completions
from ..divergences import available_divergences, get_divergence
from ..evaluation import LOG_NAMES, finite, first_rows, repeated
from ..rollouts import Rollouts
from ..scoring import PolicyOutput
from ..targets import Discriminator, Target
from .gdc import GDCTrainer

DISCRIMINATOR_FILE = "discriminator.pt"  # beside the policy's optimizer in a checkpoint


class AdversarialTrainer(GDCTrainer):
    """Base of `GANTrainer` and `UnifiedTrainer`.

    Class attribute:
        logit_is_ratio: the discriminator's logit estimates log p_data/q.

    Args:
        model, args, processing_class, callbacks, optimizers, peft_config: see `PolicyGradientTrainer`.
        discriminator: the factor that learns.
        target: the whole target, the discriminator in it.
        train_dataset: rows with `text`, or with `prompt` and `completion`; streams too.
        eval_dataset: the same, held out.

    Raises:
        ValueError: no real texts, too few, or in another language than the tokenizer's; moments in the target; see
            `DiscriminatorLearner` and `Discriminator`.
    """

    logit_is_ratio = True

    def __init__(
        self,
        model,
        discriminator: Discriminator,
        target: Target,
        args: AdversarialConfig,
        train_dataset=None,
        eval_dataset=None,
        **kwargs,
    ):
        if train_dataset is None:
            raise ValueError(
                "adversarial training needs real texts: a train_dataset with `text`, or `prompt` and `completion`."
            )
        if target.moments:
            raise ValueError(
                f"lambda of {target.moments[0].wanted()} is fitted to a target that stands still, and a discriminator moves "
                "it: train first, then take GDCTrainer with Reference() * the trained energy * Moment(...)."
            )
        train_dataset = with_completions(train_dataset)
        self.unconditional = is_unconditional(train_dataset)
        if self.unconditional:
            args.num_generations = 1  # each row is another sample of one distribution
        texts = args.generation_batch_size // args.num_generations
        check_size(train_dataset, texts * args.world_size)
        if not 0 <= args.demonstrations <= texts:
            raise ValueError(
                f"demonstrations = {args.demonstrations}, but a process's set of rollouts has {texts} real texts: ask "
                "for no more."
            )
        self.discriminator = discriminator
        if eval_dataset is not None:
            eval_dataset = with_completions(eval_dataset)
        super().__init__(model, target, args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        if discriminator.is_adapter and (args.activation_checkpointing or args.gradient_checkpointing):
            raise ValueError(
                "a discriminator that is an adapter switches adapters in a forward, and activation checkpointing would run it "
                "again with the wrong one: switch activation checkpointing off, or give the discriminator its own model."
            )
        with torch.random.fork_rng():
            torch.manual_seed(args.seed)  # every process starts the same adapter
            discriminator.attach(self.model)
        self.texts_of = RealTexts(self.actors.sampler)
        sampler = self.actors.sampler
        self.game = Game(
            sampler.tokenizer,
            sampler.eos_ids,
            self.actors.gather,
            args.on_collapse,
            args.collapse_patience,
            args.discriminator_target_accuracy,
        )
        self.learner = discriminator.learner = self.make_learner()
        if args.demonstrations:
            self.replay = Demonstrations(self.target, self.actors, args.demonstrations)

    def make_learner(self) -> DiscriminatorLearner:
        """What trains the discriminator."""
        return DiscriminatorLearner(
            self.discriminator.network, self.args, self.divergence, self.actors, self._averages.add, self.game
        )

    # ---- the phases ----

    @property
    def phase(self) -> str:
        """mle, warmup or game."""
        step, warm = self.state.global_step, self.args.mle_steps
        return "mle" if step < warm else "warmup" if step < warm + self.args.discriminator_warmup_steps else "game"

    def real_rollouts(self, rows: list[dict]) -> Rollouts:
        """The real texts of these rows, one for each prompt."""
        texts = self.texts_of(rows[:: self.args.num_generations], self.args.device)
        if isinstance(self.replay, Demonstrations):
            self.replay.texts = texts
        return texts

    def _make_rollouts(self, rows: list[dict]) -> Rollouts:
        if self.phase == "mle":
            return self.texts_of(rows, self.args.device)
        rollouts = super()._make_rollouts(rows)
        self.control.should_training_stop |= self.game.stop
        return rollouts

    def sample_losses(self, model, rollouts: Rollouts) -> tuple[Tensor, PolicyOutput]:
        """(B,) losses: of the game, or -log pi of real texts."""
        if rollouts.log_score_B is None:
            out = self.actors.scorer.rollouts(rollouts, module=model)
            self._averages.add({"nll": float(-out.logp_B.detach().mean())})
            return -out.logp_B, out
        return super().sample_losses(model, rollouts)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.phase == "warmup":  # a zero gradient would still move the policy, by its optimizer's momentum
            for parameter in self.model.parameters():
                parameter.grad = None
        return loss

    # ---- evaluation ----

    def evaluate_game(self, eval_dataset=None, prefix: str = "eval") -> dict[str, float]:
        """What held-out texts say: see `GANTrainer.evaluate`."""
        dataset = eval_dataset or self.eval_dataset or self.train_dataset
        rows = first_rows(dataset, self.args.eval_samples)
        world, rank = self.args.world_size, self.args.process_index
        real = self.texts_of([*rows, *rows[: -len(rows) % world]][rank::world], torch.device("cpu"))
        fake = self.actors.draw(repeated(rows, self.args.eval_samples), False, salt=self.state.global_step + 1)
        self.target.log_score(fake)  # computes the features
        score = self.discriminator.network.whole_scores
        sides = self.game.sides(real, score(real)), self.game.sides(fake, score(fake))
        nll = -self.actors.gather(self.actors.policy_logp(real))
        metrics = self.game.metrics(*sides) | self._sample_metrics(fake)
        metrics |= {"nll": float(nll.mean()), "nll_per_token": float(nll.sum() / sides[0].lengths.sum())}
        if self.logit_is_ratio and not self.args.warped:  # else the logit's q is not the policy
            metrics |= {f"{name}_bound": value for name, value in divergence_bounds(sides[0].logits, sides[1].logits)}
        self.evaluation_samples = fake
        return {f"{prefix}_{name}": value for name, value in finite(metrics).items()}

    # ---- checkpoints ----

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.is_world_process_zero():
            torch.save(self.learner.state_dict(), Path(output_dir) / DISCRIMINATOR_FILE)

    def _load_own_state(self, checkpoint: str) -> None:
        file = Path(checkpoint) / DISCRIMINATOR_FILE
        if not file.is_file():
            raise ValueError(f"can't resume from {checkpoint!r}: {file.name} is missing, which has the discriminator.")
        self.learner.load_state_dict(torch.load(file, map_location=self.args.device, weights_only=True))
        super()._load_own_state(checkpoint)

    def process_state(self) -> dict:
        return super().process_state() | {"learner": self.learner.process_state()}

    def load_process_state(self, state: dict) -> None:
        super().load_process_state(state)
        self.learner.load_process_state(state["learner"])


def divergence_bounds(real_logits: Tensor, fake_logits: Tensor) -> list[tuple[str, float]]:
    """Lower bounds of the divergences between policy and data on these texts and samples, by their names in logs.

    E_data[f(t) - t f'(t)] + E_pi[f'(t)] with t = e^-l, for whatever l is; tight where l is log p_data/pi.
    """
    found = []
    for name in available_divergences():
        if name != "alpha":
            divergence = get_divergence(name)
            real = dual(-real_logits, divergence.f, divergence.f_prime).mean()
            found.append((LOG_NAMES.get(name, name), float(real + divergence.f_prime(-fake_logits).mean())))
    return found
