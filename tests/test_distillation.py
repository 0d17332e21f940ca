"""Teachers and the dense estimator: exact gradients by enumeration, in both forms, and training that reaches the teacher."""

import itertools
import math

import pytest
import tiny
import torch
from builders import gemma2, gpt2, letters, rollouts_by_hand, small_gpt
from datasets import Dataset
from test_exactness import DIVERGENCES, NAMES

from hf_gdc import (
    DistillationConfig,
    DistillationTrainer,
    Pointwise,
    Reference,
    Reward,
    Target,
    Teacher,
    get_divergence,
)
from hf_gdc.dense import mean_of_others, token_divergence
from hf_gdc.scoring import Scorer

EVERY = pytest.mark.parametrize("options", DIVERGENCES, ids=NAMES)


def teacher():
    return Teacher(tiny.model(5, scale=2.0), tiny.tokenizer())


def distiller(output_dir, lm=None, prompts=None, target=None, **options):
    defaults = {"max_completion_length": tiny.LENGTH, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    defaults |= {"max_steps": 1, "save_strategy": "no", "logging_steps": 1000}
    return DistillationTrainer(
        tiny.model(1, scale=2.0) if lm is None else lm,
        teacher() if target is None else target,
        args=DistillationConfig(output_dir=str(output_dir), **defaults | options),
        train_dataset=None if prompts is None else Dataset.from_dict({"prompt": prompts}),
        processing_class=tiny.tokenizer(),
    )


def strings_with_q(trainer, prompts, sampler):
    """All strings after each prompt, with each token's log q, as if every one were the only sample of its prompt."""
    rollouts = tiny.enumerated(trainer, prompts, sampler)
    with torch.no_grad():
        rollouts.sampler_logps_BT = Scorer(sampler).rollouts(rollouts).logps_BT
    rollouts.prompt_key_B = torch.arange(len(rollouts))
    return rollouts


def next_token_logp(lm, prompt_ids: list[int]) -> dict[tuple, torch.Tensor]:
    """log-probs of the next token after every prefix of a completion that has not ended, from plain forward passes."""
    prefixes = [body for n in range(tiny.LENGTH) for body in itertools.product([1, 2], repeat=n)]
    return {
        prefix: lm(input_ids=torch.tensor([[*prompt_ids, *prefix]])).logits[0, -1].log_softmax(-1)
        for prefix in prefixes
    }


def exact_objective(trainer, prompts, prefix_term: bool) -> torch.Tensor:
    """J = sum over prefixes of pi(prefix) D_f(pi_t || p_t), by definition, summed over the vocabulary."""
    total = 0.0
    for prompt in prompts:
        ids, mask, _ = trainer.actors.sampler.encode([prompt])
        own = next_token_logp(trainer.model, ids[0][mask[0]].tolist())
        with torch.no_grad():
            theirs = next_token_logp(trainer.teacher.model, ids[0][mask[0]].tolist())
        for prefix, logp in own.items():
            reach = sum((own[prefix[:n]][prefix[n]] for n in range(len(prefix))), start=torch.zeros(()).double())
            reach = reach if prefix_term else reach.detach()
            total = total + reach.exp() * tiny.exact_divergence(trainer.divergence, logp, theirs[prefix])
    return total / len(prompts)


@pytest.mark.parametrize("prompts", [("",), ("a", "b b a")], ids=["unconditional", "two prompts"])
@pytest.mark.parametrize("off_policy", [False, True], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("prefix_term", [False, True], ids=["stop-gradient", "prefix term"])
@EVERY
def test_the_dense_gradient_is_exact(options, prefix_term, off_policy, prompts, tmp_path):
    trainer = distiller(tmp_path, prefix_term=prefix_term, **options)
    rollouts = strings_with_q(trainer, prompts, tiny.model(2, scale=1.5) if off_policy else trainer.model)
    loss_B, _ = trainer.sample_losses(trainer.model, rollouts)
    weight_B = rollouts.sampler_logp_B.exp() / len(prompts)
    wanted = exact_objective(trainer, prompts, prefix_term)
    assert (weight_B * loss_B).sum().item() == pytest.approx(wanted.item(), rel=1e-10)  # also its value
    estimated = tiny.gradient((weight_B * loss_B).sum(), trainer.model)
    analytic = tiny.gradient(wanted, trainer.model)
    assert analytic.norm() > 1e-3
    assert (estimated - analytic).norm() / analytic.norm() < 1e-8


def test_with_the_prefix_term_reverse_kl_is_that_of_whole_sequences(tmp_path):
    """And without it, or for another f, it is not: the two differ by more than a tenth."""
    gradients = {}
    for name, prefix_term in itertools.product(("reverse_kl", "js"), (True, False)):
        trainer = distiller(tmp_path, divergence=name, prefix_term=prefix_term)
        rollouts = strings_with_q(trainer, ("",), trainer.model)
        loss_B, _ = trainer.sample_losses(trainer.model, rollouts)
        dense = tiny.gradient((rollouts.sampler_logp_B.exp() * loss_B).sum(), trainer.model)
        logp = trainer.actors.scorer.rollouts(rollouts).logp_B
        whole = tiny.exact_divergence(trainer.divergence, logp, trainer.target.log_score(rollouts))
        sequence = tiny.gradient(whole, trainer.model)
        gradients[name, prefix_term] = float((dense - sequence).norm() / sequence.norm())
    assert gradients.pop(("reverse_kl", True)) < 1e-8
    assert min(gradients.values()) > 0.1


@pytest.mark.parametrize("off_policy", [False, True], ids=["on-policy", "off-policy"])
def test_the_baseline_of_the_prefix_term_is_unbiased(off_policy, tmp_path):
    """The mean gradient over all ordered pairs of independent samples is exact."""
    trainer = distiller(tmp_path, prefix_term=True, divergence="js")
    every = strings_with_q(trainer, ("",), tiny.model(2, scale=1.5) if off_policy else trainer.model)
    pairs = torch.tensor(list(itertools.product(range(15), repeat=2)))
    rollouts = every.select(pairs.flatten())
    rollouts.prompt_key_B = torch.arange(len(pairs)).repeat_interleave(2)
    weight_B = every.sampler_logp_B[pairs].sum(1).exp().repeat_interleave(2) / 2
    loss_B, _ = trainer.sample_losses(trainer.model, rollouts)
    estimated = tiny.gradient((weight_B * loss_B).sum(), trainer.model)
    analytic = tiny.gradient(exact_objective(trainer, ("",), True), trainer.model)
    assert (estimated - analytic).norm() / analytic.norm() < 1e-8
    rollouts.prompt_key_B = torch.arange(len(rollouts))
    alone_B, _ = trainer.sample_losses(trainer.model, rollouts)
    without = tiny.gradient((weight_B * alone_B)[:30].sum(), trainer.model)  # the baseline is really there
    rollouts.prompt_key_B = torch.arange(len(pairs)).repeat_interleave(2)
    with_B, _ = trainer.sample_losses(trainer.model, rollouts)
    assert (tiny.gradient((weight_B * with_B)[:30].sum(), trainer.model) - without).norm() > 1e-4


def test_the_mean_of_the_others():
    x = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 7.0], [9.0, 9.0]])
    wanted = [[4.0, 6.5], [3.0, 4.5], [2.0, 4.0], [0.0, 0.0]]
    assert mean_of_others(x, torch.tensor([0, 0, 0, 1])).tolist() == wanted


