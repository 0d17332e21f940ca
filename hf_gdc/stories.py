"""The embedded corpus: a small probabilistic grammar of children's stories, written for this project.

Every story has an exact log-probability, and the entropy and the share of stories with a given word are
exact too, so that true divergences are known: 1% of the stories have a dragon, 20% a female protagonist.

The grammar is data (`RULES`, at the end). A rule gives a symbol its options; a story is the leftmost
derivation from `story`. A symbol is chosen once: later mentions repeat the choice, which is how a name, a
lost object or an animal returns. `Given` lets an option's probability depend on an earlier choice.

Left out: ambiguity is allowed in `log_prob`, which sums over derivations, but not in `entropy`, which is the
entropy of the derivations; the tests check that no story of `RULES` has two. No recursion: all is finite.
"""

import math
import random
import re
from bisect import bisect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

Options = str | list[str] | dict[str, float]  # one option, equally likely ones, or options with weights


@dataclass(frozen=True)
class Given:
    """Options that depend on what `symbol` became earlier; a key of `table` may list several choices."""

    symbol: str
    table: Mapping[str, Options]


class Slot(NamedTuple):
    """A mention of a symbol: `{symbol}`, or `{!symbol}` to choose it now without writing it."""

    symbol: str
    hidden: bool


Parts = tuple[str | Slot, ...]  # what is still to write: literal text and slots
Bound = dict[str, Parts]  # the choices made so far


def _parts(template: str) -> Parts:
    if re.search(r"\w\{|\}\w", template):
        raise ValueError(f"a slot of {template!r} touches a letter, so the words of a story would be unclear")
    pieces = re.split(r"\{(!?\w+)\}", template)
    slots = [Slot(name.lstrip("!"), name.startswith("!")) for name in pieces[1::2]]
    return tuple(part for pair in zip(pieces[::2], [*slots, ""], strict=True) for part in pair if part)


class _Choice(NamedTuple):
    """The options of one rule in one context, with their probabilities."""

    options: list[Parts]
    probabilities: list[float]
    cumulative: list[float]

    @classmethod
    def of(cls, options: Options) -> "_Choice":
        if isinstance(options, str):
            options = [options]
        weights = options if isinstance(options, dict) else dict.fromkeys(options, 1.0)
        probabilities = [weight / sum(weights.values()) for weight in weights.values()]
        return cls([_parts(option) for option in weights], probabilities, list(accumulate(probabilities)))


