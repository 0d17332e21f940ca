"""The one policy-gradient trainer: prompts -> rollouts -> target -> partition -> advantages -> loss.

The loop is `transformers.Trainer`'s. Rollouts are made inside of it, in `_prepare_inputs`, and last for
`steps_per_generation * num_iterations` micro-steps; log P, log Z and baselines are computed once per rollout on the whole
group, over all processes, before any micro-batching. A method adds a factor of the target or a `policy_loss`; nothing
here asks which method it is.

Left out: sampling and scoring (`actors`), estimates (`evaluation`), safe folders (`checkpoints`). Shapes: B samples of
this process, N of all processes.
"""

from collections.abc import Sequence

import torch
from accelerate.utils import set_seed
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from ..actors import Actors
from ..arguments import PolicyGradientConfig
from ..checkpoints import SafeCheckpoints
from ..divergences import Divergence
from ..evaluation import Scored, finite, first_rows, pooled_metrics, repeated, rollout_metrics
from ..incremental import Incremental, train_only
from ..loading import disable_dropout, load_policy, load_tokenizer
from ..partition import Partition, leave_one_out_baseline
from ..pools import FITTING, ReferencePools
from ..prompt_order import EmptyPrompts, check_groups, empty_prompts, prompt_loader
from ..replay import Replay
from ..reporting import Averages, length_metrics, log_samples
from ..rollouts import Rollouts
from ..sampling import TransformersSampler
from ..scoring import PolicyOutput
from ..targets.base import Context, Factor, Target
from ..vllm_sampler import VLLMSampler, check_vllm


