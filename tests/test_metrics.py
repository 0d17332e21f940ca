"""Metrics against NLTK, definitions and enumeration; and each through evaluate, offline."""

import math
import os
import random
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import letters, small_gpt
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

from hf_gdc import get_divergence, load_metric
from hf_gdc.evaluation import LOG_NAMES, Scored, divergence_metrics, pooled_metrics
from hf_gdc.intervals import normal_quantile, wilson_interval
from hf_gdc.metrics import (
    available_metrics,
    constraint_rates,
    distinct_n,
    estimate_divergences,
    ngram_entropy,
    self_bleu,
    self_bleu_scores,
)
from hf_gdc.metrics.embeddings import embedding_distance, text_encoder
from hf_gdc.partition import DivergenceEstimator

TEXTS = ["the cat sat on the mat", "the cat sat on a hat", "the the the the", "", "cat", "the cat sat on the mat"]
# Few words and short texts: many repeats, duplicates, empty and one-word texts.
token_sets = st.lists(st.lists(st.sampled_from("abc"), max_size=9), min_size=2, max_size=7)


# ---- self-BLEU ----


def nltk_scores(sentences, max_n, smoothing):
    function = SmoothingFunction().method1 if smoothing == "method1" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NLTK warns of zero counts
        return [
            sentence_bleu(sentences[:i] + sentences[i + 1 :], own, (1 / max_n,) * max_n, smoothing_function=function)
            for i, own in enumerate(sentences)
        ]


