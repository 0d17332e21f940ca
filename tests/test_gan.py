"""GANTrainer's parts: phases, stabilisers, adapters, evaluation, resume. What it learns is in `test_gan_learns`."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import adversaries
import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig
from test_resume import assert_equal

from hf_gdc import Discriminator, GANConfig, GANTrainer, Target, get_divergence
from hf_gdc.adversarial.discriminator_training import MOST, PREFIXES, WEIGHT
from hf_gdc.adversarial.losses import dual

WORKER = Path(__file__).parent / "worker.py"
CPU = torch.device("cpu")


def weights(module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


def dense(**options) -> Discriminator:
    return Discriminator(adversaries.classifier(dense=True, scale=0.3), dense=True, **options)


def rolled(trainer, size: int = 32):
    """Fresh samples and the real texts of their rows."""
    rows = [trainer.train_dataset[n] for n in range(size)]
    return trainer.actors.sample_policy(rows), trainer.real_rollouts(rows)


# ---- networks ----


@pytest.mark.parametrize("kind", ["sequence", "dense"])
def test_logits_are_read_at_the_last_real_token_whatever_the_padding(kind, tmp_path):
    """Prompts of several lengths, an end that is the padding's id, cut completions: each alone gives the same logit."""
    discriminator = dense() if kind == "dense" else Discriminator(adversaries.classifier(scale=0.5))
    trainer = adversaries.gan(tmp_path, discriminator)
    every = tiny.enumerated(trainer, ("a", "b b a", ""))
    network = discriminator.network
    together = network.whole_scores(every)
    for n in (0, 3, 14, 15, 29, 44):
        ids = every.prompt_ids_BP[n][every.prompt_mask_BP[n]].tolist() + every.completion_ids()[n]
        hidden = network.model.transformer(torch.tensor([ids])).last_hidden_state
        head = network.model.classifier if kind == "dense" else network.model.score
        assert float(together[n]) == pytest.approx(float(head(hidden)[0, -1, 0].detach()), abs=1e-5)
    assert together.std() > 0.05


def test_a_dense_network_scores_prefixes_as_if_they_were_alone(tmp_path):
    trainer = adversaries.gan(tmp_path, dense())
    every, rows = tiny.enumerated(trainer), tiny.strings()
    prefixes = trainer.discriminator.network.prefix_scores(every)
    for n, row in enumerate(rows):
        for t in range(1, len(row) + 1):
            same = [m for m, other in enumerate(rows) if other[:t] == row[:t]]
            assert (prefixes[same, t - 1] - prefixes[n, t - 1]).abs().max() < 1e-6
    assert torch.equal(prefixes[:, -1], trainer.discriminator.log_score(every))


