"""The synthetic-oracle benchmark: its oracle against a plain LSTM, its sampler and scorer, its frontier."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hf_gdc.adversarial.real_text import RealTexts
from hf_gdc.sampling import TransformersSampler

ORACLE = Path(__file__).parents[1] / "recipes" / "benchmarks" / "oracle"
sys.path.insert(0, str(ORACLE))

import discriminators  # noqa: E402
import energies  # noqa: E402
import frontier as frontiers  # noqa: E402
import language  # noqa: E402
import methods  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402
from lstm import LinearNLL, LSTMConfig, LSTMForCausalLM  # noqa: E402

WORDS = 30


def parameters(seed: int) -> dict[str, np.ndarray]:
    """Random parameters of a small oracle, by their names in the file."""
    draw = np.random.default_rng(seed).standard_normal
    found = {"embedding": draw((WORDS, 4)), "output_weight": draw((4, WORDS)), "output_bias": draw(WORDS)}
    for gate in "ifog":
        found |= {f"weight_i{gate}": draw((4, 4)), f"weight_h{gate}": draw((4, 4)), f"bias_{gate}": draw(4)}
    return found


def log_prob_by_loops(given: dict[str, np.ndarray], words: list[int]) -> float:
    """log p of a sequence, word by word in float64, gates i, f, o, g as SeqGAN writes them."""
    hidden = cell = np.zeros(4)
    total, before = 0.0, language.START
    for word in words:
        x = given["embedding"][before]
        gates = {g: x @ given[f"weight_i{g}"] + hidden @ given[f"weight_h{g}"] + given[f"bias_{g}"] for g in "ifog"}
        take, keep, show = (1 / (1 + np.exp(-gates[g])) for g in "ifo")
        cell = keep * cell + take * np.tanh(gates["g"])
        hidden = show * np.tanh(cell)
        logits = hidden @ given["output_weight"] + given["output_bias"]
        total += logits[word] - np.log(np.exp(logits).sum())
        before = word
    return total


@pytest.fixture(scope="module")
def oracle():
    return language.seeded_oracle(3, WORDS)


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    return LSTMForCausalLM(LSTMConfig(vocab_size=WORDS, hidden_size=8, initializer_range=1.0)).eval()


def test_an_oracle_of_a_file_scores_as_a_loop_over_its_gates(tmp_path):
    given = parameters(0)
    save_file({name: torch.tensor(value, dtype=torch.float32) for name, value in given.items()}, tmp_path / "o.st")
    words_BT = torch.randint(WORDS, (5, language.LENGTH), generator=torch.Generator().manual_seed(0))
    found = language.nll(language.load_oracle(tmp_path / "o.st"), words_BT)
    wanted = [-log_prob_by_loops(given, row) / language.LENGTH for row in words_BT.tolist()]
    assert found.tolist() == pytest.approx(wanted, rel=1e-5)


def test_a_seed_makes_the_same_oracle_with_unit_variance(oracle):
    again = language.seeded_oracle(3, WORDS)
    for (name, one), two in zip(oracle.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    weights = torch.cat([p.flatten() for name, p in oracle.named_parameters() if "bias_hh" not in name])
    assert float(weights.detach().std()) == pytest.approx(1.0, abs=4 / math.sqrt(2 * len(weights)))


def test_what_the_sampler_records_is_the_models_log_probability(generator):
    sampler = TransformersSampler(language.make_tokenizer(WORDS), language.LENGTH)
    torch.manual_seed(1)
    rollouts = sampler(generator, ["0"] * 16)
    assert rollouts.completion_mask_BT.all() and rollouts.completion_ids_BT.shape == (16, language.LENGTH)
    scored = -language.nll(generator, rollouts.completion_ids_BT) * language.LENGTH
    assert rollouts.sampler_logp_B.tolist() == pytest.approx(scored.tolist(), rel=1e-5)


def test_one_word_at_a_time_gives_the_logits_of_the_whole_sequence(generator):
    ids = torch.randint(WORDS, (3, 7))
    with torch.no_grad():
        whole, state, steps = generator(ids).logits, None, []
        for t in range(7):
            out = generator(ids[:, t : t + 1], state=state)
            state = out.state
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-5, atol=1e-6)


def test_samples_have_the_distribution_of_the_model_and_of_its_powers(generator):
    """The first word's frequencies against pi^alpha, by a chi-squared statistic of 29 degrees of freedom (mean 29, sd 7.6)."""
    for alpha in (1.0, 2.0):
        words = language.sample(generator, 4000, seed=5, alpha=alpha)[:, 0]
        with torch.no_grad():
            expected = 4000 * (alpha * generator(torch.zeros(1, 1, dtype=torch.long)).logits[0, 0]).softmax(-1)
        counts = torch.bincount(words, minlength=WORDS)
        assert float(((counts - expected) ** 2 / expected).sum()) < 29 + 5 * 7.6


