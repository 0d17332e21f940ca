"""Targets: their algebra, factors, fits, reports and files, on samples made by hand."""

import math
import sys
import warnings

import pytest
import torch
from builders import rollouts_by_hand, small_gpt

from hf_gdc.features import Feature
from hf_gdc.scoring import Scorer
from hf_gdc.targets import Context, Factor, Moment, Pointwise, Policy, Reference, Reward, Target

TEXTS = ["a", "b", "aa", "ab", "bb", "aab", "abb", "bbb"]
COUNTS = [8, 2, 4, 1, 3, 6, 5, 3]  # of 32 samples of the reference: their shares are exactly its probabilities


def has_a(completions, **_):
    return [float("a" in c) for c in completions]


def long(completions, **_):
    return [float(len(c) > 1) for c in completions]


def count_b(completions, **_):
    return [float(c.count("b")) for c in completions]


def has_bb(completions, **_):
    return [float("bb" in c) for c in completions]


def has_a_unless_told(prompts, completions, **_):
    return [float("a" in c and prompt != "never") for prompt, c in zip(prompts, completions, strict=True)]


def sometimes(completions, **_):
    return [1.0 if len(c) > 1 else None for c in completions]


def pool(counts=COUNTS, prompts=("",)):
    """Each text as often as its count says, for each prompt: means over the pool are exact expectations."""
    texts = [text for text, count in zip(TEXTS, counts, strict=True) for _ in range(count)]
    logp = [math.log(counts[TEXTS.index(text)] / sum(counts)) for text in texts]
    return rollouts_by_hand(
        texts * len(prompts), torch.tensor(logp * len(prompts)), [prompt for prompt in prompts for _ in texts]
    )


def log_a(rollouts):
    return torch.tensor([COUNTS[TEXTS.index(text)] / 32 for text in rollouts.texts], dtype=torch.float64).log()


def bound(target):
    target.bind(
        Context(reference_logp=log_a, sample_reference=lambda prompts: pool(prompts=list(dict.fromkeys(prompts))))
    )
    return target


def mean_under(target, feature):
    """E_p of a feature, by summing over the texts."""
    rollouts = rollouts_by_hand(TEXTS)
    return float(target.log_score(rollouts).softmax(0) @ feature(rollouts))


class Short(Factor):
    """A user's own hard factor, learned from the batches it sees."""

    hard, limit = True, 1

    def log_score(self, rollouts):
        return torch.where(rollouts.lengths_B <= self.limit, 0.0, -math.inf).double()

    def fit(self, rollouts, real=None):
        changed, self.limit = self.limit < 3, 3
        return changed

    def formula(self):
        return f"[at most {self.limit}]"


# ---- algebra ----


def test_products_and_powers():
    reference, constraint, reward = Reference(), Pointwise(has_a), Reward(count_b, beta=0.5)
    target = bound((reference * reward) ** 0.5 * constraint * Short())
    rollouts = rollouts_by_hand(TEXTS, torch.linspace(-3, -1, 8))
    wanted = [
        -math.inf if "a" not in text or len(text) > 1 else 0.5 * (math.log(count / 32) + 2 * text.count("b"))
        for text, count in zip(TEXTS, COUNTS, strict=True)
    ]
    assert target.log_score(rollouts).tolist() == pytest.approx(wanted)
    torch.testing.assert_close(target.log_weight(rollouts), target.log_score(rollouts) - rollouts.sampler_logp_B)
    assert target.hard and not (reference * reward).hard
    again = bound(Target([constraint, Short()]) * (reference**0.25 * reward**0.25) ** 2)
    assert again.log_score(rollouts).tolist() == pytest.approx(wanted)
    assert [factor for factor, _ in (reference * (constraint * reward)).terms] == [reference, constraint, reward]


def test_the_formula():
    target = (
        Reference() * Pointwise("contains:dragon") * Moment("contains:she", 0.5) * Reward([has_a, count_b], 0.1, [1, 2])
    )
    target = target * Policy() ** 0.5
    target.moments[0].lam = 1.23456
    assert str(target) == (
        "P(x) = a(x) * [contains:dragon] * exp(1.23 * contains:she) * exp((has_a + 2 count_b) / 0.1) * q(x)^0.5"
        "   with E[contains:she] = 0.5"
    )


