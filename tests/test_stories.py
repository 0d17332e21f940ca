"""The embedded corpus: exact probabilities against brute force and against samples."""

import math
import os
import re
import subprocess
import sys
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gdc import stories
from hf_gdc.stories import RULES, Given, Grammar

SAMPLES = stories.sample(2_000, seed=0)


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def weighted(options) -> dict[str, float]:
    weights = {options: 1} if isinstance(options, str) else options
    weights = weights if isinstance(weights, dict) else dict.fromkeys(weights, 1)
    return {option: weight / sum(weights.values()) for option, weight in weights.items()}


def enumerate_texts(rules, todo: str = "{story}", done: str = "", bound=None, p: float = 1.0):
    """Every derivation as (text, probability), by rewriting the first slot of a string."""
    bound = bound or {}
    slot = re.search(r"\{(!?)(\w+)\}", todo)
    if slot is None:
        yield done + todo, p
        return
    hidden, symbol = slot.groups()
    rule = rules[symbol]
    if isinstance(rule, Given):
        (rule,) = [options for keys, options in rule.table.items() if bound[rule.symbol] in keys.split()]
    choices = {bound[symbol]: 1.0} if symbol in bound else weighted(rule)
    for option, q in choices.items():
        rest = ("" if hidden else option) + todo[slot.end() :]
        yield from enumerate_texts(rules, rest, done + todo[: slot.start()], bound | {symbol: option}, p * q)


def restricted(plot: str, several: str) -> dict:
    """`RULES` with one plot, and with two options (first and last) for the symbols named in `several`."""

    def cut(symbol, options):
        kept = list(weighted(options))
        kept = {kept[0], kept[-1]} if symbol in several.split() else {kept[0]}
        return {option: p for option, p in weighted(options).items() if option in kept}

    rules = {}
    for symbol, rule in RULES.items():
        if isinstance(rule, Given):
            rules[symbol] = Given(rule.symbol, {key: cut(symbol, options) for key, options in rule.table.items()})
        else:
            rules[symbol] = cut(symbol, rule)
    return rules | {"plot": plot}


@pytest.mark.parametrize(
    "rules",
    [
        restricted("{loss} {finding} {reward}", "he name job thing helper came food loss finding"),
        restricted("{theft} So {he} {went} there and {trick}. {return}", "he opening beast lair job return theft"),
        restricted("{care} {thanks}", "he name friend mood need cure thanks"),
        {
            "story": "{a} {b}{!c}",
            "a": ["x", "x x"],
            "b": ["x", "x x"],
            "c": {"u": 1, "v": 3},
            "d": Given("c", {}),
        },
    ],
    ids=["lost", "theft", "friend", "ambiguous"],
)
def test_exact_against_enumeration(rules):
    grammar = Grammar(rules)
    language, derivations = defaultdict(float), list(enumerate_texts(rules))
    for text, p in derivations:
        language[text] += p
    assert math.fsum(math.exp(grammar.log_prob(text)) for text in language) == pytest.approx(1, abs=1e-12)
    for text, p in language.items():
        assert grammar.log_prob(text) == pytest.approx(math.log(p), abs=1e-12)
    # The entropy is that of the derivations, which is the texts' own where the grammar is unambiguous.
    assert grammar.entropy() == pytest.approx(-math.fsum(p * math.log(p) for _, p in derivations), rel=1e-12)
    for wanted in [("she",), ("dragon",), ("dragon", "she"), ("x",), ("Thanked", "ball")]:
        share = math.fsum(p for text, p in language.items() if {w.lower() for w in wanted} <= set(words(text)))
        assert grammar.probability(*wanted) == pytest.approx(share, abs=1e-12)


def test_samples_have_one_derivation_and_the_entropy_is_their_mean():
    found = [stories.STORIES.derivations(text) for text in SAMPLES]
    assert all(len(logs) == 1 for logs in found)
    surprisal = [-logs[0] for logs in found]
    mean = sum(surprisal) / len(surprisal)
    error = math.sqrt(sum((s - mean) ** 2 for s in surprisal)) / len(surprisal)
    assert abs(mean - stories.entropy()) < 4 * error  # four standard errors
    assert 12 < stories.entropy() < 20


def test_shares_of_dragons_and_of_she():
    dragon, she, both = (stories.probability(*w) for w in [("dragon",), ("she",), ("dragon", "she")])
    assert 0.009 < dragon < 0.011
    assert she == pytest.approx(0.2)
    assert 0.22 < both / dragon < 0.3  # mildly dependent: it would be 0.2
    texts = stories.sample(50_000, seed=1)
    sets = [set(words(text)) for text in texts]
    for wanted, p in [({"dragon"}, dragon), ({"she"}, she), ({"dragon", "she"}, both)]:
        share = sum(wanted <= have for have in sets) / len(sets)
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / len(sets))
    dragons = [text for text in texts if "dragon" in text]
    roles = [sum(re.search(role, text) is not None for text in dragons) for role in ("found", "stole", "feared")]
    assert all(count > 0.1 * len(dragons) for count in roles) and sum(roles) == len(dragons)


def test_she_is_said_of_female_protagonists_only():
    female = set(RULES["name"].table["she"])
    for text in stories.sample(20_000, seed=2):
        have = re.findall(r"\w+", text)
        is_female = bool(female & set(have))
        assert ("she" in have) == is_female == ("she" in text.lower())  # as a word, and as any substring
        assert bool({"he", "him", "his", "He", "His"} & set(have)) != is_female


def test_stories_are_short_and_plain():
    texts = stories.sample(20_000, seed=3)
    assert all(20 <= len(words(text)) <= 40 and 2 <= text.count(".") <= 4 and text.isascii() for text in texts)
    assert not any(re.search(r"\ba [aeiou]|  | \.|[{}]", text) for text in texts)
    assert 120 <= len({word for text in texts for word in words(text)}) <= 200


@settings(max_examples=200, deadline=None)
@given(text=st.sampled_from(SAMPLES), data=st.data())
def test_corrupted_texts_are_impossible(text, data):
    at = data.draw(st.integers(0, len(text) - 1))
    for corrupted in [
        text[:at] + text[at + 1 :],
        text[:at] + "#" + text[at:],
        text[:at].rstrip("."),
        text + " ",
        text + text,
    ]:
        assert stories.log_prob(corrupted) == -math.inf


def test_parts_of_a_story_agree():
    good = (
        "Lily was a kind girl. One day she lost her red ball in the snow. Lily asked a shy dragon, and it"
        " found the ball. The dragon and Lily became friends."
    )
    assert stories.log_prob(good) > -30
    for old, new in [
        ("found the ball", "found the kite"),
        ("The dragon", "The fox"),
        ("she", "he"),
        ("and Lily", "and Mia"),
    ]:
        assert old in good and stories.log_prob(good.replace(old, new)) == -math.inf
    assert stories.log_prob("") == stories.log_prob("A dragon.") == -math.inf


def test_samples_depend_on_the_seed_alone():
    program = "from hf_gdc.stories import sample; print(sample(300, 7))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert stories.sample(10, 7) == stories.sample(300, 7)[:10] != stories.sample(10, 8)


def test_a_slot_must_not_touch_a_letter():
    with pytest.raises(ValueError, match="touches a letter"):
        Grammar({"story": "{name}s", "name": "Tom"})