class Grammar:
    """A probabilistic grammar with memory and a finite language.

    Args:
        rules: symbol -> `Options` or `Given`. A hidden symbol must be one that some `Given` looks at.
        start: the symbol that a text derives from.
    """

    def __init__(self, rules: Mapping[str, Options | Given], start: str = "story"):
        self.start: Parts = (Slot(start, False),)
        self.given = {symbol: rule.symbol for symbol, rule in rules.items() if isinstance(rule, Given)}
        self.conditions = set(self.given.values())
        self.choices: dict[tuple[str, Parts | None], _Choice] = {}
        for symbol, rule in rules.items():
            if isinstance(rule, Given):
                for values, options in rule.table.items():
                    choice = _Choice.of(options)
                    self.choices |= {(symbol, _parts(value)): choice for value in values.split()}
            else:
                self.choices[symbol, None] = _Choice.of(rule)

    def _choice(self, symbol: str, bound: Bound) -> _Choice:
        return self.choices[symbol, bound[self.given[symbol]] if symbol in self.given else None]

    def _become(self, slot: Slot, bound: Bound) -> Iterator[tuple[float, Parts, Bound]]:
        """What a slot may become: (probability, parts to write in its place, choices made by then)."""
        if slot.symbol in bound:
            yield 1.0, () if slot.hidden else bound[slot.symbol], bound
            return
        choice = self._choice(slot.symbol, bound)
        for option, probability in zip(choice.options, choice.probabilities, strict=True):
            yield probability, () if slot.hidden else option, bound | {slot.symbol: option}

    def sample(self, n: int, seed: int) -> list[str]:
        """`n` independent texts; the first ones are the same for every `n`."""
        uniform = random.Random(seed).random

        def write(parts: Parts, bound: Bound, pieces: list[str]) -> list[str]:
            for part in parts:
                if isinstance(part, str):
                    pieces.append(part)
                    continue
                if part.symbol not in bound:
                    options, _, cumulative = self._choice(part.symbol, bound)
                    # The cumulative sum may end a rounding error below 1: the last option takes the rest.
                    bound[part.symbol] = options[bisect(cumulative, uniform(), 0, len(options) - 1)]
                if not part.hidden:
                    write(bound[part.symbol], bound, pieces)
            return pieces

        return ["".join(write(self.start, {}, [])) for _ in range(n)]

    def derivations(self, text: str) -> list[float]:
        """Log-probabilities, in nats, of all the derivations of `text`."""
        found = []
        todo: list[tuple[Parts, Bound, int, float]] = [(self.start, {}, 0, 0.0)]
        while todo:
            parts, bound, position, log_p = todo.pop()
            if not parts:
                found += [log_p] if position == len(text) else []
                continue
            part, rest = parts[0], parts[1:]
            if isinstance(part, Slot):
                for p, option, then in self._become(part, bound):
                    todo.append((option + rest, then, position, log_p + math.log(p)))
            elif text.startswith(part, position):
                todo.append((rest, bound, position + len(part), log_p))
        return found

    def log_prob(self, text: str) -> float:
        """Exact log-probability of `text` in nats, summed over its derivations; -inf outside the language."""
        found = self.derivations(text)
        top = max(found, default=-math.inf)
        return top + math.log(sum(math.exp(log_p - top) for log_p in found)) if found else top

    def _forget(self, bound: Bound) -> Bound:
        """Keep the choices that others look at: the rest is written, and writing it again adds nothing."""
        return {symbol: option if symbol in self.conditions else () for symbol, option in bound.items()}

    @cached_property
    def _entropy(self) -> float:
        seen: dict = {}

        def entropy(parts: Parts, bound: Bound) -> float:
            if not parts:
                return 0.0
            if isinstance(parts[0], str):
                return entropy(parts[1:], bound)
            key = parts, tuple(bound.items())
            if key not in seen:
                seen[key] = sum(
                    p * (entropy(option + parts[1:], self._forget(then)) - math.log(p))
                    for p, option, then in self._become(parts[0], bound)
                )
            return seen[key]

        return entropy(self.start, {})

    def entropy(self) -> float:
        """Exact entropy of a text in nats, by the chain rule over the choices of an unambiguous grammar."""
        return self._entropy

    def probability(self, *words: str) -> float:
        """Exact probability that a text holds every one of `words` (whole words, in any case)."""
        seen: dict = {}

        def holds(parts: Parts, bound: Bound, missing: frozenset[str]) -> float:
            if not missing:
                return 1.0
            if not parts:
                return 0.0
            if isinstance(parts[0], str):
                return holds(parts[1:], bound, missing - set(re.findall(r"\w+", parts[0].lower())))
            key = parts, tuple(bound.items()), missing
            if key not in seen:
                seen[key] = sum(
                    p * holds(option + parts[1:], self._forget(then), missing)
                    for p, option, then in self._become(parts[0], bound)
                )
            return seen[key]

        return holds(self.start, {}, frozenset(word.lower() for word in words))


def _with_dragon(creatures: str, percent: float) -> dict[str, float]:
    """The creatures, equally likely, and a dragon `percent` of the time."""
    names = creatures.split()
    return dict.fromkeys(names, (100 - percent) / len(names)) | {"dragon": percent}


_HELPERS = "fox rabbit mouse owl robin crow frog snail"
_BEASTS = "giant troll wolf ghost bear snake"