@EVERY
def test_top_k_is_the_divergence_to_the_truncated_teacher(options):
    divergence = get_divergence(options["divergence"], **options.get("divergence_kwargs", {}))
    torch.manual_seed(0)
    logits = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    log_p = torch.randn(4, 9, dtype=torch.float64).log_softmax(-1)
    logp = logits.log_softmax(-1)
    top = log_p.topk(3).indices
    cut = torch.full_like(log_p, -torch.inf).scatter(-1, top, log_p.gather(-1, top).log_softmax(-1))
    value = token_divergence(logp, log_p, divergence, top_k=3)
    if not divergence.admits_hard_constraints:
        assert bool((value == torch.inf).all())
        return
    wanted = torch.stack([tiny.exact_divergence(divergence, *pair) for pair in zip(logp, cut, strict=True)])
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(value, token_divergence(logp, cut, divergence))  # p = 0 written out
    gradients = [torch.autograd.grad(v.sum(), logits, retain_graph=True)[0] for v in (value, wanted)]
    torch.testing.assert_close(*gradients)
    whole = token_divergence(logp, log_p, divergence, top_k=9)
    assert torch.equal(whole, token_divergence(logp, log_p, divergence))


@EVERY
def test_far_from_the_teacher_the_divergence_stays_a_number(options):
    """Where pi and p differ by e^90 at single tokens, in float32: no inf * 0. (Powers of that exceed float32 itself.)"""
    divergence = get_divergence(options["divergence"], **options.get("divergence_kwargs", {}))
    powers = "chi2" in options["divergence"] or options.get("divergence_kwargs", {}).get("alpha", 0) > 1
    far = -35.0 if powers else -90.0
    logits = torch.tensor([[0.0, far, far], [0.0, 0.0, far]], requires_grad=True)
    log_p = torch.tensor([[far, 0.0, far], [far, 0.0, 0.0]]).log_softmax(-1)
    value = token_divergence(logits.log_softmax(-1), log_p, divergence)
    gradient = torch.autograd.grad(value.sum(), logits)[0]
    assert bool(torch.isfinite(value).all()) and value.min().item() > 0.1 and bool(torch.isfinite(gradient).all())
    if options["divergence"] in ("js", "tv", "hellinger", "reverse_kl", "kl"):
        assert gradient.abs().max().item() < 100