@pytest.mark.parametrize("tokens", [5, LinearNLL.ROWS, 2 * LinearNLL.ROWS + 3])
def test_the_fused_loss_and_its_gradients_are_cross_entropys(tokens):
    torch.manual_seed(0)
    given = [torch.randn(tokens, 4), torch.randn(WORDS, 4), torch.randn(WORDS)]
    target = torch.randint(WORDS, (tokens,))
    one, two = ([x.double().requires_grad_() for x in given] for _ in range(2))
    fused = LinearNLL.apply(*one, target)
    plain = torch.nn.functional.cross_entropy(two[0] @ two[1].T + two[2], target, reduction="sum")
    (3 * fused).backward()
    (3 * plain).backward()
    assert float(fused.detach()) == pytest.approx(float(plain.detach()))
    for ours, theirs in zip(one, two, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_oracles_own_frontier_starts_at_its_entropy(oracle):
    """At alpha 1 both coordinates estimate the entropy; the further off, the further NLL_gen is above it."""
    held_out = language.sample(oracle, 2000, seed=1)
    rows = frontiers.frontier(oracle, oracle, held_out, samples=2000, seed=2, alphas=(0.7, 1.0, 1.5))
    entropy = float(language.nll(oracle, held_out).mean())
    assert rows[1]["nll_gen"] == pytest.approx(entropy, rel=1e-5)
    assert rows[1]["nll_oracle"] == pytest.approx(entropy, abs=6 * rows[1]["nll_oracle_stderr"])
    assert rows[1]["entropy"] == pytest.approx(rows[1]["nll_oracle"], rel=1e-5)  # it scores its own samples
    assert rows[0]["entropy"] > rows[1]["entropy"] > rows[2]["entropy"]
    assert rows[0]["nll_gen"] > rows[1]["nll_gen"] < rows[2]["nll_gen"]
    assert rows[0]["nll_oracle"] > rows[1]["nll_oracle"] > rows[2]["nll_oracle"]
    assert report.both_kls(rows, entropy) == pytest.approx(0, abs=1e-4)  # at alpha 1
    found = frontiers.best(rows)
    assert found["sum"] == min(row["nll_oracle"] + row["nll_gen"] for row in rows)


def test_the_pair_discriminator_sums_over_a_prefix():
    pairs_VV = torch.rand(WORDS, WORDS, generator=torch.Generator().manual_seed(0)).softmax(1)
    network, words = discriminators.PairDiscriminator(pairs_VV), [4, 7, *[4] * 18]
    for place, parameter in enumerate(network.trainable_parameters()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(place))
    sampler = TransformersSampler(language.make_tokenizer(WORDS), language.LENGTH)
    rollouts = RealTexts(sampler)([{"prompt": "2", "completion": " ".join(map(str, words))}], torch.device("cpu"))
    weight, shift, own = network.weight, network.shift, network.own.weight[:, 0]
    entropy = torch.distributions.Categorical(probs=pairs_VV).entropy().mean()
    terms = [
        weight * (pairs_VV[a, b].log() + entropy) + shift + own[b] for a, b in zip([2, *words], words, strict=False)
    ]
    torch.testing.assert_close(network(rollouts)[0], torch.stack(terms).cumsum(0))


@pytest.mark.parametrize("kind", ["lstm", "gpt"])
def test_every_method_trains_either_generator(tmp_path, oracle, kind):
    words = language.sample(oracle, 300, seed=1)
    start = methods.make_generator(kind, 0, WORDS)
    before = float(language.nll(start, words[200:]).mean())
    mle = methods.train_mle(start, words[:200], words[200:], tmp_path / "mle", 0, epochs=3)
    middle = float(language.nll(mle, words[200:]).mean())
    assert middle < before
    weights = mle.get_output_embeddings().weight.detach().clone()
    options = {"per_device_train_batch_size": 32, "discriminator_warmup_steps": 1, "learning_rate": 1e-3}
    gan = methods.train_gan(mle, words[:200], tmp_path / "gan", 0, 2, **options)
    assert not torch.equal(weights, gan.get_output_embeddings().weight)
    assert float(language.nll(gan, words[200:]).mean()) == pytest.approx(middle, abs=0.2)


def test_adversarial_training_says_what_the_oracle_finds_likely(tmp_path):
    """NLL_oracle of samples falls at the same temperature, and by more than NLL_gen rises: the policy is no collapsed one."""
    oracle = language.seeded_oracle(3, 200)
    words, unseen = language.sample(oracle, 700, seed=1).split([600, 100])
    start = methods.make_generator("lstm", 0, 200)
    model = methods.train_mle(start, words, unseen, tmp_path / "mle", 0, epochs=15, patience=None)

    def judged():
        samples = language.sample(model, 1000, seed=5)
        return float(language.nll(oracle, samples).mean()), float(language.nll(model, unseen).mean())

    before = judged()
    model = methods.train_gan(model, words, tmp_path / "gan", 0, steps=30, per_device_train_batch_size=64)
    after = judged()
    assert after[0] < before[0] - 0.2
    assert sum(after) < sum(before) - 0.1


def test_pairs_are_smoothed_towards_the_words_own_frequencies():
    found = energies.pair_probabilities(torch.tensor([[1, 1, 2], [1, 1, 1]]), vocab_size=4, discount=0.5)
    own = torch.tensor([0.5, 5.5, 1.5, 0.5]) / 8
    torch.testing.assert_close(found[0], torch.tensor([0.0, 1.5, 0.0, 0.0]) / 2 + 0.25 * own)  # 0 -> 1 twice
    torch.testing.assert_close(found[1], torch.tensor([0.0, 2.5, 0.5, 0.0]) / 4 + 0.25 * own)  # 1 -> 1, 1, 1, 2
    torch.testing.assert_close(found[3], own)  # never seen


@pytest.mark.parametrize("kind", ["lstm", "gpt"])
def test_the_energy_mixes_word_by_word_and_is_sampled_as_it_is_scored(kind):
    generator = methods.make_generator(kind, 0, WORDS).eval().requires_grad_(False)
    words = language.sample(generator, 100, seed=1)
    mixture = energies.MixtureLM(generator, energies.pair_probabilities(words, WORDS, 0.9), 0.3)
    ids = torch.cat([torch.zeros(4, 1, dtype=torch.long), words[:4]], 1)[:, :-1]
    with torch.no_grad():
        own, mixed = generator(ids).logits.softmax(-1), mixture(ids).logits.exp()
    torch.testing.assert_close(mixed, 0.7 * own + 0.3 * mixture.pairs_VV[ids])
    sampler = energies.EnergySampler(language.make_tokenizer(WORDS), mixture)
    rollouts = sampler(None, ["0"] * 8)
    scored = -language.nll(mixture, rollouts.completion_ids_BT) * language.LENGTH
    assert rollouts.sampler_logp_B.tolist() == pytest.approx(scored.tolist(), rel=1e-5)
    residual = energies.ResidualEnergy(mixture)(rollouts)[:, 0]
    reference = -language.nll(generator, rollouts.completion_ids_BT) * language.LENGTH
    assert residual.tolist() == pytest.approx((scored - reference).tolist(), abs=1e-3)


@pytest.mark.parametrize("kind", ["lstm", "gpt"])
def test_the_unified_loss_is_the_cross_entropy_to_the_energys_next_words(tmp_path, oracle, monkeypatch, kind):
    words, losses = language.sample(oracle, 300, seed=1), []
    plain = energies.SampledEnergyTrainer.sample_losses

    def watched(trainer, model, rollouts):
        loss_B, out = plain(trainer, model, rollouts)
        ids_BT = torch.cat([rollouts.prompt_ids_BP, rollouts.completion_ids_BT[:, :-1]], 1)
        with torch.no_grad():
            p = trainer.discriminator.network.mixture(ids_BT).logits.exp()
            wanted_B = -(p * trainer.model(ids_BT).logits.log_softmax(-1)).sum((1, 2))
        losses.append((loss_B.detach(), wanted_B))
        return loss_B, out

    monkeypatch.setattr(energies.SampledEnergyTrainer, "sample_losses", watched)
    start = methods.make_generator(kind, 0, WORDS)
    methods.train_unified(start, words[:200], words[200:], tmp_path, 0, steps=3, per_device_train_batch_size=16)
    assert len(losses) == 3
    for found_B, wanted_B in losses:
        torch.testing.assert_close(found_B, wanted_B, rtol=1e-4, atol=1e-3)


def test_the_benchmark_goes_on_where_it_stopped(tmp_path, oracle, monkeypatch):
    for name, size in (("TRAIN", 128), ("VALIDATION", 64), ("HELD_OUT", 64)):
        monkeypatch.setattr(run, name, size)
    monkeypatch.setattr(run, "seeded_oracle", lambda seed: oracle)
    started = []

    def train(benchmark, seed, folder):
        started.append(seed)
        return methods.make_generator(benchmark.generator, seed, WORDS)

    monkeypatch.setitem(methods.METHODS, "mle", methods.Method(train))
    monkeypatch.setitem(methods.METHODS, "gan", methods.Method(train, start="mle"))
    options = ["--output", str(tmp_path), "--samples", "64", "--oracle", "3"]
    run.main([*options, "--methods", "gan", "--seeds", "1"])  # what it starts from comes first
    assert started == [1, 1]
    run.main([*options, "--methods", "mle", "gan", "--seeds", "1", "2"])
    assert started == [1, 1, 2, 2]
    found = json.loads((tmp_path / "oracle.json").read_text())
    assert found["entropy"] == pytest.approx(float(language.nll(oracle, language.sample(oracle, 64, 1)).mean()))
    parts = [json.loads((tmp_path / f"seed{n}" / "mle" / "part.json").read_text()) for n in (1, 2)]
    sums = [min(row["nll_oracle"] + row["nll_gen"] for row in part["frontier"]) for part in parts]
    assert found["methods"]["mle"]["best sum"] == pytest.approx([sum(sums) / 2, abs(sums[0] - sums[1]) / 2])
    assert found["methods"]["gan"]["minus MLE's"] == pytest.approx([0.0, 0.0])  # the same models, the same samples
    assert "| mle |" in (tmp_path / "table.md").read_text() and (tmp_path / "figure.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="give another --output"):
        run.main([*options[:-1], "4"])


@pytest.mark.slow
def test_unified_training_learns_what_the_counts_know(tmp_path, oracle):
    """Maximum likelihood learns some of 700 sequences by heart; pulled to the mixture, it knows unseen ones better."""
    words = language.sample(oracle, 2000, seed=1)
    train, unseen = words[:700], words[1500:]
    mle = methods.train_mle(methods.make_generator("lstm", 0, WORDS), train, unseen, tmp_path / "mle", 0)
    before = float(language.nll(mle, unseen).mean())
    trained = methods.train_unified(mle, train, unseen, tmp_path / "unified", 0, steps=60)
    assert float(language.nll(trained, unseen).mean()) < before - 0.005