# The dragon is the one met (`helper`) or the one feared (`beast`), and a little likelier where "she" is the
# protagonist. No word but "she" holds the letters s-h-e, so finding words by substring works as well; every
# plot writes a lower-case "he" or "she"; what follows "a" begins with a consonant; 20 to 40 words a story.
RULES: dict[str, Options | Given] = {
    "story": "{!he}{opening} {plot}",
    "he": {"he": 80, "she": 20},
    "He": Given("he", {"he": "He", "she": "She"}),
    "him": Given("he", {"he": "him", "she": "her"}),
    "his": Given("he", {"he": "his", "she": "her"}),
    "His": Given("he", {"he": "His", "she": "Her"}),
    "opening": {
        "Once upon a time there was a {trait} {job} named {name}.": 4,
        "Long ago a {trait} {job} called {name} lived {home}.": 3,
        "{name} was a {trait} {job}.": 2,
        "{name} the {job} lived {home}.": 2,
    },
    "trait": {"kind": 3, "brave": 3, "young": 2, "poor": 2, "clever": 1, "quiet": 1},
    "job": Given(
        "he",
        {
            "he": {"boy": 4, "farmer": 3, "king": 2, "baker": 2, "sailor": 2, "painter": 1},
            "she": {"girl": 4, "baker": 2, "queen": 2, "painter": 2, "farmer": 1, "sailor": 1},
        },
    ),
    "name": Given(
        "he",
        {
            "he": ["Tom", "Ben", "Max", "Sam", "Jack", "Leo", "Finn", "Hugo"],
            "she": ["Anna", "Lily", "Mia", "Rosa", "Nora"],
        },
    ),
    "home": {"by the sea": 3, "near the forest": 2, "on a hill": 1},
    "plot": {
        "{loss} {finding}": 15,
        "{loss} {finding} {reward}": 30,
        "{theft} So {he} {went} there and {trick}. {return}": 20,
        "{dare}": 5,
        "{dare} {peace}": 10,
        "{care}": 5,
        "{care} {thanks}": 15,
    },
    "day": {"day": 3, "morning": 1, "evening": 1, "night": 1},
    "colour": {"golden": 2, "silver": 1, "red": 2, "little": 1},
    "mood": {"friendly": 3, "gentle": 2, "shy": 1, "sleepy": 1, "funny": 1},
    "thing": Given(
        "job",
        {
            "boy girl": {"ball": 3, "kite": 3, "drum": 1},
            "king queen": {"crown": 3, "ring": 2},
            "farmer baker": {"hat": 3, "bucket": 2, "spoon": 1},
            "sailor painter": {"boat": 3, "lamp": 2, "book": 1},
        },
    ),
    # The lost thing, and the one met who finds it.
    "loss": {
        "One {day} {he} lost {his} {colour} {thing} {spot}.": 3,
        "One {day} the wind took {his} {thing}, and {he} cried.": 2,
        "{He} loved {his} {colour} {thing}, but {he} lost it.": 2,
    },
    "spot": {"at the market": 2, "on the road": 1, "in the snow": 1},
    "finding": {
        "A {helper} {came} and found the {thing} {hidden}.": 1,
        "{name} asked a {mood} {helper}, and it found the {thing}.": 1,
    },
    "helper": Given("he", {"he": _with_dragon(_HELPERS, 0.9), "she": _with_dragon(_HELPERS, 1.6)}),
    "came": Given(
        "helper",
        {
            "fox rabbit mouse": {"ran over": 2, "looked around": 1},
            "owl robin crow dragon": {"flew down": 2, "looked around": 1},
            "frog snail": "crept closer",
        },
    ),
    "hidden": {"under a leaf": 2, "behind the barn": 1, "in a tree": 1},
    "reward": {
        "{name} thanked the {helper} with {food}.": 3,
        "The {helper} and {name} became friends.": 2,
        "{name} never lost the {thing} again.": 1,
    },
    "food": Given(
        "helper",
        {
            "fox owl crow": ["meat", "milk"],
            "rabbit mouse robin frog snail": ["bread", "corn"],
            "dragon": ["meat", "cake"],
        },
    ),
    # The one feared, who is won over.
    "dare": "Everyone feared the {beast}, but {he} did not. One {day} {he} {went} to the {lair} and {trick}.",
    "beast": Given("he", {"he": _with_dragon(_BEASTS, 1.5), "she": _with_dragon(_BEASTS, 1.7)}),
    "lair": Given(
        "beast",
        {
            "giant": {"castle": 2, "mountain": 1},
            "troll": {"bridge": 2, "cave": 1},
            "wolf": {"valley": 2, "mountain": 1},
            "ghost": {"castle": 1, "tower": 2},
            "bear": {"cave": 1, "valley": 1},
            "snake": {"swamp": 2, "tower": 1},
            "dragon": {"cave": 2, "mountain": 1},
        },
    ),
    "theft": {
        "One {day} a {beast} from the {lair} stole {his} {thing}.": 2,
        "The {beast} of the {lair} stole {his} {colour} {thing} one {day}.": 1,
    },
    "went": {"went": 2, "rode": 1},
    "trick": {
        "sang until the {beast} slept": 2,
        "told the {beast} a story": 2,
        "danced for the {beast}": 1,
    },
    "return": {
        "The {beast} gave back the {thing}.": 2,
        "{name} came home with the {thing}.": 2,
        "The {beast} returned the {thing} and left.": 1,
    },
    "peace": {
        "From then on the {beast} was kind.": 2,
        "The {beast} laughed and gave {him} a {thing}.": 2,
        "Nobody feared the {beast} again.": 1,
    },
    # The friend in need.
    "care": "{His} best friend was a {mood} {friend}. One {day} the {friend} was {need}, so {he} {cure}.",
    "friend": ["pony", "goat", "dog", "cat", "duck", "mouse"],
    "need": {"hungry": 3, "cold": 2, "sick": 2, "lonely": 1},
    "cure": Given(
        "need",
        {
            "hungry": ["gave it bread", "baked a cake"],
            "cold": ["made a fire", "gave it a blanket"],
            "sick": ["brought it warm soup", "stayed all night"],
            "lonely": ["sang a song", "told it a story"],
        },
    ),
    "thanks": {
        "The {friend} thanked {name} with a dance.": 2,
        "Soon the {friend} was happy again.": 2,
        "{name} and the {friend} slept well.": 1,
    },
}

STORIES = Grammar(RULES)
sample = STORIES.sample
log_prob = STORIES.log_prob
entropy = STORIES.entropy
probability = STORIES.probability