@pytest.mark.parametrize("least", [-800.0, -1e4, float(torch.finfo(torch.float32).min), -float("inf")])
@pytest.mark.parametrize("name", ["js", "kl", "tv", "hellinger"])
def test_a_token_that_the_teacher_rules_out(name, least):
    """Less than the smallest number is as good as 0: value and gradient are those at p = 0."""
    logits = torch.tensor([[0.0, 0.0, 1.0]], requires_grad=True)
    results = []
    for lowest in (least, -float("inf")):
        log_p = torch.tensor([[math.log(0.3), math.log(0.7), lowest]])
        value = token_divergence(logits.log_softmax(-1), log_p, get_divergence(name))
        results.append((value.item(), torch.autograd.grad(value.sum(), logits)[0]))
    assert math.isfinite(results[0][0]) and bool(results[0][1].isfinite().all())
    assert results[0][0] == pytest.approx(results[1][0]) and torch.allclose(results[0][1], results[1][1])


def test_an_infinite_divergence_is_refused():
    log_p = torch.tensor([[math.log(0.3), math.log(0.7), -float("inf")]])
    with pytest.raises(ValueError, match="reverse_kl is infinite: .* of token 2 is 0"):
        token_divergence(torch.zeros(1, 3, requires_grad=True).log_softmax(-1), log_p, get_divergence("reverse_kl"))