def test_bidirectional_discriminators(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = BertForSequenceClassification(BertConfig(vocab_size=3, num_labels=1, max_position_embeddings=16, **size))
    trainer = adversaries.gan(tmp_path, Discriminator(bert), max_steps=2)
    before = weights(bert)
    trainer.train()
    assert not torch.equal(before, weights(bert))
    with pytest.raises(ValueError, match="gives no causal logit"):
        Discriminator(bert, dense=True)


# ---- phases ----


def test_the_phases_of_a_run(tmp_path):
    """Maximum likelihood moves the policy alone, the warm-up the discriminator alone, the game both."""
    seen = []

    class Watch(adversaries.Callback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append((weights(trainer.model), weights(trainer.discriminator.network)))

    trainer = adversaries.gan(tmp_path, mle_steps=2, discriminator_warmup_steps=2, max_steps=6, callbacks=[Watch()])
    seen.append((weights(trainer.model), weights(trainer.discriminator.network)))
    trainer.train()
    moved = [
        tuple(not torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in zip(seen, seen[1:], strict=False)
    ]
    assert moved == [(True, False)] * 2 + [(False, True)] * 2 + [(True, True)] * 2


def test_maximum_likelihood_learns_the_texts(tmp_path):
    log_p = adversaries.goal()
    trainer = adversaries.gan(tmp_path, mle_steps=60, max_steps=60, per_device_train_batch_size=128)
    before = adversaries.distances(trainer, log_p)[0]
    trainer.train()
    after = adversaries.distances(trainer, log_p)[0]
    assert after < 0.1 < before
    metrics = trainer.evaluate()
    entropy = -float((log_p.exp() * log_p).sum())
    assert metrics["eval_nll"] == pytest.approx(entropy + after, abs=0.5)  # 64 texts


# ---- prompts and losses ----


@pytest.mark.parametrize("loss", ["bce", "bound", "bradley_terry", "relativistic"])
def test_losses_on_prompts_and_completions(loss, tmp_path):
    """One real completion for the samples of each prompt; the loss is what its formula says, however it is cut."""
    rows = [{"prompt": p, "completion": c} for p, c in [("a", "b"), ("b", "a a"), ("a b", ""), ("b b", "b a")] * 4]
    options = {"per_device_train_batch_size": 16, "num_generations": 4, "discriminator_loss": loss}
    discriminator = Discriminator(adversaries.classifier(scale=0.5))
    trainer = adversaries.gan(tmp_path, discriminator, Dataset.from_list(rows), **options)
    inputs = [row for row in rows[:4] for _ in range(4)]
    fake, real = trainer.actors.sample_policy(inputs), trainer.real_rollouts(inputs)
    assert torch.equal(fake.prompt_key_B[::4], real.prompt_key_B) and real.texts == [
        row["completion"] for row in rows[:4]
    ]
    r, f = discriminator.log_score(real), discriminator.log_score(fake)
    pairs = torch.nn.functional.softplus(f[None] - r[:, None])
    expected = {
        "bce": torch.nn.functional.softplus(-r).mean() + torch.nn.functional.softplus(f).mean(),
        "bound": -(
            dual(-r, trainer.divergence.f, trainer.divergence.f_prime).mean() + trainer.divergence.f_prime(-f).mean()
        ),
        "bradley_terry": torch.stack([pairs[n, 4 * n : 4 * n + 4] for n in range(4)]).mean(),
        "relativistic": pairs.mean(),
    }[loss]
    assert trainer.learner.step(fake, real)["discriminator/loss"] == pytest.approx(float(expected), rel=1e-5)
    if loss == "relativistic":
        return  # compares what meets in a micro-batch
    again = adversaries.gan(
        tmp_path, Discriminator(adversaries.classifier(scale=0.5)), Dataset.from_list(rows), **options
    )
    again.args.per_device_train_batch_size = 5  # one prompt's four samples at a time
    again.learner.step(fake, real)
    whole, cut = (
        torch.cat([p.grad.flatten() for p in player.learner.parameters if p.grad is not None])
        for player in (trainer, again)
    )
    assert (whole - cut).norm() / whole.norm() < 1e-5


def test_a_game_on_prompts_with_a_reward_beside_it(tmp_path):
    rows = [{"prompt": p, "completion": c} for p, c in [("a", "b"), ("b", "a a"), ("a b", ""), ("b b", "b a")] * 4]
    options = {"per_device_train_batch_size": 16, "num_generations": 4, "max_steps": 2, "eval_samples": 16}
    for make in (adversaries.gan, adversaries.unified):
        trainer = make(
            tmp_path / make.__name__, None, Dataset.from_list(rows), target=adversaries.reward_of_a(), **options
        )
        trainer.train()
        assert "eval_features/count_a" in trainer.evaluate()


# ---- stabilisers ----


@pytest.mark.parametrize("which", ["r1", "r2"])
@pytest.mark.parametrize("kind", ["sequence", "dense"])
def test_gradient_penalties(kind, which, tmp_path):
    """What the option adds to the loss is half the mean squared slope by the embeddings, from another computation of it."""
    discriminator = dense() if kind == "dense" else Discriminator(adversaries.classifier(scale=0.5))
    trainer = adversaries.gan(tmp_path, discriminator)
    fake, real = rolled(trainer)
    sides = trainer.learner.prepare(fake, real)
    losses = []
    for strength in (0.0, 3.0):
        setattr(trainer.args, which, strength)
        with trainer.learner._learning():
            losses.append(float(trainer.learner.loss(sides[1], sides[0]).detach()))
    side = sides[1] if which == "r1" else sides[0]
    model, slopes = discriminator.network.model, 0.0
    head = model.classifier if kind == "dense" else model.score
    for n, row in enumerate(side.completion_ids()):
        embedded = model.get_input_embeddings()(torch.tensor([[0, *row]])).detach().requires_grad_()
        logit = head(model.transformer(inputs_embeds=embedded).last_hidden_state)[0, -1, 0]
        slopes += float(side.scores[WEIGHT][n]) * float(torch.autograd.grad(logit, embedded)[0].square().sum())
    assert slopes > 1e-4
    assert losses[1] - losses[0] == pytest.approx(1.5 * slopes, rel=1e-4)


def test_penalties_can_be_differentiated(tmp_path):
    """Of the whole network, attention too: against finite differences of one weight."""
    trainer = adversaries.gan(
        tmp_path,
        Discriminator(adversaries.classifier(scale=0.5, dtype=torch.float64)),
        lm=tiny.model(0, 0.5),
        r1=5.0,
        r2=5.0,
    )
    fake, real = rolled(trainer)
    fake, real = trainer.learner.prepare(fake, real)
    weight = trainer.discriminator.network.model.transformer.h[0].attn.c_attn.weight
    values = []
    with trainer.learner._learning():
        (slope,) = torch.autograd.grad(trainer.learner.loss(real, fake), weight)
        for step in (1e-5, -1e-5):
            weight.data[2, 3] += step
            values.append(float(trainer.learner.loss(real, fake)))
            weight.data[2, 3] -= step
    assert float(slope[2, 3]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4)


@pytest.mark.parametrize("kind", ["sequence", "dense"])
def test_replayed_samples_weigh_as_the_policy_now_would_sample_them(kind, tmp_path):
    discriminator = dense() if kind == "dense" else None
    trainer = adversaries.gan(tmp_path, discriminator, discriminator_replay_samples=16, discriminator_replay_window=48)
    for _ in range(3):
        trainer.learner._remember(*rolled(trainer))
    assert [len(side) for side in trainer.learner._window] == [48, 48]
    trainer.model.load_state_dict(tiny.model(3, 0.8, torch.float32).state_dict())
    fake, real = rolled(trainer)
    joined, texts = trainer.learner._with_earlier(fake, real)
    assert (len(joined), len(texts)) == (48, 48)
    older = joined.select(torch.arange(32, 48))
    if kind == "dense":
        logps = trainer.actors.scorer.rollouts(older).logps_BT.detach()
        ratio = (logps.cumsum(1) - older.sampler_logps_BT.cumsum(1)).exp().clamp_max(MOST)
        shape = older.completion_mask_BT
        torch.testing.assert_close(
            older.scores[PREFIXES][:, : ratio.shape[1]][shape], ratio[shape], rtol=1e-5, atol=1e-6
        )
        assert torch.equal(joined.scores[PREFIXES][:32], torch.ones_like(joined.scores[PREFIXES][:32]))
    else:
        ratio = (trainer.actors.policy_logp(older) - older.sampler_logp_B).exp().clamp_max(MOST)
        torch.testing.assert_close(older.scores[WEIGHT], ratio)
        assert torch.equal(joined.scores[WEIGHT][:32], torch.ones(32).double())
    assert ratio.std() > 0.1
    trainer.learner.step(joined, texts)


def test_spectral_norm_bounds_every_layer_and_is_saved_in_the_weights(tmp_path):
    trainer = adversaries.gan(
        tmp_path / "o",
        Discriminator(adversaries.classifier(scale=2.0)),
        spectral_norm=True,
        max_steps=6,
        discriminator_steps=4,
    )
    trainer.train()
    network = trainer.discriminator.network
    network.eval()
    names = ("c_attn", "c_proj", "c_fc", "score")
    layers = [m for name, m in network.model.named_modules() if name.rpartition(".")[2] in names]
    norms = [float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) for layer in layers]
    assert len(norms) == 5 and all(0.8 < norm < 1.1 for norm in norms)  # power iteration follows the moving weights
    trainer.target.save_pretrained(tmp_path / "target")
    again = Target.from_pretrained(tmp_path / "target")
    fake, _ = rolled(trainer)
    torch.testing.assert_close(again.log_score(fake), trainer.target.log_score(fake), rtol=0, atol=1e-6)


def test_demonstrations_are_weighed_by_the_mixture(tmp_path):
    log_p = adversaries.goal()
    optimal = Discriminator(adversaries.Optimal(log_p, error=0.4))
    trainer = adversaries.gan(tmp_path, optimal, demonstrations=8, lm=tiny.model(1, 0.7))
    fake, real = rolled(trainer)
    fake.sampler_logp_B = fake.policy_logp_B = trainer.actors.policy_logp(fake)
    trainer.target.log_score(fake), trainer.actors.reference_logp(fake)
    joined = trainer.replay.join(fake)
    index = torch.tensor([optimal.network.strings[tuple(row)] for row in joined.completion_ids()])
    log_pi = trainer.actors.policy_logp(joined)
    z = (log_p[index[:32]] - log_pi[:32]).exp().mean() * math.exp(0.4)  # of these samples
    p = log_p[index].exp() * math.exp(0.4) / z
    torch.testing.assert_close(joined.sampler_logp_B, ((32 * log_pi.exp() + 8 * p) / 40).log())
    torch.testing.assert_close(trainer.target.log_score(joined), log_p[index] + 0.4)
    assert (log_pi - joined.sampler_logp_B).exp().max() <= 40 / 32
    assert torch.equal(joined.completion_ids_BT[32:], real.completion_ids_BT[:8])


def test_demonstrations_reach_what_the_policy_never_samples(tmp_path):
    """A policy that all but excludes 'b' learns it from demonstrations, where samples alone can't show it."""
    log_p, shares = adversaries.goal(), []
    for count in (0, 64):
        lm = tiny.model(0, 0.3, torch.float32)
        bias = torch.nn.functional.one_hot(torch.tensor(2), 3) * -12.0
        lm.lm_head.weight.data[2] = 0.0
        lm.lm_head.register_forward_hook(lambda _, __, out, bias=bias: out + bias)
        optimal = Discriminator(adversaries.Optimal(log_p))
        options = {"per_device_train_batch_size": 64, "max_steps": 60, "divergence": "kl", "learning_rate": 5e-2}
        trainer = adversaries.gan(tmp_path / str(count), optimal, lm=lm, demonstrations=count, **options)
        trainer.train()
        every = tiny.enumerated(trainer, sampler=trainer.model)
        has_b = torch.tensor(tiny.has_b([row for row in tiny.strings()])).bool()
        shares.append(float(every.sampler_logp_B[has_b].exp().sum()))
    assert shares[0] < 0.01 and shares[1] > 0.2


# ---- clipped updates ----


def test_clipped_updates_are_ppos(tmp_path):
    """The first pass over a set of rollouts has the plain gradient; later ones clip where pi/pi_old left the range."""
    trainer = adversaries.gan(tmp_path, lm=tiny.model(0, 0.5), cliprange=0.1)
    fake, real = rolled(trainer)
    rollouts = trainer._make_rollouts([trainer.train_dataset[n] for n in range(32)])
    loss_B, _ = trainer.sample_losses(trainer.model, rollouts)
    clipped = torch.cat([g.flatten() for g in torch.autograd.grad(loss_B.mean(), list(trainer.model.parameters()))])
    trainer.args.cliprange = None
    loss_B, _ = trainer.sample_losses(trainer.model, rollouts)
    plain = torch.cat([g.flatten() for g in torch.autograd.grad(loss_B.mean(), list(trainer.model.parameters()))])
    torch.testing.assert_close(clipped, plain, rtol=1e-5, atol=1e-7)
    trainer.args.cliprange = 0.1
    trainer.model.load_state_dict(tiny.model(3, 0.9).state_dict())
    loss_B, out = trainer.sample_losses(trainer.model, rollouts)
    ratio = (out.logps_BT - rollouts.sampler_logps_BT).exp()
    advantage = (
        trainer.pseudo_reward(rollouts.policy_logp_B - rollouts.log_score_B + rollouts.log_z_B) - rollouts.baseline_B
    )[:, None]
    expected = -torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.1) * advantage) * rollouts.completion_mask_BT
    torch.testing.assert_close(loss_B, expected.sum(1))
    assert ((ratio - 1).abs() > 0.1)[rollouts.completion_mask_BT].any()


