"""The policy and its reference: who samples, and who scores, on any number of processes.

Under PEFT both are one set of weights, with the adapter on or off; otherwise the reference is a frozen copy of the start.

Left out: training. Shapes: B samples of this process.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from .loading import frozen_copy
from .rollouts import Rollouts
from .sampling import TransformersSampler, unsharded
from .scoring import PolicyOutput, Scorer, evaluating, same_trainable


class Actors:
    """Sampling from and scoring under the policy and the reference.

    Args:
        model: the policy as it starts, not yet wrapped.
        wrapped: gives the policy's wrapped module, which changes when training starts.
        accelerator, sampler: of the run.
        batch_size: completions that a process samples or scores at once outside of the training step.
        seed: of the draws that must not disturb the training's random numbers.
    """

    def __init__(
        self,
        model: nn.Module,
        wrapped: Callable[[], nn.Module],
        accelerator: Accelerator,
        sampler: TransformersSampler,
        batch_size: int,
        seed: int,
    ):
        self.accelerator, self.sampler, self.batch_size, self.seed = accelerator, sampler, batch_size, seed
        self.scorer = Scorer(model, accelerator.autocast)
        self._wrapped = wrapped
        self._reference = None if isinstance(model, PeftModel) else frozen_copy(model, accelerator)
        self._reference_scorer = self.scorer
        if self._reference is not None:
            self._reference_scorer = Scorer(accelerator.unwrap_model(self._reference), accelerator.autocast)

    def sample_policy(self, rows: Sequence[dict]) -> Rollouts:
        """One completion from the policy for each of this process's rows (`prompt` and other columns)."""
        self.sampler.sync()
        with self.policy_active() as model:
            return self._sample(self.sampler, model, rows)

    def sample_reference(self, rows: Sequence[dict]) -> Rollouts:
        """One completion from the reference, unwarped, for each of this process's rows."""
        with self._reference_active() as model:
            rollouts = self._sample(self.sampler.unwarped(), model, rows)
        rollouts.scores["reference_logp"] = rollouts.policy_logp_B  # recorded while sampling
        return rollouts

    def draw(
        self, rows: Sequence[dict], from_reference: bool, salt: int = 0, other: nn.Module | None = None
    ) -> Rollouts:
        """This process's share of completions for the rows, unwarped, made in parts and kept on the CPU.

        From the policy, the reference, or another model that is whole on every process. The same in every run with this
        seed and salt; the training's own random numbers go on undisturbed.
        """
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        rows = [*rows, *rows[: -len(rows) % world]][rank::world]
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        active = self._reference_active() if from_reference else self.policy_active()
        if other is not None:
            active = nullcontext(other.to(self.accelerator.device))
        with active as model, torch.random.fork_rng(devices):
            torch.manual_seed(self.seed + 7919 * (rank + 1) + 104729 * (salt + 1))
            parts = [rows[at : at + self.batch_size] for at in range(0, len(rows), self.batch_size)]
            sampler = self.sampler.unwarped()
            quiet = len(parts) < 4 or not self.accelerator.is_local_main_process
            parts = tqdm(
                parts, desc="sampling the reference" if from_reference else "sampling", disable=quiet, leave=False
            )
            rollouts = Rollouts.concatenate([self._sample(sampler, model, part).tokens_to("cpu") for part in parts])
        if from_reference:
            rollouts.scores["reference_logp"] = rollouts.policy_logp_B  # recorded while sampling
        return rollouts

    def complete(self, rollouts: Rollouts) -> None:
        """Set log pi of fresh rollouts where another engine sampled them."""
        if rollouts.policy_logp_B is None:
            rollouts.policy_logp_B = self.policy_logp(rollouts)

    def policy_logp(self, rollouts: Rollouts) -> Tensor:
        """(B,) log pi of the policy as it is now."""
        with self.policy_active():
            return self._score(self.scorer, rollouts)

    def policy_logps(self, rollouts: Rollouts) -> Tensor:
        """(B, T) log pi of each token under the policy as it is now, on the accelerator's device."""
        with self.policy_active():
            return outputs_in_parts(self.scorer, rollouts, self.batch_size, self.accelerator.device).logps_BT

    def score_tokens(self, rollouts: Rollouts, values: bool = False) -> PolicyOutput:
        """Set per-token log pi of the policy as it is now, log a and, with a critic, the values before each token.

        Returns what the policy's pass gave, entropies too.
        """
        device = self.accelerator.device
        with self.policy_active():
            out = outputs_in_parts(self.scorer, rollouts, self.batch_size, device, entropy=True, values=values)
        with self._reference_active():
            reference = outputs_in_parts(self._reference_scorer, rollouts, self.batch_size, device)
        rollouts.policy_logps_BT, rollouts.values_BT = out.logps_BT, out.values_BT
        rollouts.reference_logps_BT = reference.logps_BT
        rollouts.policy_logp_B = out.logp_B.cpu().double()
        rollouts.scores["reference_logp"] = reference.logp_B.cpu().double()
        return out

    def reference_logp(self, rollouts: Rollouts) -> Tensor:
        """(B,) log a, computed once for the rollouts."""
        if "reference_logp" not in rollouts.scores:
            with self._reference_active():
                rollouts.scores["reference_logp"] = self._score(self._reference_scorer, rollouts)
        return rollouts.scores["reference_logp"]

    def tensors(self) -> list[Tensor]:
        """Parameters and buffers of the policy and the reference, those that both use once."""
        models = (self.scorer.model, self._reference_scorer.model)
        found = {id(t): t for model in models for t in (*model.parameters(), *model.buffers())}
        return list(found.values())

    def gather(self, tensor: Tensor) -> Tensor:
        """A CPU tensor joined over processes, in the order of their ranks."""
        if self.accelerator.num_processes == 1:
            return tensor
        return self.accelerator.gather(tensor.to(self.accelerator.device)).cpu()

    def _sample(self, sampler: TransformersSampler, model: nn.Module, rows: Sequence[dict]) -> Rollouts:
        return sampler(
            model,
            *split_rows(rows),
            autocast=self.accelerator.autocast,
            synced=self.accelerator.distributed_type in ("FSDP", "DEEPSPEED"),
        )

    @contextmanager
    def policy_active(self):
        """The policy's model, whole, for a with-block."""
        with unsharded(self._wrapped(), self.accelerator) as model:
            yield model

    @contextmanager
    def _reference_active(self):
        if self._reference is not None:
            with unsharded(self._reference, self.accelerator) as model:
                yield model
            return
        with self.policy_active() as model, same_trainable(model), model.disable_adapter():
            yield model

    def _score(self, scorer: Scorer, rollouts: Rollouts) -> Tensor:
        return score_in_parts(scorer, rollouts, self.batch_size, self.accelerator.device)