@settings(deadline=None, max_examples=100)
@given(sentences=token_sets, max_n=st.integers(1, 5), smoothing=st.sampled_from(["method1", "none"]))
def test_self_bleu_equals_nltk(sentences, max_n, smoothing):
    expected = nltk_scores(sentences, max_n, smoothing)
    assert self_bleu_scores(sentences, max_n, smoothing) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert self_bleu(sentences, max_n, smoothing) == pytest.approx(sum(expected) / len(sentences), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("smoothing", ["method1", "none"])
def test_self_bleu_equals_nltk_on_longer_texts(smoothing):
    words, rng = [f"w{i}" for i in range(30)], random.Random(0)
    sentences = [rng.choices(words, [1 / (i + 1) for i in range(30)], k=rng.randint(0, 30)) for _ in range(60)]
    expected = nltk_scores(sentences, 4, smoothing)
    assert self_bleu_scores(sentences, smoothing=smoothing) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(sentences=token_sets, data=st.data())
def test_order_does_not_matter(sentences, data):
    order = data.draw(st.permutations(range(len(sentences))))
    shuffled = [sentences[i] for i in order]
    assert self_bleu_scores(shuffled) == pytest.approx(self_bleu_scores(sentences)[list(order)], rel=1e-12)
    for metric in (distinct_n, ngram_entropy):
        assert metric(shuffled, 2) == pytest.approx(metric(sentences, 2), rel=1e-12)


def test_self_bleu_by_hand():
    assert self_bleu(["a b c d"] * 3) == 1 and self_bleu(["a b", "c d"]) == 0 and self_bleu(["", ""]) == 0
    assert self_bleu(["a b"] * 2, smoothing="none") == 0  # no 3-grams
    # "the the": of two 1-grams one is found; "the": its own length is not that of any other, so exp(1 - 2/1).
    assert self_bleu_scores(["the the", "the"], max_n=1) == pytest.approx([1 / 2, math.exp(-1)])
    assert self_bleu(["ab", "ac"], 1, tokenizer=list) == self_bleu([["a", "b"], ["a", "c"]], 1) == 0.5
    assert self_bleu([[1, 2, 3, 4], (1, 2, 3, 4)]) == 1  # token ids


def test_self_bleu_is_fast():
    """10,000 texts of 25 words: below a second of CPU; all pairs would take hours."""
    rng, words = random.Random(0), [f"w{i}" for i in range(3000)]
    texts = [rng.choices(words, k=25) for _ in range(10_000)]
    start = time.process_time()
    assert 0 < self_bleu(texts) < 1
    seconds = time.process_time() - start
    print(f"self-BLEU of 10,000 texts: {seconds:.2f} s of CPU")
    assert seconds < 10


# ---- n-grams ----


@given(sentences=token_sets, n=st.integers(1, 4))
def test_distinct_n_and_entropy_by_definition(sentences, n):
    grams = [tuple(tokens[i : i + n]) for tokens in sentences for i in range(len(tokens) - n + 1)]
    assert distinct_n(sentences, n) == (len(set(grams)) / len(grams) if grams else 0)
    shares = [grams.count(gram) / len(grams) for gram in set(grams)]
    entropy = ngram_entropy(sentences, n)
    assert entropy == pytest.approx(-sum(share * math.log(share) for share in shares), abs=1e-12)
    assert 0 <= entropy <= math.log(max(len(shares), 1)) + 1e-12


def test_tokenizers():
    assert distinct_n(["a b a b"], 2) == distinct_n([["a", "b", "a", "b"]], 2) == 2 / 3
    assert distinct_n(["abab"], 2, tokenizer=list) == 2 / 3
    assert ngram_entropy(["a b", "c\nd"]) == pytest.approx(math.log(4)) and ngram_entropy([]) == 0


# ---- constraints ----


@given(yes=st.integers(0, 40), no=st.integers(0, 40), confidence=st.floats(0.5, 0.999))
def test_wilson_interval_by_definition(yes, no, confidence):
    """Its ends are the shares from which the observed one is z standard errors away."""
    samples = max(yes + no, 1)
    share = min(yes, samples) / samples
    low, high = wilson_interval(share, samples, confidence)
    assert 0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1
    for end in (low, high):
        reach = normal_quantile(confidence) ** 2 * end * (1 - end) / samples
        assert (share - end) ** 2 == pytest.approx(reach, abs=1e-9)


def test_constraint_rates():
    texts = ["A dragon flew.", "No one.", "The dragon.", "She ate a pie now"]
    rates = constraint_rates(texts, ["contains:dragon", "length:words"])
    assert [rates["contains:dragon"], rates["contains:dragon_stderr"]] == [0.5, 0.25]
    assert (rates["contains:dragon_low"], rates["contains:dragon_high"]) == wilson_interval(0.5, 4)
    words = np.array([3, 2, 2, 5])
    assert rates["length:words"] == 3
    assert rates["length:words_stderr"] == pytest.approx(words.std(ddof=1) / 2)
    assert rates["length:words_high"] == pytest.approx(3 + 1.959964 * rates["length:words_stderr"], rel=1e-6)
    normal = constraint_rates(texts, "contains:dragon", interval="normal", confidence=0.9)
    assert normal["contains:dragon_low"] == pytest.approx(0.5 - 1.644854 * 0.25, rel=1e-5)
    assert constraint_rates(texts, "contains:cow", interval="normal")["contains:cow_high"] == 0
    assert constraint_rates(["one two"], "length:words")["length:words_stderr"] == math.inf


def test_features_see_prompts_ids_and_columns():
    def same(prompts, completions, colour, **_):
        return [float(p == c == colour_) for p, c, colour_ in zip(prompts, completions, colour, strict=True)]

    columns = {"colour": ["red", "red"]}
    assert constraint_rates(["red", "blue"], same, prompts=["red", "blue"], columns=columns)["same"] == 0.5
    assert constraint_rates(["a", "b"], "length:tokens", completion_ids=[[1], [1, 2, 3]])["length:tokens"] == 2


# ---- divergences ----


def normalised(seed, size=12):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).double().log_softmax(-1)


def test_divergences_are_exact_on_an_enumerated_space():
    """Two prompts, 12 points each under the uniform mixture: a mean over samples is then an exact expectation."""
    policy, target = torch.cat([normalised(0), normalised(1)]), torch.cat([normalised(2), normalised(3)])
    log_z = torch.tensor([0.7, -1.1], dtype=torch.float64).repeat_interleave(12)
    mixture = torch.full((24,), -math.log(12), dtype=torch.float64)
    found = estimate_divergences(target + log_z, policy, mixture, prompts=["a"] * 12 + ["b"] * 12)
    for name in ("kl", "reverse_kl", "js", "tv", "chi2", "reverse_chi2", "hellinger", "jeffreys"):
        expected = float((target.exp() * get_divergence(name).f(policy - target)).sum()) / 2
        key = LOG_NAMES.get(name, name)
        assert found[key] == pytest.approx(expected, rel=1e-10)
        assert found[f"{key}_high"] == pytest.approx(expected + 1.959964 * found[f"{key}_stderr"], rel=1e-6)
        assert found[f"{key}_low"] == pytest.approx(max(expected - 1.959964 * found[f"{key}_stderr"], 0), rel=1e-6)
    assert found["log_z"] == pytest.approx(-0.2) and found["log_z_low"] < -0.2
    assert found["in_support"] == pytest.approx(1) and found["prompts_without_support"] == 0