# ---- adapters ----


def lora(*modules: str) -> LoraConfig:
    return LoraConfig(r=4, target_modules=list(modules or ("q_proj", "v_proj")), task_type="CAUSAL_LM")


@pytest.mark.parametrize("kind", ["sequence", "dense"])
def test_both_players_on_one_base(kind, tmp_path):
    lm = tiny.model(0, 0.5, torch.float32, hidden_size=128)
    alone = sum(t.nbytes for t in (*lm.parameters(), *lm.buffers()))
    base = {name: value.clone() for name, value in lm.state_dict().items()}
    discriminator = Discriminator(dense=kind == "dense")
    trainer = adversaries.gan(tmp_path / "o", discriminator, lm=lm, peft_config=lora(), max_steps=1)
    head = discriminator.network.head
    found = {id(t): t for t in (*trainer.actors.tensors(), *head.parameters())}
    assert alone < sum(t.nbytes for t in found.values()) <= 1.2 * alone

    def adapters(name):
        return torch.cat(
            [p.detach().flatten() for n, p in trainer.model.named_parameters() if f".{name}." in n]
        ).clone()

    fake, real = rolled(trainer)
    policy, own, logp = adapters("default"), adapters("discriminator"), trainer.actors.policy_logp(fake)
    assert torch.equal(discriminator.log_score(fake), torch.zeros(32, dtype=torch.float64))  # it starts knowing nothing
    trainer.learner.step(fake, real)
    trainer.learner.step(fake, real)
    assert torch.equal(adapters("default"), policy) and torch.equal(trainer.actors.policy_logp(fake), logp)
    assert not torch.equal(adapters("discriminator"), own) and discriminator.log_score(fake).std() > 0
    own = adapters("discriminator")
    assert {n for n, p in trainer.model.named_parameters() if p.requires_grad and ".discriminator." in n} == set()
    trainer.args.discriminator_learning_rate = None
    trainer.learner.optimizer.param_groups[0]["lr"] = 0.0
    trainer.train()
    assert not torch.equal(adapters("default"), policy) and torch.equal(adapters("discriminator"), own)
    kept = trainer.model.get_base_model().state_dict()
    for name, value in base.items():
        stem, _, leaf = name.rpartition(".")
        assert torch.equal(kept.get(name, kept.get(f"{stem}.base_layer.{leaf}")), value), name