@torch.no_grad()
def score_in_parts(scorer: Scorer, rollouts: Rollouts, batch_size: int, device: torch.device) -> Tensor:
    """(B,) log-probs in float64 on the CPU, `batch_size` completions at a time, with dropout off."""
    if not len(rollouts):
        return torch.zeros(0, dtype=torch.float64)
    return torch.cat([out.logp_B.cpu().double() for out in _outputs(scorer, rollouts, batch_size, device)])


@torch.no_grad()
def outputs_in_parts(
    scorer: Scorer,
    rollouts: Rollouts,
    batch_size: int,
    device: torch.device,
    entropy: bool = False,
    values: bool = False,
) -> PolicyOutput:
    """Per-token numbers on `device`, `batch_size` completions at a time, with dropout off."""
    length, joined = rollouts.completion_ids_BT.shape[1], {}
    for out in _outputs(scorer, rollouts, batch_size, device, entropy=entropy, values=values):
        for name, value in vars(out).items():
            if value is not None:
                joined.setdefault(name, []).append(nn.functional.pad(value, (0, length - value.shape[1])))
    return PolicyOutput(**{name: torch.cat(parts) for name, parts in joined.items()})


def _outputs(
    scorer: Scorer, rollouts: Rollouts, batch_size: int, device: torch.device, **wanted: bool
) -> Iterator[PolicyOutput]:
    """What the scorer says of `batch_size` completions at a time."""
    parts = torch.arange(len(rollouts)).split(batch_size)
    with evaluating(scorer.model):
        for part in parts:
            chosen = rollouts if len(parts) == 1 else rollouts.select(part)
            yield scorer.rollouts(chosen.tokens_to(device), **wanted)


def split_rows(rows: Sequence) -> tuple[list, dict[str, list]]:
    """Prompts and other columns of rows of a dataset; the rows may also be bare prompts, all of them."""
    if not isinstance(rows[0], dict):
        return list(rows), {}
    names = [name for name in rows[0] if name != "prompt"]
    return [row["prompt"] for row in rows], {name: [row[name] for row in rows] for name in names}
