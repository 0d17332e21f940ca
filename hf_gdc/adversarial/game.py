"""How the game between policy and discriminator stands, from samples that the discriminator has not learned from.

Left out: what is done about it (the trainer's). Shapes: R real texts, F samples of the policy, of all processes; T tokens.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..rollouts import Rollouts
from .losses import calibration

SEPARABLE = 0.99  # the area under the curve at which the sides count as separable
TELLING = 0.8  # the area at which one plain feature counts as the discriminator's shortcut
COLLAPSED = 0.25  # times the real texts' share of distinct ones: samples with fewer count as a collapse
ACTIONS = ("warn", "pause", "stop")


def area_under_curve(real_R: Tensor, fake_F: Tensor) -> float:
    """The probability that a real text's number is above a sample's (ties half): 1/2 says nothing, 0 and 1 everything."""
    real_R, fake_F = real_R.contiguous(), fake_F.sort().values  # searchsorted warns of a slice, such as last prefixes
    below = torch.searchsorted(fake_F, real_R, right=False) + torch.searchsorted(fake_F, real_R, right=True)
    return float(below.double().mean()) / (2 * len(fake_F))


def accuracy(real_R: Tensor, fake_F: Tensor) -> float:
    """Share on the right side of 0, both sides weighing the same; a logit of exactly 0 is half right."""
    return float(((real_R.sign().double().mean() - fake_F.sign().double().mean()) / 2 + 1) / 2)


def completion_keys(rollouts: Rollouts) -> Tensor:
    """(B,) int64: a number for each completion's token ids, the same for the same ids."""
    ids_BT = (rollouts.completion_ids_BT.cpu() + 1) * rollouts.completion_mask_BT.cpu()
    generator = torch.Generator().manual_seed(0)
    multipliers_T = torch.randint(-(2**62), 2**62, (8192,), generator=generator)
    return (ids_BT * multipliers_T[torch.arange(ids_BT.shape[1]) % 8192]).sum(1)  # wraps around, as hashes do


def copies(keys_B: Tensor, prompt_key_B: Tensor) -> float:
    """Share of completions of which there is an earlier copy for the same prompt."""
    return 1 - len(torch.unique(torch.stack([keys_B, prompt_key_B], 1), dim=0)) / len(keys_B)


@dataclass
class Sides:
    """What is compared, of all processes: logits, lengths in tokens, whether they ended with EOS, keys of completions and
    prompts; each (R,) or (F,), float64 or int64."""

    logits: Tensor
    lengths: Tensor
    ended: Tensor
    keys: Tensor
    prompts: Tensor