def test_an_adapter_discriminator_is_saved_and_loaded(tmp_path):
    tiny.model(0, 0.5, torch.float32).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    args = GANConfig(output_dir=str(tmp_path / "o"), **adversaries.DEFAULTS | {"max_steps": 3})
    texts = adversaries.real_texts(adversaries.goal(), 200)
    trainer = GANTrainer(
        str(tmp_path / "base"), Discriminator(logit_clip=4.0), args=args, train_dataset=texts, peft_config=lora()
    )
    trainer.train()
    trainer.target.save_pretrained(tmp_path / "target")
    fake, _ = rolled(trainer)
    again = Target.from_pretrained(tmp_path / "target")
    wanted = trainer.target.log_score(fake)
    torch.testing.assert_close(again.log_score(fake), wanted, rtol=0, atol=1e-6)
    assert wanted.std() > 0 and again.terms[1][0].network.logit_clip == 4.0
    trainer.save_model(str(tmp_path / "model"))
    assert (tmp_path / "model" / "adapter_model.safetensors").is_file()


# ---- evaluation ----


def test_evaluation_measures_the_game(tmp_path):
    log_p = adversaries.goal()
    held_out = adversaries.real_texts(log_p, 4096, seed=9)
    optimal = Discriminator(adversaries.OptimalAgainst(log_p, lambda: trainer))
    options = {"eval_samples": 4096, "per_device_eval_batch_size": 4096, "eval_dataset": held_out}
    options["lm"] = tiny.model(5, 0.3, torch.float32)
    trainer = adversaries.gan(tmp_path, optimal, **options)
    metrics = trainer.evaluate()
    every = tiny.enumerated(trainer, sampler=trainer.model)
    pi, ratio = every.sampler_logp_B.exp(), log_p - every.sampler_logp_B
    for name, key in {"js": "js", "kl": "kl_target_policy", "reverse_kl": "kl_policy_target", "tv": "tv"}.items():
        divergence = get_divergence(name)
        exact = float(tiny.exact_divergence(divergence, every.sampler_logp_B, log_p))
        terms = dual(-ratio, divergence.f, divergence.f_prime), divergence.f_prime(-ratio)
        variance = sum(w @ v**2 - (w @ v) ** 2 for w, v in zip((log_p.exp(), pi), terms, strict=True))
        assert metrics[f"eval_{key}_bound"] == pytest.approx(exact, abs=4 * float(variance / 4096) ** 0.5), name
    assert metrics["eval_nll"] == pytest.approx(-float((log_p.exp() * every.sampler_logp_B).sum()), abs=0.1)
    spread = float(((2 * ratio).exp() * pi).sum() - 1) ** 0.5 / 64
    assert math.exp(metrics["eval_discriminator/calibration"]) == pytest.approx(1.0, abs=4 * spread)
    json.dumps(metrics, allow_nan=False)