def test_the_policys_own_factor_adds_nothing_to_the_weight():
    rollouts = rollouts_by_hand(TEXTS, torch.linspace(-300, -1, 8))
    assert Target([Policy()]).log_weight(rollouts).tolist() == [0.0] * 8
    target, reward = Policy() * Reward(count_b, 1.0), Feature(count_b)(rollouts)
    torch.testing.assert_close(target.log_weight(rollouts), reward, rtol=0, atol=1e-12)
    torch.testing.assert_close(target.log_score(rollouts), rollouts.sampler_logp_B + reward)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Target([Reference(), has_a]), "a target is a product of factors; <function has_a .* is not one"),
        (lambda: Moment(has_a, 0.5) ** 2, r"exp\(0 \* has_a\) can't be raised to the power 2"),
        (lambda: (Reference() * Moment(has_a, 0.5)) ** 0.5, "can't be raised to the power 0.5"),
        (lambda: Pointwise(has_a) ** -1, r"\[has_a\] can't be raised to the power -1"),
        (lambda: Moment(has_a, 0.5) * Moment(has_a, 0.6), "each moment needs a feature of its own.*has_a, has_a"),
        (lambda: Moment(has_a, float("nan")), "wanted mean of 'has_a' must be a number"),
        (
            lambda: Moment(has_a, 0.5) * Pointwise(has_a, "other"),
            r"\[other\] gives every sample has_a = 1, so E\[has_a\] = 0.5 contradicts it: drop one of the two",
        ),
        (lambda: Pointwise("contains:a") * Moment("contains:a", 1), "so .* = 1 says it again: drop one"),
        (lambda: Reward([has_a, long], 1.0, names=["a"]), "2 reward functions need as many names, not 1"),
        (lambda: Reward(has_a, beta=0), "beta must be positive, but is 0"),
        (lambda: Reward(has_a, beta=-1.0), "beta must be positive, but is -1.0"),
        (lambda: Reward([has_a, long], 1.0, [1.0]), "2 reward functions need as many reward_weights, not 1"),
        (
            lambda: Pointwise(lambda completions: [1]) * Reward(lambda completions: [2], 1.0),
            "two features are called '<lambda>': give them names",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_one_feature_may_serve_two_factors():
    target = bound(Pointwise("contains:a") * Reward("contains:a", 0.5))
    assert target.log_score(rollouts_by_hand(["a", "b"])).tolist() == [2.0, -math.inf]


# ---- factors ----


def test_pointwise_is_zero_or_one():
    rollouts = rollouts_by_hand(["a", "b", "ab"])
    assert Pointwise(has_a).log_score(rollouts).tolist() == [0.0, -math.inf, 0.0]
    with pytest.raises(ValueError, match="'half' must be 0 or 1 but gave 0.5. Threshold it"):
        Pointwise(lambda completions: [1.0, 0.5, 0.0], "half").log_score(rollouts)


def test_rewards_are_weighed_and_none_counts_nothing():
    rollouts = rollouts_by_hand(["a", "bb", "ab"])
    sometimes = Feature(lambda completions: [None, 10.0, -1.5], "sometimes")
    assert Reward([count_b, sometimes], 0.5, [2.0, 0.1]).log_score(rollouts).tolist() == pytest.approx([0, 10, 3.7])
    assert Reward(sometimes, 2.0).log_score(rollouts).tolist() == [0.0, 5.0, -0.75]


def test_a_reference_of_its_own():
    model, rollouts = small_gpt(vocab_size=120), rollouts_by_hand(["ab", "b"])
    with torch.no_grad():
        wanted = Scorer(model).rollouts(rollouts).logp_B.double()
    target = bound(Reference(model.train()) * Reward(count_b, 1.0))
    torch.testing.assert_close(target.log_score(rollouts), wanted + 1.0)
    assert (
        not torch.equal(wanted, log_a(rollouts_by_hand(["ab", "b"]))) and not target.log_score(rollouts).requires_grad
    )


def test_a_reference_of_its_own_scores_in_parts(tmp_path):
    model, texts = small_gpt(vocab_size=120), ["ab", "b", "abab", "aab", "a"]
    model.save_pretrained(tmp_path / "tiny")
    whole = Reference(model).log_score(rollouts_by_hand(texts))
    named = Reference(str(tmp_path / "tiny"), batch_size=2)
    torch.testing.assert_close(named.log_score(rollouts_by_hand(texts)), whole, rtol=1e-6, atol=0)  # float32
    assert len(named.log_score(rollouts_by_hand(texts).select(torch.tensor([], dtype=torch.int64)))) == 0
    assert str(Target([Reference(), named])) == "P(x) = a(x) * a_tiny(x)"
    assert Reference(model).formula() == "a_SmallGPTForCausalLM(x)"


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_target_that_cant_be_normalised(value):
    class Broken(Factor):
        def log_score(self, rollouts):
            return torch.tensor([-math.inf, 0.0, value], dtype=torch.float64)

        def formula(self):
            return "broken(x)"

    for target in (Target([Broken()]), bound(Reference() * Broken() ** 0.5)):
        with pytest.raises(ValueError, match=rf"the log of broken\(x\) is {value} for sample 2: 'ab'"):
            target.log_weight(rollouts_by_hand(["a", "b", "ab"]))
    with pytest.raises(ValueError, match="can't be normalised: .*is inf.* Bound the reward or raise its beta"):
        Target([Reward(has_a, beta=1e-320)]).log_score(rollouts_by_hand(["b", "a"]))


# ---- fits ----


def of_reference(accepted, refused):
    """As many samples of each, all of equal weight; half of the accepted ones are long."""
    texts = ["a", "aa"] * (accepted // 2) + ["b"] * refused
    return rollouts_by_hand(texts, torch.full((len(texts),), -1.0, dtype=torch.float64))


def even(rollouts):
    return torch.full((len(rollouts),), -1.0, dtype=torch.float64)


def rare():
    target = Reference() * Pointwise(has_a) * Moment(long, 0.6)
    target.bind(Context(reference_logp=even, sample_reference=lambda prompts: of_reference(24, 10_000)))
    return target


def test_degenerate_weights_warn_and_a_fit_on_next_to_nothing_is_refused():
    target = rare()
    with pytest.warns(UserWarning, match=r"\(ESS\) of 10024 drawn are behind these moments' lambda: long on 23\.1"):
        assert target.fit(of_reference(24, 10_000))  # a rare constraint can be fitted all the same
    assert target.moments[0].lam == pytest.approx(math.log(0.6 / 0.4)) and target.ess == pytest.approx(23.077, abs=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert target.fit(of_reference(200, 0))
    target = rare()
    with pytest.raises(ValueError, match=r"long on 1\.9\. A fit on fewer than 3 is noise\. Draw more samples"):
        target.fit(of_reference(2, 10_000))
    assert target.ess == 0 and target.moments[0].lam == 0
    with pytest.warns(UserWarning, match=r"of 12 drawn .* long on 1\.9"):  # a few strings, as if enumerated
        assert rare().fit(of_reference(2, 10))


def test_a_moment_against_another_constraint():
    """What only the samples show: all that satisfy the hard constraint are long."""
    target = bound(Reference() * Pointwise(has_bb) * Moment(long, 0.5))
    with pytest.raises(ValueError, match=r"\(1, 1\)\. every one of them has the value 1, so either another constraint"):
        target.fit(pool())


def test_moments_are_fitted_jointly_under_the_other_factors():
    target = bound(Reference() * Pointwise(has_a) * Moment(long, 0.7) * Moment(count_b, 0.9))
    assert target.fit(pool()) and target.version == 1 and target.ess > 0
    assert mean_under(target, Feature(long)) == pytest.approx(0.7, abs=1e-6)
    assert mean_under(target, Feature(count_b)) == pytest.approx(0.9, abs=1e-6)
    alone = bound(Reference() * Pointwise(has_a) * Moment(long, 0.7))
    alone.fit(pool())
    logit = math.log(0.7 / 0.3) - math.log(16 / 8)  # of 24 samples with an a, 16 are long
    assert alone.moments[0].lam == pytest.approx(logit)


def test_refits_wait_for_twice_the_sample_and_forget_the_first_pool():
    target = bound(Reference() * Pointwise(has_bb) * Moment(count_b, 2.2))
    # an unlucky draw from the reference: "bb" twice, "abb" once, "bbb" once among 32
    keep = [TEXTS.index(text) for text in ["a"] * 28 + ["bb", "bb", "abb", "bbb"]]
    few = rollouts_by_hand([TEXTS[n] for n in keep], log_a(rollouts_by_hand(TEXTS))[keep])
    assert target.fit(few) and target.version == 1
    off = target.moments[0].lam
    assert abs(mean_under(target, Feature(count_b)) - 2.2) > 0.01
    assert not target.fit(pool([0, 0, 0, 0, 1, 0, 1, 1])) and (target.version, target.moments[0].lam) == (1, off)
    state = target.state_dict()
    policy = pool([0, 0, 0, 0, 20, 0, 12, 12])  # a policy that has learned the constraint
    assert target.fit(policy) and target.version == 2
    # The window holds fit_window = 32 samples beside the newest batches: the first pool is gone, and what is left is exact.
    assert mean_under(target, Feature(count_b)) == pytest.approx(2.2, abs=1e-6)
    resumed = bound(Reference() * Pointwise(has_bb) * Moment(count_b, 2.2))
    resumed.load_state_dict(state)
    assert resumed.fit(policy) and (resumed.version, resumed.ess) == (target.version, target.ess)
    assert resumed.moments[0].lam == target.moments[0].lam != off


def test_a_learned_factor_raises_the_version():
    target = Target([Short()])
    assert target.fit(pool()) and target.version == 1 and float(target.log_score(rollouts_by_hand(["ab"]))) == 0
    assert not target.fit(pool()) and target.version == 1
    assert not bound(Reference() * Pointwise(has_a)).fit(pool())


# ---- reports ----


def test_the_report():
    target = bound(Reference() * Pointwise(has_a_unless_told) * Moment(count_b, 0.9) * Reward(sometimes, 0.5))
    report = target.report(prompts=["", "never"], num_samples=64)
    rollouts = rollouts_by_hand(TEXTS)
    a, log_p = log_a(rollouts).exp(), target.log_score(rollouts)
    p = log_p.softmax(0)
    assert mean_under(target, Feature(count_b)) == pytest.approx(0.9, abs=1e-6) and target.version == 1
    assert report["base/has_a_unless_told"] == pytest.approx(24 / 64)
    assert report["base/count_b"] == pytest.approx(float(a @ Feature(count_b)(rollouts)))
    assert report["base/sometimes"] == pytest.approx(1.0)  # where it applies
    assert report["lambda/count_b"] == target.moments[0].lam
    assert report["log_z"] == pytest.approx(float(log_p.logsumexp(0)))
    assert report["kl_target_reference"] == pytest.approx(float(torch.xlogy(p, p / a).sum()))
    assert report["in_support"] == pytest.approx(24 / 64) and report["prompts_without_support"] == 1
    w = p / a  # 32 samples of weight p/a: relative variance E_a[w^2] - 1
    assert report["log_z_stderr"] == pytest.approx(math.sqrt((float(a @ w**2) - 1) / 32))
    assert report["ess"] == pytest.approx(32 / float(a @ w**2))


# ---- files ----


def test_save_and_load(tmp_path):
    source = tmp_path / "source" / "my_features.py"
    source.parent.mkdir()
    source.write_text("def a(completions, **_):\n    return [float('a' in c) for c in completions]\n")
    model = small_gpt(vocab_size=120)
    model.save_pretrained(tmp_path / "model")
    target = bound(
        Reference(str(tmp_path / "model")) ** 0.5
        * Pointwise(f"{source}:a", name="has an a")
        * Moment("length:characters", 1.8)
        * Reward([f"{source}:a", count_b], beta=0.5, reward_weights=[1, 2])
    )
    target.fit(pool())
    rollouts = rollouts_by_hand(TEXTS)
    wanted, formula = target.log_score(rollouts), target.formula()
    saved = tmp_path / "saved"
    target.save_pretrained(saved)
    source.unlink()
    sys.modules.pop("my_features", None)
    for _ in range(2):
        loaded = Target.from_pretrained(saved)
        torch.testing.assert_close(loaded.log_score(rollouts_by_hand(TEXTS)), wanted, rtol=0, atol=1e-12)
        assert loaded.moments[0].lam == target.moments[0].lam != 0 and loaded.ess == target.ess
        assert loaded.formula() == formula  # names stay what they were, wherever the files are
        loaded.save_pretrained(saved)  # onto itself


def test_what_cant_be_saved_or_loaded(tmp_path):
    for factor in (Pointwise(lambda completions: [1]), Moment(lambda completions: [1], 0.5)):
        with pytest.raises(ValueError, match=r"'<lambda>' can't be saved: .* give it as 'my_features\.py:function'"):
            Target([factor]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"rewards <lambda> can't be saved: give them as 'my_rewards\.py:function'"):
        Target([Reward(lambda completions: [1], 1.0)]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="without a name can't be saved: give its Hub id or path"):
        Target([Reference(small_gpt())]).save_pretrained(tmp_path)
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "f.py").write_text(f"def {folder}(completions, **_):\n    return [1.0]\n")
    with pytest.raises(ValueError, match="would be saved under one name"):
        (Pointwise(f"{tmp_path}/one/f.py:one") * Pointwise(f"{tmp_path}/two/f.py:two")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="there is no target in .*: target.json is missing"):
        Target.from_pretrained(tmp_path / "one")
    Target([Policy()]).save_pretrained(tmp_path)
    file = tmp_path / "target.json"
    file.write_text(file.read_text().replace('"Policy"', '"Oracle"'))
    with pytest.raises(ValueError, match="has a factor 'Oracle'; this version knows .*Moment, .*Pointwise"):
        Target.from_pretrained(tmp_path)