@pytest.mark.parametrize("make", [small_gpt, gpt2, gemma2])
def test_chunks_of_tokens_leave_no_trace(make):
    """Value and gradient of a divergence over the vocabulary, 2 tokens at a time and all at once."""
    lm, other = make(seed=1), make(seed=2)
    texts = ["\x01\x02\x03", "\x04", "\x05\x06\x01\x02\x03"]
    rollouts, results = rollouts_by_hand(texts), []
    for elements in (2**24, 2 * 23):
        scorer, theirs = Scorer(lm, chunk_elements=elements), Scorer(other).token_logits(rollouts)

        def divergence_of(logp_NV, part, theirs=theirs):
            return token_divergence(logp_NV, theirs(part).log_softmax(-1), get_divergence("js"))

        out = scorer.rollouts(rollouts, entropy=True, extra=divergence_of)
        results.append((out.logps_BT, out.entropy_BT, out.extra_BT, tiny.gradient(out.extra_BT.sum(), lm)))
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(whole, chunked, rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # against plain forward passes
        for row, text in enumerate(texts):
            ids = torch.tensor([[0, *text.encode()]])
            logp, log_p = (m(input_ids=ids).logits[0, :-1].log_softmax(-1) for m in (lm, other))
            wanted = tiny.exact_divergence(get_divergence("js"), logp.double().flatten(), log_p.double().flatten())
            assert float(results[0][2][row].sum()) == pytest.approx(float(wanted), rel=1e-4)


# ---- the trainer ----


@pytest.mark.parametrize(("name", "prefix_term"), [("kl", False), ("reverse_kl", True), ("js", True)])
def test_training_reaches_the_teacher(name, prefix_term, tmp_path):
    lm = tiny.model(3, scale=0.2, dtype=torch.float32)
    options = {"divergence": name, "prefix_term": prefix_term, "max_steps": 100, "per_device_train_batch_size": 64}
    options |= {"learning_rate": 1e-2, "lr_scheduler_type": "linear", "num_generations": 32}
    trainer = distiller(tmp_path, lm, ["a", "b b"], **options, eval_samples=4096, per_device_eval_batch_size=4096)
    every = tiny.enumerated(trainer, ("a", "b b"))
    log_p = trainer.target.log_score(every)

    def kl():
        return float((log_p.exp() * (log_p - trainer.actors.policy_logp(every))).sum()) / 2

    start, before = kl(), trainer.evaluate()
    assert before["eval_kl_target_policy"] == pytest.approx(start, abs=4 * before["eval_kl_target_policy_stderr"])
    trainer.train()
    assert start > 0.2 and kl() < 2e-3
    assert trainer.evaluate()["eval_kl_policy_target"] < 0.01


def test_resumed_off_policy_steps_go_on_exactly(tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "num_iterations": 2, "save_only_model": False}
    options |= {"per_device_train_batch_size": 8, "learning_rate": 1e-2, "prefix_term": True, "divergence": "js"}
    whole = distiller(tmp_path, tiny.model(3, dtype=torch.float32), **options)
    whole.train()
    again = distiller(tmp_path, tiny.model(3, dtype=torch.float32), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for first, second in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(first, second)


def test_what_the_dense_estimator_refuses(tmp_path):
    for target in (teacher() * Reward(tiny.count_a, 1.0), Reference(), teacher() ** 0.5):
        with pytest.raises(ValueError, match="a Teacher alone has, but the target is .*take GDCTrainer"):
            distiller(tmp_path, target=target)
    with pytest.raises(ValueError, match="reverse_kl is infinite where the truncated teacher .* use kl, js"):
        distiller(tmp_path, teacher_top_k=2)
    with pytest.raises(ValueError, match="set replay_samples=0"):
        distiller(tmp_path, replay_samples=4, fit_samples=64)
    with pytest.raises(ValueError, match="teacher_top_k can't be negative, but is -1"):
        distiller(tmp_path, teacher_top_k=-1)
    wide = tiny.model(5)
    wide.resize_token_embeddings(8)
    with pytest.raises(
        ValueError, match=r"3 tokens and the teacher to 8: call resize_token_embeddings\(3\) on the larger"
    ):
        distiller(tmp_path, target=Teacher(wide))


# ---- the factor ----


def test_a_teacher_alone_is_the_target_and_its_z_is_one(tmp_path):
    """Also the partition says so, whatever the samples."""
    trainer = tiny.trainer(Target([teacher()]), tmp_path, tiny.model(0, scale=2.0), divergence="js", fit_samples=0)
    rollouts = tiny.enumerated(trainer, ("a", "b b a"))
    log_p = trainer.target.log_score(rollouts)
    torch.testing.assert_close(log_p, tiny.log_probs(trainer, trainer.target.terms[0][0].model, rollouts))
    torch.testing.assert_close(log_p.view(2, 15).logsumexp(1), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
    some = rollouts.select(torch.tensor([0, 3, 20]))
    trainer.weigh(some)
    assert some.log_z_B.tolist() == [0, 0, 0]
    assert not (teacher() * Pointwise(tiny.has_b)).normalised and not (teacher() ** 2).normalised
    assert Target([Reference()]).normalised


@EVERY
def test_sequence_level_distillation_is_exact(options, tmp_path):
    trainer = tiny.trainer(teacher(), tmp_path, tiny.model(0, scale=2.0), fit_samples=0, **options)
    trainer.model.load_state_dict(tiny.model(1, scale=2.0).state_dict())
    rollouts = tiny.enumerated(trainer, sampler=trainer.model)
    trainer.weigh(rollouts)
    rollouts.baseline_B = torch.zeros(15, dtype=torch.float64)
    loss_B, _ = trainer.sample_losses(trainer.model, rollouts)
    estimated = tiny.gradient((rollouts.sampler_logp_B.exp() * loss_B).sum(), trainer.model)
    logp = trainer.actors.scorer.rollouts(rollouts).logp_B
    exact = tiny.exact_divergence(trainer.divergence, logp, trainer.target.log_score(rollouts))
    analytic = tiny.gradient(exact, trainer.model)
    assert (estimated - analytic).norm() / analytic.norm() < 1e-8


def test_a_teacher_in_a_product_is_saved_and_loaded(tmp_path):
    lm = small_gpt(vocab_size=120)
    lm.save_pretrained(tmp_path / "big")
    letters().save_pretrained(tmp_path / "big")
    target = Teacher(str(tmp_path / "big")) * Pointwise("contains:a") * Reward("length:tokens", 2.0)
    rollouts = rollouts_by_hand(["a", "b", "a b"])
    with torch.no_grad():
        logp = Scorer(lm).rollouts(rollouts).logp_B.double()
    wanted = torch.tensor([float(logp[0]) + 0.5, -torch.inf, float(logp[2]) + 1.5], dtype=torch.float64)
    torch.testing.assert_close(target.log_score(rollouts), wanted)
    assert target.formula() == "P(x) = teacher_big(x) * [contains:a] * exp((length:tokens) / 2)"
    target.save_pretrained(tmp_path / "target")
    again = Target.from_pretrained(tmp_path / "target")
    assert torch.equal(again.log_score(rollouts_by_hand(["a", "b", "a b"])), target.log_score(rollouts))
    with pytest.raises(ValueError, match="a Teacher of a model without a name can't be saved"):
        Target([Teacher(small_gpt())]).save_pretrained(tmp_path / "no")


def test_vocabularies_that_differ(tmp_path):
    def train_with(factor):
        tiny.trainer(factor, tmp_path / "out", tiny.model(0))

    with pytest.raises(
        ValueError, match="20 tokens differ, such as .* Teach across tokenizers on text instead: .*Reward"
    ):
        train_with(Teacher(small_gpt(), letters()))
    turned = tiny.tokenizer()
    turned.eos_token = "b"
    with pytest.raises(ValueError, match="ends its texts with 'b' and the policy with 'E': set one eos_token"):
        train_with(Teacher(tiny.model(5), turned))
    with pytest.raises(ValueError, match="gives probabilities to 2 tokens, .* ids up to 2: .*black-box distillation"):
        narrow = tiny.model(5)
        narrow.resize_token_embeddings(2)
        train_with(Teacher(narrow))
    tiny.model(5).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="no tokenizer beside the teacher .*bare': pass it"):
        train_with(Teacher(str(tmp_path / "bare")))


def test_a_context_that_is_too_short():
    short = tiny.model(5)
    short.config.max_position_embeddings = 2
    with pytest.raises(ValueError, match="reads 2 tokens, and a prompt with its completion has 3: shorten the prompts"):
        Teacher(short).log_score(rollouts_by_hand(["\x01\x02\x01"]))