# ---- checkpoints ----


def run(folder, resume: str, kill_at: int, *options: str) -> int:
    command = [sys.executable, str(WORKER), "gan", str(folder), resume, str(kill_at), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ)
    assert done.returncode in (0, -9), done.stderr[-3000:]
    return done.returncode


@pytest.mark.parametrize(
    "players", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("dense", "adapters")), "unified"]
)
def test_killed_mid_game_and_resumed_is_bit_equal(players, tmp_path):
    """Steps 1 and 2 are maximum likelihood, 3 and 4 the discriminator's warm-up; checkpoints at 3 and 6, killed at 7 or 4."""
    assert run(tmp_path / "whole", "fresh", 0, players) == 0
    kill_at = {"dense": 7, "adapters": 7, "unified": 4}[players]
    assert run(tmp_path / "cut", "fresh", kill_at, players) == -9
    assert run(tmp_path / "cut", "resume", 0, players) == 0
    ends = [torch.load(tmp_path / name / "end.pt") for name in ("whole", "cut")]
    assert bool(ends[0]["window"]) == (players != "unified")
    assert_equal(*ends)


def test_an_empty_replay_on_resume_is_said_and_gone_on_from(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 16}
    first = adversaries.gan(tmp_path, max_steps=4, callbacks=[adversaries.stop_after(2)], **options)
    first.train()
    again = adversaries.gan(tmp_path, max_steps=4, discriminator_replay_samples=8, **options)
    with pytest.warns(UserWarning, match="has no samples to replay: the discriminator starts with none"):
        again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4 and len(again.learner._window[0]) == 32