class PolicyGradientTrainer(SafeCheckpoints, Incremental, Trainer):
    """Moves a policy towards a target by the score-function gradient of an f-divergence.

    Args:
        model: Hub id, path or model: the policy, whose start is the reference.
        target: a `Target` or a single factor.
        args: a `PolicyGradientConfig`.
        train_dataset: rows with a `prompt` (text or chat messages); other columns go to the features. None: empty prompts,
            for which `max_steps` is needed.
        eval_dataset: prompts for `evaluate`; default the training prompts.
        processing_class: the tokenizer; default the one beside the model.
        callbacks, optimizers: as in `transformers.Trainer`.
        peft_config: train an adapter; the reference is then the model with its adapter off.

    Subclasses give `divergence` and `policy_loss`; with a critic also `uses_values`, `score_tokens` and `assign_credit`.

    Raises:
        ValueError: what can't work, before anything is computed or written.
    """

    divergence: Divergence
    uses_values = False  # the policy's forward gives a critic's values too

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        target: Factor,
        args: PolicyGradientConfig,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        peft_config: PeftConfig | None = None,
    ):
        set_seed(args.seed)  # the first weights of an adapter are random
        model = load_policy(model, args.model_init_kwargs, peft_config)
        train_only(model, args.trainable_modules or [".*"])
        tokenizer = load_tokenizer(processing_class, model)
        sampler = TransformersSampler.from_options(tokenizer, model, args)
        if args.use_vllm:
            check_vllm(model)
        if args.disable_dropout:
            disable_dropout(model)
        if train_dataset is None:
            train_dataset = empty_prompts(args)
            eval_dataset = EmptyPrompts(1) if eval_dataset is None else eval_dataset
        else:
            check_groups(args, train_dataset)
        if isinstance(train_dataset, IterableDataset):
            args.accelerator_config.dispatch_batches = False  # rows are not tensors: each process reads the stream
        super().__init__(
            model=model,
            args=args,
            data_collator=list,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        set_seed(args.seed, device_specific=True)  # processes must not sample the same rollouts
        self.loss_is_scaled_for_ga = False
        self.target = target if isinstance(target, Target) else Target([target])
        self.partition = Partition(self.target.normalised)
        if args.use_vllm:
            sampler = VLLMSampler.from_options(sampler, self.model, self.accelerator, args)
        self.actors = Actors(
            self.model,
            lambda: self.model_wrapped,
            self.accelerator,
            sampler,
            args.per_device_eval_batch_size,
            args.seed,
        )
        own = {"tokenizer": tokenizer, "policy": self.actors.policy_active}
        self.target.bind(Context(self.actors.reference_logp, self._sample_reference, self.actors.gather, **own))
        self._averages = Averages()
        self._fitted = False
        self._micro_steps = 0  # taken with the current rollouts
        self._buffer: list[Rollouts] = []
        self._last_rollouts: Rollouts | None = None
        self.reference_pools = ReferencePools(self.actors)
        self.replay = None
        if args.replay_samples:
            self.replay = Replay(self.target, self.actors, args.replay_samples, args.replay_window)

    # ---- what a method gives ----

    def policy_loss(self, out: PolicyOutput, reward_B: Tensor, rollouts: Rollouts) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss per sample and metrics, each (B,), from pseudo-rewards -f'(pi/p)."""
        raise NotImplementedError

    def real_rollouts(self, rows: list[dict]) -> Rollouts | None:
        """Real texts that belong to these rows, for factors that learn from them."""
        return None

    def score_tokens(self, rollouts: Rollouts) -> None:
        """Set per-token numbers of fresh rollouts, before they are weighed."""

    def assign_credit(self, rollouts: Rollouts, scored_N: Scored) -> None:
        """Set per-token advantages of weighed rollouts; `scored_N` are the numbers of all processes' samples."""

    def pseudo_reward(self, log_t: Tensor) -> Tensor:
        """-f'(pi/p) from log t = log pi - log p, elementwise."""
        return -self.divergence.f_prime(log_t)

    # ---- the heart ----

    def compute_loss(self, model, inputs: Rollouts, return_outputs=False, num_items_in_batch=None):
        """The mean loss of a micro-batch of weighed rollouts."""
        loss_B, out = self.sample_losses(model, inputs)
        return (loss_B.mean(), out) if return_outputs else loss_B.mean()

    def sample_losses(self, model, rollouts: Rollouts) -> tuple[Tensor, PolicyOutput]:
        """(B,) losses of weighed rollouts, whose mean over samples of q has the divergence's gradient."""
        out = self.actors.scorer.rollouts(rollouts, module=model, values=self.uses_values)
        known_B = rollouts.log_z_B > -torch.inf  # a prompt whose Z is still 0 has no target yet
        log_p_B = rollouts.log_score_B - torch.where(known_B, rollouts.log_z_B, 0.0)
        known_B, log_p_B = known_B.to(out.logp_B.device), log_p_B.to(out.logp_B.dtype).to(out.logp_B.device)
        reward_B = torch.where(known_B, self.pseudo_reward(out.logp_B.detach() - log_p_B), 0.0)
        loss_B, metrics = self.policy_loss(out, reward_B, rollouts)
        self._averages.add({name: float(value[known_B].mean()) for name, value in metrics.items()})
        return torch.where(known_B, loss_B, 0.0), out

    def _prepare_inputs(self, inputs: list[dict]) -> Rollouts:
        """The micro-batch of rollouts for this micro-step; `inputs` are the rows of a whole set of rollouts."""
        steps = self.args.steps_per_generation
        if not self._buffer or self._micro_steps == steps * self.args.num_iterations:
            rollouts = self._make_rollouts(inputs)
            order = torch.randperm(len(rollouts)) if steps > 1 else torch.arange(len(rollouts))
            self._buffer = [rollouts.select(part) for part in order.chunk(steps)]
            self._micro_steps = 0
        self._micro_steps += 1
        return self._buffer[(self._micro_steps - 1) % steps]

    def _make_rollouts(self, rows: list[dict]) -> Rollouts:
        if not self._fitted:
            self._fit_on_reference()
        self._last_rollouts = rollouts = self.actors.sample_policy(rows)
        self.score_tokens(rollouts)
        self.actors.complete(rollouts)
        self.target.log_score(rollouts)  # computes the features, once
        self.actors.reference_logp(rollouts)
        metrics = self._sample_metrics(rollouts)
        # on fresh samples alone: the replayed ones are few and come again and again
        self.target.fit(rollouts, self.real_rollouts(rows))
        if self.replay is not None:
            fresh, rollouts = rollouts, self.replay.join(rollouts)
            self.replay.add(fresh)
        scored_N, log_z_N = self.weigh(rollouts)
        self.assign_credit(rollouts, scored_N)
        metrics |= rollout_metrics(scored_N, log_z_N, self.partition)
        self._averages.add(metrics, samples=len(rows) * self.args.world_size)
        return rollouts

    def weigh(self, rollouts: Rollouts) -> tuple[Scored, Tensor]:
        """Set log P, log Z and the baseline of this process's rollouts, from those of all processes; updates Z.

        Returns the numbers of all processes' samples, and their log Z (N,).
        """
        scored_N = self._gather_scored(rollouts)
        log_w_N = scored_N.log_score - scored_N.sampler_logp
        self.partition.update(scored_N.prompt_key, log_w_N, self.target.version)
        log_z_N = self.partition.log_z(scored_N.prompt_key)
        known_N = log_z_N > -torch.inf
        if not bool(known_N.any()):
            self._refuse_empty_support()
        log_t_N = scored_N.policy_logp - scored_N.log_score + torch.where(known_N, log_z_N, 0.0)
        reward_N = torch.where(known_N, self.pseudo_reward(log_t_N), 0.0)
        baseline_N = torch.zeros_like(reward_N)
        if not self.divergence.baseline_is_zero:
            keys, group_N = torch.unique(scored_N.prompt_key, return_inverse=True)
            log_ratio_N = scored_N.policy_logp - scored_N.sampler_logp
            baseline_N = leave_one_out_baseline(reward_N, log_ratio_N, group_N, len(keys))
        start = self.args.process_index * len(rollouts)
        mine = slice(start, start + len(rollouts))
        rollouts.log_score_B, rollouts.log_z_B = scored_N.log_score[mine], log_z_N[mine]
        rollouts.baseline_B = baseline_N[mine]
        return scored_N, log_z_N

    def _gather_scored(self, rollouts: Rollouts, policy_logp: Tensor | None = None) -> Scored:
        gather = self.actors.gather
        return Scored(
            log_score=gather(self.target.log_weight(rollouts) + rollouts.sampler_logp_B),
            reference_logp=gather(self.actors.reference_logp(rollouts)),
            policy_logp=gather(rollouts.policy_logp_B if policy_logp is None else policy_logp),
            sampler_logp=gather(rollouts.sampler_logp_B),
            prompt_key=gather(rollouts.prompt_key_B),
        )

    # ---- before the first step ----

    def _fit_on_reference(self) -> None:
        """Fit the moments and start log Z on samples of the reference; show what the run is up against."""
        self._fitted = True
        if not self.args.fit_samples:
            return
        empty, each = isinstance(self.train_dataset, EmptyPrompts), max(self.args.num_generations, 16)
        rows = first_rows(self.train_dataset, 1 if empty else max(1, self.args.fit_samples // each))
        samples, support = self.args.fit_samples, self.args.fit_support
        most = self.args.max_fit_samples or 100 * samples
        pool = self.reference_pools.fitting(rows, samples, self.target.log_score, support, most)
        self.target.fit(pool)
        if self.replay is not None:
            self.replay.add(pool, from_fit=True)
        scored_N = self._gather_scored(pool)
        log_w_N = scored_N.log_score - scored_N.sampler_logp
        self.partition.update(scored_N.prompt_key, log_w_N, self.target.version)
        report = finite(self.target.report(rollouts=pool))
        if self.is_world_process_zero():
            print(f"target: {self.target}")
            print("under the reference: " + ", ".join(f"{name} {value:.4g}" for name, value in report.items()))
        self._averages.pop()  # samples per second start from here

    def _sample_reference(self, prompts: Sequence) -> Rollouts:
        return self.actors.draw([{"prompt": prompt} for prompt in prompts], from_reference=True, salt=FITTING - 1)

    def _refuse_empty_support(self) -> None:
        hard = [factor.formula() for factor, _ in self.target.terms if factor.hard]
        raise ValueError(
            f"none of {self.partition.samples} samples satisfies {' * '.join(hard) or self.target.formula()} (the reference's "
            f"{self.args.fit_samples} fit_samples and the first rollouts), so there is nothing to learn from. Check the "
            "feature on a text of your own, raise fit_samples, start from a model that does it sometimes, or use a soft "
            "constraint: Reward(feature, beta=0.1)."
        )

    # ---- reports ----

    def _sample_metrics(self, rollouts: Rollouts) -> dict[str, float]:
        """Means over all processes of features, lengths and entropy."""
        features = {feature.name for factor, _ in self.target.terms for feature in factor.features}
        metrics = {f"features/{name}": rollouts.scores[name].nanmean() for name in sorted(features)}
        metrics |= length_metrics(rollouts, self.actors.sampler.eos_ids)
        metrics["entropy"] = -rollouts.policy_logp_B.sum() / rollouts.lengths_B.sum().cpu()
        means = self.actors.gather(torch.stack([torch.as_tensor(v).double() for v in metrics.values()]))
        return dict(zip(metrics, means.view(-1, len(metrics)).mean(0).tolist(), strict=True))

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Every divergence between policy and target (with `_stderr`), log Z, ESS, features, lengths: see `evaluation`.

        `eval_samples` completions of the policy for the prompts of the evaluation (or training) dataset, pooled with
        `reference_samples` cached ones of the reference. The training's random numbers are left alone.
        """
        dataset = eval_dataset or self.eval_dataset or self.train_dataset
        rows = first_rows(dataset, 1 if isinstance(dataset, EmptyPrompts) else self.args.eval_samples)
        if not self._fitted:
            self._fit_on_reference()
        policy = self.actors.draw(repeated(rows, self.args.eval_samples), False, salt=self.state.global_step + 1)
        metrics = self.judge(policy, rows) | self._sample_metrics(policy)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in finite(metrics).items()}
        self.evaluation_samples = policy
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def judge(self, policy: Rollouts, rows: list[dict]) -> dict[str, float]:
        """Divergences of the policy, by its samples for these rows and a pool that sees what it dropped."""
        reference = self.reference_pools.judging(rows, self.args.reference_samples)
        alive = (self.target.log_score(reference) > -torch.inf).nonzero().flatten()
        policy_logp = torch.zeros(len(reference), dtype=torch.float64)
        policy_logp[alive] = self.actors.policy_logp(reference.select(alive))
        scored = self._gather_scored(policy)
        metrics = pooled_metrics(scored, self._gather_scored(reference, policy_logp))
        return metrics | {"kl_policy_reference": float((scored.policy_logp - scored.reference_logp).mean())}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a training step's, not an evaluation's or the end's
            logs = {**logs, **self._averages.pop()}
            if self.args.log_completions and self._last_rollouts is not None and self.is_world_process_zero():
                log_samples(self._last_rollouts, self.args, self.state.global_step, self.callback_handler.callbacks)
        super().log(logs, start_time)

    # ---- the Trainer's hooks ----

    def get_train_dataloader(self) -> DataLoader:
        """Each batch has the rows of a whole set of rollouts and comes as often as its micro-steps."""
        return self.accelerator.prepare(prompt_loader(self.train_dataset, self.args))

    def floating_point_ops(self, inputs) -> int:
        return 0  # rows are not model inputs, so there is nothing to count here

    def process_state(self) -> dict:
        return {
            "fitted": self._fitted,
            "micro_steps": self._micro_steps,
            "buffer": [part.state_dict() for part in self._buffer],
            "partition": self.partition.state_dict(),
            "target": self.target.state_dict(),
            "replay": None if self.replay is None else self.replay.state_dict(),
        }

    def load_process_state(self, state: dict) -> None:
        self._fitted, self._micro_steps = state["fitted"], state["micro_steps"]
        self._buffer = [Rollouts(**part).tokens_to(self.args.device) for part in state["buffer"]]
        self.partition.load_state_dict(state["partition"])
        self.target.load_state_dict(state["target"])
        if self.replay is not None:
            self.replay.load_state_dict(state["replay"])