class Game:
    """Watches fresh samples, names shortcuts, and says when the discriminator should rest or the run stop.

    Args:
        tokenizer: the policy's. eos_ids: what ends a completion.
        gather: joins CPU tensors of all processes.
        action: what a collapse leads to: one of `ACTIONS`.
        patience: sets of rollouts in a row that make it one.
        target_accuracy: the discriminator rests while its accuracy on fresh samples is above this; None: never.

    `stop` becomes True where the run should end.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: list[int],
        gather: Callable[[Tensor], Tensor],
        action: str = "warn",
        patience: int = 10,
        target_accuracy: float | None = None,
    ):
        self.tokenizer, self.eos_ids, self.gather = tokenizer, torch.tensor(eos_ids), gather
        self.action, self.patience, self.target_accuracy = action, patience, target_accuracy
        self.stop = False
        self._rounds = {"separable": 0, "copies": 0}  # in a row
        self._said: set[str] = set()

    def sides(self, rollouts: Rollouts, logits_B: Tensor) -> Sides:
        """One side, of all processes."""
        ids_BT, mask_BT = rollouts.completion_ids_BT.cpu(), rollouts.completion_mask_BT.cpu()
        ended = (torch.isin(ids_BT, self.eos_ids) & mask_BT).any(1)
        numbers = [logits_B.double(), mask_BT.sum(1).double(), ended.double()]
        numbers += [completion_keys(rollouts), rollouts.prompt_key_B]
        return Sides(*map(self.gather, numbers))

    def metrics(self, real: Sides, fake: Sides) -> dict[str, float]:
        """Numbers for the log; see the recipe's page for what they mean."""
        return {
            "discriminator/accuracy": accuracy(real.logits, fake.logits),
            "discriminator/auc": area_under_curve(real.logits, fake.logits),
            "discriminator/calibration": calibration(fake.logits),
            "discriminator/logit_real": float(real.logits.mean()),
            "discriminator/logit_sampled": float(fake.logits.mean()),
            "game/length_gap": float(fake.lengths.mean() - real.lengths.mean()),
            "game/ended_gap": float(fake.ended.mean() - real.ended.mean()),
            "game/copies": copies(fake.keys, fake.prompts),
            "game/copies_real": copies(real.keys, real.prompts),
        }

    def observe(
        self, real: Rollouts, fake: Rollouts, real_logits: Tensor, fake_logits: Tensor
    ) -> tuple[dict[str, float], bool]:
        """Metrics of a set of rollouts before the discriminator learns from it, and whether it should."""
        sides = self.sides(real, real_logits), self.sides(fake, fake_logits)
        metrics = self.metrics(*sides)
        area = metrics["discriminator/auc"]
        if area >= TELLING:
            self._name_shortcuts(*sides, real, fake)
        signs = {
            "separable": area >= SEPARABLE,
            "copies": 1 - metrics["game/copies"] < COLLAPSED * (1 - metrics["game/copies_real"]),
        }
        for sign, seen in signs.items():
            self._rounds[sign] = self._rounds[sign] + 1 if seen else 0
        collapsed = [sign for sign, rounds in self._rounds.items() if rounds >= self.patience]
        for sign in collapsed:
            self._say(sign, self._collapse_message(sign, metrics))
        self.stop = self.stop or bool(collapsed) and self.action == "stop"
        rest = bool(collapsed) and self.action == "pause"
        rest = rest or self.target_accuracy is not None and metrics["discriminator/accuracy"] > self.target_accuracy
        metrics["discriminator/rests"] = float(rest)
        return metrics, not rest

    def _collapse_message(self, sign: str, metrics: dict[str, float]) -> str:
        what = {
            "separable": f"the discriminator tells samples from real texts (AUC {metrics['discriminator/auc']:.3f}), so "
            "that its logits say little of how to improve. Lower discriminator_learning_rate or discriminator_steps, "
            "set logit_clip, discriminator_target_accuracy or r1, or warm the policy up (mle_steps)",
            "copies": f"{metrics['game/copies']:.0%} of the samples are copies of others (of the real texts "
            f"{metrics['game/copies_real']:.0%}): the policy has collapsed. Go back to an earlier checkpoint, with a lower "
            "learning_rate, a divergence that covers (kl or js), or demonstrations",
        }[sign]
        then = {"warn": "", "pause": " The discriminator rests meanwhile.", "stop": " The run stops."}[self.action]
        return f"for {self._rounds[sign]} sets of rollouts {what}.{then}"

    def _name_shortcuts(self, real: Sides, fake: Sides, real_rollouts: Rollouts, fake_rollouts: Rollouts) -> None:
        """Warn where one plain feature separates the sides nearly as well as the discriminator."""
        areas = {
            "length": area_under_curve(real.lengths, fake.lengths),
            "EOS": area_under_curve(real.ended, fake.ended),
        }
        if "tokenisation" not in self._said:
            ours, theirs = (self.gather(self._unusual(side)) for side in (real_rollouts, fake_rollouts))
            areas["tokenisation"] = area_under_curve(ours, theirs)
        fixes = {
            "length": "sampled completions are "
            f"{'longer' if fake.lengths.mean() > real.lengths.mean() else 'shorter'} than real ones "
            f"({float(fake.lengths.mean()):.1f} against {float(real.lengths.mean()):.1f} tokens): warm the policy up on the "
            "real texts (mle_steps), or check max_completion_length",
            "EOS": f"{float(fake.ended.mean()):.0%} of the samples and {float(real.ended.mean()):.0%} of the real texts end "
            "with EOS: check max_completion_length, and that the policy was trained to end its texts",
            "tokenisation": "real texts are cut into tokens in another way than the samples are: check that the real texts are "
            "plain text (blanks, line ends) as the policy's tokenizer writes it",
        }
        for name, area in areas.items():
            if max(area, 1 - area) >= TELLING:
                self._say(
                    name,
                    f"the discriminator may read nothing but {name} (AUC {max(area, 1 - area):.2f}): {fixes[name]}.",
                )

    def _unusual(self, rollouts: Rollouts) -> Tensor:
        """(B,) 1.0 where the text, tokenised again, gives other ids."""
        again = self.tokenizer(rollouts.texts, add_special_tokens=False, verbose=False)["input_ids"]
        ends = set(self.eos_ids.tolist())
        same = [
            first == [i for i in second if i not in ends]
            for first, second in zip(again, rollouts.completion_ids(), strict=True)
        ]
        return 1.0 - torch.tensor(same, dtype=torch.float64)

    def _say(self, name: str, message: str) -> None:
        if name not in self._said:
            self._said.add(name)
            warnings.warn(message, stacklevel=4)

    def state_dict(self) -> dict:
        return {"rounds": dict(self._rounds), "said": sorted(self._said)}

    def load_state_dict(self, state: dict) -> None:
        self._rounds, self._said = dict(state["rounds"]), set(state["said"])