def test_a_checkpoint_without_its_discriminator_is_refused(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 16, "max_steps": 4}
    adversaries.gan(tmp_path, callbacks=[adversaries.stop_after(2)], **options).train()
    (tmp_path / "checkpoint-2" / "discriminator.pt").unlink()
    with pytest.raises(ValueError, match="discriminator.pt is missing, which has the discriminator"):
        adversaries.gan(tmp_path, **options).train(resume_from_checkpoint=True)


def test_two_processes_equal_one_on_the_same_rollouts(tmp_path):
    from test_processes import launch

    trainer = adversaries.gan(tmp_path / "maker", lm=tiny.model(0, 0.5, torch.float32))
    given = {}
    for step in range(2):
        fake, real = rolled(trainer)
        given |= {f"fake {step}": fake.state_dict(), f"real {step}": real.state_dict()}
    torch.save(given, tmp_path / "given.pt")
    for processes in (1, 2):
        launch(processes, "gan_same_rollouts", str(tmp_path), str(processes))
    for kind in ("gan", "dense", "unified"):
        one, two = (torch.load(tmp_path / f"{kind}{processes}.pt") for processes in (1, 2))
        for player in ("policy", "discriminator"):
            update, other = (end[player] - one[f"{player} start"] for end in (one, two))
            assert update.norm() > 0.01
            assert (update - other).norm() / update.norm() < 1e-6, (kind, player)
