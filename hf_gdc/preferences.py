"""Preferences over the embedded stories, by a rule that is written down, so that the true reward is known.

    r(x) = how many different kind words x has - how many different unkind ones

Two stories of the grammar that begin with the same sentence are a pair: exact samples of what may follow it. The first is
preferred with probability sigmoid((r(first) - r(second)) / temperature), the model of Bradley and Terry (1952), which a
reward model assumes; it can then learn r / temperature, up to a number for each prompt.

Left out: preferences among samples of a model.
"""

import math
import random
import re

from . import stories
from .ready_features import text_of

KIND = {"kind", "friendly", "gentle", "friends", "friend", "happy", "thanked", "gave", "sang", "danced", "laughed"}
UNKIND = {"feared", "stole", "lost", "cried", "hungry", "cold", "sick", "lonely"}


def kindness(completions, **_) -> list[float]:
    """The true reward r, with TRL's signature: as an option of a recipe, `hf_gdc.preferences:kindness`."""
    words = (set(re.findall(r"\w+", text_of(completion).lower())) for completion in completions)
    return [float(len(found & KIND) - len(found & UNKIND)) for found in words]


def story_pairs(num_pairs: int, seed: int = 0) -> list[tuple[str, str, str]]:
    """(first sentence, what follows it in one story, and in another), the same ones first for every `num_pairs`."""
    pairs: list[tuple[str, str, str]] = []
    size = 4 * num_pairs
    while len(pairs) < num_pairs:
        pairs, waiting = [], {}
        for text in stories.sample(size, seed):
            first, stop, rest = text.partition(".")
            other = waiting.pop(first, None)
            if other is None:
                waiting[first] = rest
            elif other != rest:
                pairs.append((first + stop, other, rest))
        size *= 2
    return pairs[:num_pairs]


def story_preferences(num_pairs: int, temperature: float = 1.0, seed: int = 0) -> list[dict]:
    """Rows with `prompt`, `chosen`, `rejected` and their true rewards, `chosen_reward` and `rejected_reward`.

    Args:
        temperature: of the choice, in units of r; towards 0 the better story is always preferred.

    Raises:
        ValueError: a temperature that is not positive, or no pairs.
    """
    if not temperature > 0 or num_pairs < 1:
        raise ValueError(
            f"preferences need a temperature above 0 and pairs to choose from, not temperature={temperature:g} and {num_pairs} "
            "pairs; a small temperature makes them certain."
        )
    pairs, uniform, rows = story_pairs(num_pairs, seed), random.Random(f"preferences {seed}").random, []
    for prompt, *both in pairs:
        first, second = kindness(both)
        odds = min((second - first) / temperature, 700.0)  # log odds that the second is preferred; exp's range
        chosen = 0 if uniform() < 1 / (1 + math.exp(odds)) else 1
        rewards = (first, second)
        rows.append(
            {
                "prompt": prompt,
                "chosen": both[chosen],
                "rejected": both[1 - chosen],
                "chosen_reward": rewards[chosen],
                "rejected_reward": rewards[1 - chosen],
            }
        )
    return rows