def test_divergences_equal_the_trainers():
    """The same numbers as `pooled_metrics` on a policy's and a reference's samples, a third of the space forbidden."""
    logp, log_a, log_p = normalised(4), normalised(5), normalised(6) + 0.3
    log_p[:4] = -math.inf
    own_points, points = torch.randint(12, (2, 300), generator=torch.Generator().manual_seed(7)).unbind()
    no_key = torch.zeros(300, dtype=torch.long)
    pools = [Scored(log_p[at], log_a[at], logp[at], logp[at], no_key) for at in (own_points, points)]
    at, own = torch.cat([own_points, points]), torch.arange(600) < 300
    mixture = torch.logaddexp(logp, log_a)[at] - math.log(2)
    found = estimate_divergences(log_p[at].tolist(), logp[at].numpy(), mixture, own=own)
    expected = pooled_metrics(*pools)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-9)


def test_divergences_of_the_policys_own_samples():
    logp, log_p = normalised(8), normalised(9)
    zeros = torch.zeros(12, dtype=torch.long)
    expected = divergence_metrics(DivergenceEstimator(log_p, logp, logp, zeros, 1, torch.ones(12)), stderr=True)
    found = estimate_divergences(log_p, logp, logp)
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    nothing = estimate_divergences([-math.inf] * 2, [-1.0] * 2, [-1.0] * 2)
    assert math.isnan(nothing["js"]) and nothing["in_support"] == 0 and nothing["prompts_without_support"] == 1


# ---- through evaluate ----

