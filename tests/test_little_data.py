"""The benchmark of too little data: its judge against distances that are known, its parts against what they say."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
from builders import small_gpt

from hf_gdc import stories
from hf_gdc.data import train_tokenizer
from hf_gdc.scoring import Scorer

FOLDER = Path(__file__).parents[1] / "recipes" / "benchmarks" / "little_data"
sys.path.insert(0, str(FOLDER))
import judge as judging  # noqa: E402

spec = importlib.util.spec_from_file_location("little_data", FOLDER / "run.py")  # there is more than one run.py
little_data = importlib.util.module_from_spec(spec)
spec.loader.exec_module(little_data)


@pytest.fixture(scope="module")
def judge():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging, "JUDGED", 1000)
        return judging.Judge(train_tokenizer(stories.sample(1000, 1)), known=stories.sample(3, 10**6))


def test_the_grammar_is_at_no_distance_from_itself(judge):
    found = judge.distances(judge.log_p, judge.stories, judge.log_p)
    assert found["kl"] == 0 and found["js"] == pytest.approx(0, abs=1e-12)
    assert found["grammatical"] == pytest.approx(1) and found["copied"] > 2.5 / 1000
    assert abs(found["entropy"] - stories.entropy()) < 4 * found["entropy_stderr"]


def test_half_of_the_probability_outside_of_the_grammar(judge):
    """pi = p/2 on stories and the rest elsewhere: KL = log 2, JS = (log 4/3 + (log 2/3)/2 + (log 2)/2) / 2."""
    samples = judge.stories.select(torch.arange(500))
    samples.texts = [text if n % 2 else text + "?" for n, text in enumerate(samples.texts)]
    log_pi = judge.log_p - math.log(2)
    found = judge.distances(log_pi, samples, log_pi[:500])
    assert found["kl"] == pytest.approx(math.log(2)) and found["grammatical"] == pytest.approx(0.5)
    assert found["js"] == pytest.approx((math.log(4 / 3) + math.log(2 / 3) / 2 + math.log(2) / 2) / 2)


def test_other_tokens_of_a_story_are_no_story(judge):
    samples = judge.stories.select(torch.arange(3))
    samples.completion_mask_BT = samples.completion_mask_BT.clone()
    samples.completion_mask_BT[1, -1] = samples.completion_mask_BT[1, int(samples.lengths_B[1]) - 1] = False  # no EOS
    assert torch.equal(judge.grammar(samples).isfinite(), torch.tensor([True, False, True]))


def test_weights_count_as_repeats(judge):
    samples, repeats = judge.stories.select(torch.arange(40)), torch.arange(40) % 3
    log_pi = 0.9 * judge.log_p
    weighted = judge.distances(log_pi, samples, log_pi[:40], repeats.double())
    many = samples.select(torch.arange(40).repeat_interleave(repeats))
    plain = judge.distances(log_pi, many, log_pi[:40].repeat_interleave(repeats))
    for name in ("kl", "js", "entropy", "grammatical", "copied"):
        assert weighted[name] == pytest.approx(plain[name]), name


def test_a_temperature_divides_the_logits(judge):
    plain, warm = (small_gpt(vocab_size=768).eval() for _ in range(2))
    few = judge.stories.select(torch.arange(4))
    before, after = (
        Scorer(model).token_logits(few)(slice(None)) for model in (plain, little_data.tempered(warm, 1.25))
    )
    torch.testing.assert_close(after, before / 1.25)


def test_a_bag_of_words_sees_which_tokens_there_are_and_nothing_else(judge):
    network, few = little_data.BagOfWords(768), judge.stories.select(torch.arange(6))
    before = network.whole_scores(few)
    turned = judge.stories.select(torch.arange(6))
    for row, length in enumerate(turned.lengths_B.tolist()):
        turned.completion_ids_BT[row, :length] = few.completion_ids_BT[row, :length].flip(0)
        turned.completion_ids_BT[row, length:] = 5  # padding
    torch.testing.assert_close(network.whole_scores(turned), before)
    turned.completion_ids_BT[0, 0] = 767
    network.forget()
    assert network.whole_scores(turned)[0] != before[0]


def test_differences_of_the_table_are_paired():
    """Seeds differ by far more than the rows: each row's difference is the same for every seed, so its error is 0."""
    names = ("kl", "js", "entropy", "grammatical", "copied")
    results = {
        (row, seed): dict.fromkeys(names, 10.0 * seed + number)
        for number, row in enumerate(little_data.ROWS)
        for seed in (1, 2, 4)
    }
    lines = little_data.table(results, [1, 2, 4])
    assert len(lines) == 2 + len(little_data.ROWS)
    for number, line in enumerate(lines[3:], 1):
        assert f"| {number:.3f} ± 0.000 |" in line, line
    assert f"| {70 / 3:.3f} ± {10 * math.sqrt(7 / 9):.3f} |  |" in lines[2]
