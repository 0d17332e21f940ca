"""How a discriminator learns: optimizer steps on fresh samples and real texts, with the usual stabilisers.

Gradients are averaged over processes by hand, and the optimizer is torch's own: the accelerator's would skip steps while the
policy accumulates gradients, and an adapter of the policy's own model can't be wrapped a second time. So the discriminator is
whole on every process, however the policy is spread.

Left out: losses (`losses`), networks (`logit_networks`), when to rest (`game`), energies (`energy_training`).
Shapes: R real texts, F samples (F a multiple of R: those of the first text's prompt come first), T tokens.
"""

import warnings
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from accelerate.utils import broadcast
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..actors import Actors
from ..divergences import Divergence
from ..rollouts import Rollouts
from .arguments import AdversarialConfig
from .game import Game
from .logit_networks import LogitNetwork
from .losses import binary_terms, bound_terms, has_bound, pair_terms

MOST = 5.0  # the largest weight pi/q of a replayed sample
WEIGHT, PREFIXES = (
    "weight",
    "weights of prefixes",
)  # of samples in the loss, (B,), and of tokens, (B, T): entries of scores


class DiscriminatorLearner:
    """Trains a network to be log p_data/q: call it with fresh samples of q and real texts.

    Args:
        network: what learns.
        args: the options.
        divergence: for the loss "bound".
        actors: of the run.
        log: takes metrics by name.
        game: watches; None: nobody does.
        fake_weights: (F,) weights of mean 1 that turn q into what the real texts are compared with; None: q itself.

    Raises:
        ValueError: DeepSpeed or fp16; a dense network with a loss of pairs; a divergence whose bound has no gradient.
    """

    def __init__(
        self,
        network: LogitNetwork,
        args: AdversarialConfig,
        divergence: Divergence,
        actors: Actors,
        log: Callable[[dict[str, float]], None],
        game: Game | None = None,
        fake_weights: Callable[[Rollouts], Tensor] | None = None,
    ):
        self.network, self.args, self.divergence, self.actors = network, args, divergence, actors
        self.log, self.game, self.fake_weights = log, game, fake_weights
        self._check()
        network.to(actors.accelerator.device)
        network.autocast = actors.accelerator.autocast
        if args.spectral_norm:
            network.apply_spectral_norm()
        self.parameters = network.trainable_parameters()
        if actors.accelerator.num_processes > 1:
            for tensor in network.own_state().values():
                broadcast(tensor)
        for parameter in self.parameters:
            parameter.requires_grad_(False)  # but while it learns: it is no part of what trains the policy
        rate = args.discriminator_learning_rate
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=args.learning_rate if rate is None else rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.discriminator_weight_decay,
        )
        self._window: tuple[Rollouts, Rollouts] | None = None  # earlier samples and their real texts

    def _check(self) -> None:
        args, accelerator = self.args, self.actors.accelerator
        if accelerator.distributed_type == "DEEPSPEED":
            raise ValueError(
                "a discriminator beside the policy makes two trained models, of which DeepSpeed's engine knows one: use DDP "
                "or FSDP2 (recipes/accelerate)."
            )
        if accelerator.mixed_precision == "fp16":
            raise ValueError(
                "fp16 scales one model's loss, and here two are trained: use bf16=True, or full precision."
            )
        if self.network.dense and args.discriminator_loss in ("bradley_terry", "relativistic"):
            raise ValueError(
                f"{args.discriminator_loss} compares whole texts, and a dense discriminator learns from prefixes: use bce or "
                "bound, or a discriminator that is not dense."
            )
        if args.discriminator_loss == "bound" and not has_bound(self.divergence.f_prime):
            raise ValueError(
                f"the bound of {self.divergence.name} has no gradient in the logit, as its f' is flat: use "
                "discriminator_loss='bce', whose optimum is the same."
            )

    def __call__(self, rollouts: Rollouts, real: Rollouts) -> bool:
        """Learn from fresh samples and real texts; True if the network changed."""
        learn = True
        if self.game is not None:
            sampled = self.network.whole_scores(rollouts)  # at hand: the target has scored them, before the real texts
            metrics, learn = self.game.observe(real, rollouts, self.network.whole_scores(real), sampled)
            self.log(metrics)
        if learn:
            for _ in range(self.args.discriminator_steps):
                self.log(self.step(*self._with_earlier(rollouts, real)))
        self._remember(rollouts, real)
        return learn

    def step(self, fake: Rollouts, real: Rollouts) -> dict[str, float]:
        """One optimizer step on samples and real texts, in micro-batches."""
        fake, real = self.prepare(fake, real)
        each, loss = len(fake) // len(real), 0.0
        with self._learning():
            self.optimizer.zero_grad()
            for part in torch.arange(len(real)).split(max(1, self.args.per_device_train_batch_size // each)):
                chosen = (part[:, None] * each + torch.arange(each)).flatten()
                value = self.loss(real.select(part), fake.select(chosen))
                value.backward()
                loss = loss + value.detach()
            self._average_gradients()
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.args.max_grad_norm or torch.inf)
            if not bool(norm.isfinite()):
                raise ValueError(
                    f"the logits of the discriminator {self.network.name}, or their gradients, are not finite. Check that its "
                    "weights are; lower discriminator_learning_rate, or set logit_clip."
                )
            self.optimizer.step()
        self.network.forget()
        return {"discriminator/loss": float(loss), "discriminator/grad_norm": float(norm)}

    def prepare(self, fake: Rollouts, real: Rollouts) -> tuple[Rollouts, Rollouts]:
        """Copies with the weight of each sample in the loss: on both sides they add up to 1, or tokens' weights do nearly."""
        tokens = 1.0
        if self.network.dense:  # a token weighs the same on both sides, so that prefixes keep their ratios
            counts = torch.stack([side.lengths_B.double().mean().cpu() for side in (fake, real)])
            tokens = float(self.actors.gather(counts).mean())
        weights_F = fake.scores[WEIGHT] if WEIGHT in fake.scores else torch.ones(len(fake), dtype=torch.float64)
        if self.fake_weights is not None:
            weights_F = weights_F * self.fake_weights(fake)
        weights_R = torch.full((len(real),), 1 / (len(real) * tokens), dtype=torch.float64)
        kept = {name: fake.scores[name] for name in (PREFIXES,) if name in fake.scores}
        fake = replace(fake, scores=kept | {WEIGHT: weights_F / (len(fake) * tokens)})
        return fake, replace(real, scores={WEIGHT: weights_R})

    def loss(self, real: Rollouts, fake: Rollouts) -> Tensor:
        """The part of the loss that is of these texts and samples, as `prepare` gave them."""
        args, network = self.args, self.network
        with self._penalised(real, args.r1) as real_penalty:
            real_BT = network.logits(real)
            penalty = real_penalty(real_BT)
        with self._penalised(fake, args.r2) as fake_penalty:
            fake_BT = network.logits(fake)
            penalty = penalty + fake_penalty(fake_BT)
        return self.objective(real_BT, fake_BT, real, fake) + penalty

    def objective(self, real_BT: Tensor, fake_BT: Tensor, real: Rollouts, fake: Rollouts) -> Tensor:
        """The weighted loss of logits."""
        args = self.args
        weights_RT, weights_FT = self._weights(real, real_BT), self._weights(fake, fake_BT)
        if args.discriminator_loss in ("bradley_terry", "relativistic"):
            pairs_RF = weights_FT[:, 0].expand(len(real), -1)
            if args.discriminator_loss == "bradley_terry":
                each = len(fake) // len(real)
                own = torch.arange(len(fake), device=pairs_RF.device) // each
                pairs_RF = pairs_RF * (own == torch.arange(len(real), device=pairs_RF.device)[:, None])
            pairs_RF = pairs_RF / pairs_RF.sum() * weights_RT.sum()
            return (pairs_RF * pair_terms(real_BT[:, 0], fake_BT[:, 0])).sum()
        if args.discriminator_loss == "bound":
            terms = bound_terms(real_BT, fake_BT, self.divergence.f, self.divergence.f_prime)
        else:
            terms = binary_terms(real_BT, fake_BT, args.discriminator_label_smoothing)
        kept = ((weights_RT, terms[0]), (weights_FT, terms[1]))
        return sum((weights * torch.where(weights > 0, values, 0.0)).sum() for weights, values in kept)

    def _weights(self, side: Rollouts, logits_BT: Tensor) -> Tensor:
        """Weights of the logits, 0 behind the end of a completion."""
        weights_B1 = side.scores[WEIGHT][:, None].to(logits_BT.dtype).to(logits_BT.device)
        if not self.network.dense:
            return weights_B1
        weights_BT = weights_B1 * side.completion_mask_BT
        if PREFIXES in side.scores:
            weights_BT = weights_BT * side.scores[PREFIXES][:, : weights_BT.shape[1]].to(weights_BT)
        return weights_BT

    @contextmanager
    def _penalised(self, side: Rollouts, strength: float):
        """Gives what makes weight/2 E ||grad l||^2 of logits computed inside (Mescheder et al. 2018, arXiv 1801.04406)."""
        if not strength:
            yield lambda logits_BT: 0.0
            return
        found: list[Tensor] = []

        def hook(module, inputs, output: Tensor) -> Tensor:
            found.append(output if output.requires_grad else output.detach().requires_grad_())
            return found[-1]

        def penalty(logits_BT: Tensor) -> Tensor:
            ends_B1 = side.lengths_B[:, None] - 1 if self.network.dense else torch.zeros_like(side.lengths_B)[:, None]
            (slopes,) = torch.autograd.grad(logits_BT.gather(1, ends_B1).sum(), found[-1], create_graph=True)
            weights_B = side.scores[WEIGHT].to(slopes.dtype).to(slopes.device)
            return strength / 2 * (weights_B * slopes.flatten(1).square().sum(1)).sum()

        handle = self.network.embeddings().register_forward_hook(hook)
        try:
            yield penalty
        finally:
            handle.remove()

    @contextmanager
    def _learning(self):
        """Its parameters take gradients, and dropout is on, for the duration."""
        twice = self.args.r1 or self.args.r2  # differentiated, which the fused kernels of attention can't be
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        try:
            with self.network.in_mode(training=True), sdpa_kernel(SDPBackend.MATH) if twice else nullcontext():
                yield
        finally:
            for parameter in self.parameters:
                parameter.requires_grad_(False)

    def _average_gradients(self) -> None:
        """The mean over processes, in one message."""
        accelerator = self.actors.accelerator
        if accelerator.num_processes == 1:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        flat = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        parts = flat.split([gradient.numel() for gradient in gradients])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    # ---- replay ----

    def _with_earlier(self, fake: Rollouts, real: Rollouts) -> tuple[Rollouts, Rollouts]:
        """Fresh samples and some earlier ones, with their real texts; weighted by pi/q, so that the optimum stays log p/pi."""
        each, wanted = len(fake) // len(real), self.args.discriminator_replay_samples
        if self._window is None or not wanted:
            return fake, real
        old_fake, old_real = self._window
        part = torch.randperm(len(old_real))[: max(1, wanted // each)]
        chosen = (part[:, None] * each + torch.arange(each)).flatten()
        device = fake.completion_ids_BT.device
        older = old_fake.select(chosen).tokens_to(device)
        fresh = bare(fake, self.network.dense)
        if self.network.dense:
            log_w_BT = (self.actors.policy_logps(older) - older.sampler_logps_BT).cumsum(1)
            older.scores[PREFIXES] = log_w_BT.exp().clamp_max(MOST)
            fresh.scores[PREFIXES] = torch.ones_like(fresh.completion_ids_BT, dtype=log_w_BT.dtype)
        else:
            log_w_B = self.actors.policy_logp(older) - older.sampler_logp_B
            older.scores[WEIGHT] = log_w_B.exp().clamp_max(MOST)
            fresh.scores[WEIGHT] = torch.ones(len(fresh), dtype=torch.float64)
        real = Rollouts.concatenate([bare(real), old_real.select(part).tokens_to(device)])
        return Rollouts.concatenate([fresh, older]), real

    def _remember(self, fake: Rollouts, real: Rollouts) -> None:
        if not self.args.discriminator_replay_samples:
            return
        each, window = len(fake) // len(real), self.args.discriminator_replay_window
        pair = (bare(fake, self.network.dense).tokens_to("cpu"), bare(real).tokens_to("cpu"))
        if self._window is not None:
            pair = tuple(Rollouts.concatenate([old, new]) for old, new in zip(self._window, pair, strict=True))
        kept = max(len(real), window // each)
        keep = torch.arange(max(0, len(pair[1]) - kept), len(pair[1]))
        chosen = (keep[:, None] * each + torch.arange(each)).flatten()
        self._window = pair[0].select(chosen), pair[1].select(keep)

    # ---- checkpoints: what all processes share, and what each has ----

    def state_dict(self) -> dict:
        return {"network": self.network.own_state(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.network.load_own_state(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])

    def process_state(self) -> dict:
        window = None if self._window is None else [side.state_dict() for side in self._window]
        return {"window": window, "game": None if self.game is None else self.game.state_dict()}

    def load_process_state(self, state: dict) -> None:
        if state["game"] is not None:
            self.game.load_state_dict(state["game"])
        window = state["window"]
        if window is None and self.args.discriminator_replay_samples:
            warnings.warn("the checkpoint has no samples to replay: the discriminator starts with none.", stacklevel=2)
        self._window = None if window is None else tuple(Rollouts(**side) for side in window)


def bare(rollouts: Rollouts, per_token: bool = False) -> Rollouts:
    """Tokens, prompts' keys and log q alone; `per_token` keeps its parts."""
    return Rollouts(
        rollouts.prompt_ids_BP,
        rollouts.prompt_mask_BP,
        rollouts.completion_ids_BT,
        rollouts.completion_mask_BT,
        rollouts.prompt_key_B,
        rollouts.sampler_logp_B,
        rollouts.policy_logp_B,
        sampler_logps_BT=rollouts.sampler_logps_BT if per_token else None,
    )