LOGS = {"log_p": [0.1, -2.0, -math.inf, 0.0], "policy_logp": [-1.0, -2.0, -3.0, -0.5], "mixture_logp": [-1.0] * 4}
CALLS = {
    "self_bleu": (lambda **o: {"self_bleu": self_bleu(TEXTS, **o)}, {"predictions": TEXTS}, {"max_n": 2}),
    "distinct_n": (lambda **o: {"distinct_n": distinct_n(TEXTS, **o)}, {"predictions": TEXTS}, {"n": 3}),
    "ngram_entropy": (lambda **o: {"ngram_entropy": ngram_entropy(TEXTS, **o)}, {"predictions": TEXTS}, {"n": 2}),
    "constraint_rates": (
        lambda **o: constraint_rates(TEXTS, **o),
        {"predictions": TEXTS},
        {"features": ["contains:cat", "length:words"], "confidence": 0.9},
    ),
    "divergences": (lambda **o: estimate_divergences(**LOGS, **o), LOGS, {"prompts": ["a", "b", "b", "a"]}),
    "embedding_distance": (
        lambda **o: {"embedding_distance": embedding_distance(TEXTS, TEXTS[::-1], **o)},
        {"predictions": TEXTS, "references": TEXTS[::-1]},
        {"model": text_encoder(small_gpt(pad_token_id=0).model, letters())},
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_load_metric_gives_the_pure_function(name, tmp_path):
    pure, inputs, options = CALLS[name]
    metric = load_metric(name, cache_dir=str(tmp_path))
    assert metric.name == name and metric.compute(**inputs, **options) == pure(**options)
    half = [{key: values[part] for key, values in inputs.items()} for part in (slice(2), slice(2, None))]
    for batch in half:
        metric.add_batch(**batch)
    assert metric.compute(**options) == pure(**options)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]  # all in memory


def test_load_metric_takes_lists_of_tokens(tmp_path):
    tokens = [text.split() for text in TEXTS]
    for name, metric in (("self_bleu", self_bleu), ("distinct_n", distinct_n), ("ngram_entropy", ngram_entropy)):
        assert load_metric(name, cache_dir=str(tmp_path)).compute(predictions=tokens) == {name: metric(TEXTS)}


def test_offline_and_nothing_in_the_home(tmp_path):
    """In a process without a network: load_metric, and evaluate.load on the folders, write below HF_HOME alone."""
    images = {"fid_lenet", "kid_lenet", "inception_score", "precision_recall"}  # tests/test_image_metrics.py
    assert available_metrics() == sorted({*CALLS, *images})
    code = """
import socket
def refuse(*_): raise AssertionError("the network was used")
socket.getaddrinfo = socket.create_connection = refuse
import evaluate, torch
from hf_gdc import load_metric
from hf_gdc.images.classifier import LeNet
from hf_gdc.metrics import MODULES, available_metrics
classifier, some, others = LeNet(8), *torch.rand(2, 5, 1, 8, 8)
for name in available_metrics():
    inputs = {"predictions": ["the cat sat on the mat", "the cat sat on a hat", ""]}
    if name == "divergences":
        inputs = dict.fromkeys(["log_p", "policy_logp", "mixture_logp"], [-1.0])
    if name == "constraint_rates":
        inputs["features"] = "contains:cat"
    if name == "embedding_distance":
        from builders import letters, small_gpt
        from hf_gdc.metrics.embeddings import text_encoder
        inputs["references"] = inputs["predictions"][::-1]
        inputs["model"] = text_encoder(small_gpt(pad_token_id=0).model, letters())
    if name in IMAGES:
        inputs = {"predictions": some, "references": others, "classifier": classifier}
        if name == "inception_score":
            inputs.pop("references")
    assert load_metric(name).compute(**inputs) == evaluate.load(str(MODULES / name)).compute(**inputs)
print("done")
""".replace("IMAGES", repr(images))
    home, cache = tmp_path / "home", tmp_path / "cache"
    home.mkdir()
    environment = {"HOME": str(home), "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
    environment["MPLCONFIGDIR"] = str(cache)  # torchmetrics imports matplotlib, which has a folder of its own
    cut = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_"))}
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})" + code
    done = subprocess.run([sys.executable, "-c", code], env=cut | environment, capture_output=True, text=True)
    assert done.stdout.strip() == "done", done.stderr
    assert not list(home.iterdir())


# ---- mistakes ----


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load_metric("self_blue"), "Did you mean 'self_bleu'"),
        (lambda: load_metric("zzz"), "Known ones: constraint_rates, distinct_n"),
        (lambda: self_bleu(["alone"]), "at least 2 texts, not 1"),
        (lambda: self_bleu("one string"), "list of texts"),
        (lambda: self_bleu(TEXTS, max_n=0), "max_n is 0"),
        (lambda: self_bleu(TEXTS, smoothing="method9"), "say one of 'method1', 'none'"),
        (lambda: distinct_n(TEXTS, 0), "n is 0"),
        (lambda: constraint_rates([], "contains:a"), "at least one text"),
        (lambda: constraint_rates("a text", "contains:a"), "at least one text"),
        (lambda: constraint_rates(["a"], "containz:a"), "contain"),
        (lambda: constraint_rates(["a"], "length:tokens"), "pass completion_ids"),
        (lambda: constraint_rates(["a"], "contains:a", interval="exact"), "'wilson', 'normal'"),
        (lambda: constraint_rates(["a"], "contains:a", prompts=["x", "y"]), "prompts has 2 rows for 1"),
        (lambda: constraint_rates(["a"], "contains:a", confidence=95), "between 0 and 1"),
        (lambda: estimate_divergences([], [], []), "one number per sample"),
        (lambda: estimate_divergences([0.0], [0.0, 0.0], [0.0]), "one number per sample"),
        (lambda: estimate_divergences([0.0, math.nan], [0.0] * 2, [0.0] * 2), r"log_p\[1\] is nan"),
        (lambda: estimate_divergences([0.0], [0.0], [-math.inf]), r"mixture_logp\[0\] is -inf"),
        (lambda: estimate_divergences([0.0], [0.0], [0.0], prompts=["a", "b"]), "one number per sample"),
    ],
)
def test_messages(call, message):
    with pytest.raises(ValueError, match=message):
        call()
