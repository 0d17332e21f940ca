"""ImageGANTrainer: exact resume, accumulation, processes, targets on both sides, what is saved, and what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_pathwise import line_trainer, log_normal, log_p
from test_resume import assert_equal
from torch import nn

from hf_gdc import (
    DCGANConfig,
    DCGANDiscriminator,
    DCGANGenerator,
    ImageDataset,
    ImageGANConfig,
    ImageGANTrainer,
    Moment,
    Pointwise,
    Policy,
    Reference,
)

WORKER = Path(__file__).parent / "image_worker.py"
SHAPE = {"image_size": 8, "hidden_size": 4, "latent_size": 4, "dense_size": 8, "generator_norm": "group"}


def dataset(count=96, labels=True, seed=0) -> ImageDataset:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageDataset(images, torch.arange(count) % 3 if labels else None)


def gan(folder, data=None, target=None, shape=None, **options) -> ImageGANTrainer:
    settings = {"max_steps": 6, "per_device_train_batch_size": 16, "learning_rate": 5e-3, "use_cpu": True}
    settings |= {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "sample_steps": 0, "ema_decay": 0.9}
    torch.manual_seed(0)
    args = ImageGANConfig(output_dir=str(folder), **(settings | options))
    generator = DCGANGenerator(DCGANConfig(**(SHAPE | (shape or {}))))
    return ImageGANTrainer(generator, args=args, train_dataset=data or dataset(), target=target)


def weights(trainer) -> dict:
    return {"generator": trainer.model.state_dict(), "discriminator": trainer.adversary.model.state_dict()}


# ---- resume, in real processes ----


def run(output_dir, resume: str, kill_at: int) -> int:
    command = [sys.executable, str(WORKER), "training", str(output_dir), resume, str(kill_at)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done.returncode


def test_killed_and_resumed_is_bit_equal(tmp_path):
    """Spectral norm, averages, penalties, augmentation, a fitted target, schedules and several updates: all go on."""
    assert run(tmp_path / "whole", "fresh", 0) == 0
    assert run(tmp_path / "cut", "fresh", 7) == -9
    assert not (tmp_path / "cut" / "end.pt").exists()
    assert run(tmp_path / "cut", "resume", 0) == 0
    whole, cut = (torch.load(tmp_path / name / "end.pt") for name in ("whole", "cut"))
    assert_equal(cut, whole)


# ---- processes and accumulation ----


def test_two_processes_equal_one_on_the_same_batch(tmp_path):
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    for processes in (1, 2):
        launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command = [sys.executable, *launcher, str(WORKER), "same_batch", str(tmp_path), str(processes)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    start, one, two = (torch.load(tmp_path / f"{name}.pt") for name in ("start", "end1", "end2"))
    for player in ("generator", "discriminator"):
        first, second = (
            torch.cat([(end[player][name] - start[player][name]).flatten() for name in start[player]])
            for end in (one, two)
        )
        assert first.norm() > 1e-3
        assert (first - second).norm() / first.norm() < 1e-4


def test_accumulated_micro_batches_equal_one_batch(tmp_path):
    """The discriminator learns from all micro-batches of a step before the generator does."""
    latents = torch.randn(4, 16, 4, generator=torch.Generator().manual_seed(1))
    ends = []
    for size, accumulate in ((16, 1), (8, 2)):
        trainer = gan(
            tmp_path / str(size),
            dataset(16),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            max_steps=2,
            r1_gamma=0.1,
            optim="sgd",
        )
        trainer.adversary.optimizer = torch.optim.SGD(trainer.adversary.model.parameters(), 5e-3)
        queue = list(latents.reshape(-1, size, 4))
        trainer.draw_latents = lambda count, queue=queue: queue.pop(0)
        trainer.train()
        assert not queue
        ends.append(weights(trainer))
    for player in ("generator", "discriminator"):
        for name, tensor in ends[0][player].items():
            torch.testing.assert_close(ends[1][player][name], tensor, rtol=1e-4, atol=1e-6)


# ---- one step by hand ----


@pytest.mark.parametrize("kind", ["bce", "relativistic", "bound"])
def test_a_step_is_the_textbooks(kind, tmp_path):
    """Plain SGD, so that the updates are the gradients: the discriminator's loss, then the generator's against the new one."""
    latents = torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(1))
    trainer = gan(
        tmp_path,
        dataset(16),
        discriminator_loss=kind,
        max_steps=1,
        optim="sgd",
        divergence="js",
        max_grad_norm=0.0,
        r2_gamma=0.3,
    )
    judge = trainer.adversary.model
    trainer.adversary.optimizer = torch.optim.SGD(judge.parameters(), 5e-3)
    queue = list(latents)
    trainer.draw_latents = lambda count: queue.pop(0)
    generator, discriminator = DCGANGenerator(trainer.model.config), DCGANDiscriminator(trainer.model.config)
    generator.load_state_dict(trainer.model.state_dict())
    discriminator.load_state_dict(judge.state_dict())
    trainer.train()

    real = dataset(16).pixel_values
    fake = generator(latents[0]).pixel_values.detach().requires_grad_()
    on_real, on_fake = discriminator(real).logits, discriminator(fake).logits
    if kind == "bce":
        binary = nn.functional.binary_cross_entropy_with_logits
        loss = binary(on_real, torch.ones(16)) + binary(on_fake, torch.zeros(16))
    elif kind == "relativistic":
        # the order of the real images is the loader's, so pair with the same shuffle
        order = trainer_order(trainer)
        loss = nn.functional.softplus(on_fake - on_real[order]).mean()
    else:  # f-GAN's own table: JS has T = log 2 - log(1 + e^-v) and f*(T) = -log(2 - e^T), v the logit
        t_real, t_fake = (torch.log(torch.tensor(2.0)) - nn.functional.softplus(-v) for v in (on_real, on_fake))
        loss = -(t_real.mean() + torch.log(2 - t_fake.exp()).mean())
    (slope,) = torch.autograd.grad(on_fake.sum(), fake, create_graph=True)
    (loss + 0.15 * slope.flatten(1).square().sum(1).mean()).backward()
    torch.optim.SGD(discriminator.parameters(), 5e-3).step()
    for name, tensor in discriminator.state_dict().items():
        torch.testing.assert_close(judge.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)

    logits = discriminator(generator(latents[1]).pixel_values).logits
    if kind == "relativistic":
        logits = logits - logits.detach().exp().mean().log()
    torch.log(1 - logits.sigmoid()).mean().backward()  # minimax
    torch.optim.SGD(generator.parameters(), 5e-3).step()
    for name, tensor in generator.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)


def trainer_order(trainer) -> torch.Tensor:
    """Positions of the images of the first batch in the dataset."""
    first = next(iter(trainer.get_train_dataloader()))["pixel_values"]
    return torch.cdist(first.flatten(1), trainer.train_dataset.pixel_values.flatten(1)).argmin(1)


# ---- targets ----


def is_label_1(labels, **_):
    return [float(label == 1) for label in labels]


def mean_x(images, **_):
    """A differentiable feature: the x of the line, from an image in [0, 1]."""
    return 2 * images[:, 0, 0, 0] - 1


def test_real_images_are_weighted_by_the_target(tmp_path):
    """One image in three has label 1; so that half have, lambda = logit(1/2) - logit(1/3) and the weights are 3/2 and 3/4."""
    trainer = gan(tmp_path, target=Policy() * Moment(is_label_1, 0.5))
    trainer.fit_target()
    assert trainer.target.moments[0].lam == pytest.approx(0.6931, abs=1e-3)
    inputs = trainer.data_collator(dataset().__getitems__(range(30)))
    weights_B = trainer.sides(inputs).weights_B
    assert weights_B[inputs["labels"] == 1].tolist() == pytest.approx([1.5] * 10, rel=1e-4)
    assert weights_B[inputs["labels"] != 1].tolist() == pytest.approx([0.75] * 20, rel=1e-4)
    trainer.train()


def test_a_hard_constraint_leaves_real_images_out(tmp_path):
    trainer = gan(tmp_path, target=Pointwise(is_label_1))
    trainer.fit_target()
    inputs = trainer.data_collator(dataset().__getitems__(range(30)))
    assert trainer.sides(inputs).weights_B.tolist() == [3.0 * (n % 3 == 1) for n in range(30)]


def test_the_discriminators_optimum_with_weights_is_the_target_over_q():
    """Three kinds of images with p = (.2, .3, .5), weights w and q: BCE's optimum is log(p w / q)."""
    from hf_gdc.adversarial.losses import binary_terms
    from hf_gdc.images.adversary import weighted_mean

    p, w, q = torch.tensor([[0.2, 0.3, 0.5], [2.0, 1.0, 0.6], [0.4, 0.4, 0.2]], dtype=torch.float64)
    counts = 1000
    real, fake = (torch.repeat_interleave(torch.arange(3), (share * counts).round().long()) for share in (p, q))
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=100, tolerance_grad=1e-10)

    def closure():
        optimizer.zero_grad()
        on_real, on_fake = binary_terms(logits[real], logits[fake])
        loss = weighted_mean(on_real, w[real]) + on_fake.mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(logits.detach(), torch.log(p * w / q), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("divergence", ["js", "reverse_kl", "kl"])
def test_a_constrained_generator_reaches_the_best_gaussian_for_the_tilted_target(divergence, tmp_path):
    """On the line, with the optimal discriminator of the *data*: the generator finds p e^(lambda x)."""
    from hf_gdc import get_divergence

    trainer = line_trainer(tmp_path, divergence=divergence, constrain="generator", max_steps=200)
    trainer.target = Policy() * Moment(mean_x, 0.3)
    lam = 0.4
    trainer.target.moments[0].lam = lam
    grid = torch.linspace(-12, 12, 6001, dtype=torch.float64)
    step = float(grid[1] - grid[0])
    tilted = log_p(grid) + lam * grid
    trainer._log_z = float((tilted.exp().sum() * step).log())
    tilted = tilted - trainer._log_z
    trainer.train()
    f = get_divergence(divergence).f

    def exact(v):
        return (tilted.exp() * f(log_normal(grid, v[0], v[1].exp()) - tilted)).sum() * step

    best = torch.tensor([0.3, 0.0], dtype=torch.float64)
    for _ in range(30):
        step_ = torch.linalg.solve(
            torch.autograd.functional.hessian(exact, best), torch.autograd.functional.jacobian(exact, best)
        )
        best = best - step_.clamp(-0.2, 0.2)
    reached = torch.stack([trainer.model.mean, trainer.model.log_width]).detach().double()
    torch.testing.assert_close(reached, best, rtol=0, atol=1e-2)
    untilted = log_p(grid)
    assert abs(float(best[0]) - float((untilted.exp() * grid).sum() * step)) > 0.1  # the tilt moved it


# ---- samples, averages, saving ----


def test_the_moving_average_is_what_it_says(tmp_path):
    trainer = gan(tmp_path, max_steps=5, ema_decay=0.9)
    seen = []
    plain = trainer.average.update_parameters
    trainer.average.update_parameters = lambda model: (seen.append(copy_of(model)), plain(model))
    trainer.train()
    average = seen[0]
    for count, current in enumerate(seen[1:], start=1):
        decay = min(0.9, (1 + count) / (10 + count))
        average = {name: decay * average[name] + (1 - decay) * current[name] for name in average}
    for name, tensor in trainer.sampler.state_dict().items():
        torch.testing.assert_close(tensor, average[name])


def copy_of(model) -> dict:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_spectral_norm_bounds_every_layer_and_is_saved_into_the_weights(tmp_path):
    trainer = gan(tmp_path / "run", spectral_norm=True, max_steps=8)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    saved = DCGANDiscriminator.from_pretrained(tmp_path / "model" / "discriminator")
    images = dataset().pixel_values[:5]
    judge = trainer.adversary.model.eval()
    torch.testing.assert_close(saved(images).logits, judge(images).logits)
    for module in saved.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            assert float(torch.linalg.matrix_norm(module.weight.detach().flatten(1), 2)) < 1.2
    assert not any("parametrizations" in name for name in saved.state_dict())


def test_saved_is_the_average_and_a_checkpoint_has_the_weights_themselves(tmp_path):
    trainer = gan(tmp_path / "run", save_strategy="steps", save_steps=6)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    saved = DCGANGenerator.from_pretrained(tmp_path / "model").state_dict()
    kept = DCGANGenerator.from_pretrained(tmp_path / "run" / "checkpoint-6").state_dict()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(kept[name], tensor)
        assert torch.equal(saved[name], trainer.sampler.state_dict()[name])
    assert any(not torch.equal(saved[name], kept[name]) for name in saved)


def test_grids_are_written_and_tracked_without_touching_the_random_numbers(tmp_path):
    from transformers.integrations import TensorBoardCallback

    class Writer:
        images = []

        def add_image(self, name, pixels, step, dataformats):
            self.images.append((name, tuple(pixels.shape), step, dataformats))

    ends = []
    for every in (0, 2):
        trainer = gan(tmp_path / str(every), sample_steps=every, sample_grid=9)
        trainer.train()
        ends.append(weights(trainer))
        if every:
            callback = TensorBoardCallback.__new__(TensorBoardCallback)
            callback.tb_writer = Writer()
            trainer.callback_handler.callbacks.append(callback)
            trainer.write_samples()
    assert_equal(ends[0], ends[1])
    files = sorted(path.name for path in (tmp_path / "2" / "samples").iterdir())
    assert files == [f"step-{step:06d}.png" for step in (2, 4, 6)]
    picture = Image.open(tmp_path / "2" / "samples" / "step-000006.png")
    assert picture.size == (3 * 34 + 2,) * 2  # 8 pixels enlarged to 32, a gap of 2
    assert Writer.images == [("samples", (104, 104, 3), 6, "HWC")]


def test_evaluate_bounds_every_divergence_and_leaves_the_random_numbers_alone(tmp_path):
    seen = {}

    def compare(prediction):
        seen["shapes"] = prediction.predictions.shape, prediction.label_ids.shape
        return {"answer": 42.0}

    trainer = gan(tmp_path, eval_samples=40)
    trainer.compute_metrics = compare
    before = torch.random.get_rng_state()
    metrics = trainer.evaluate()
    assert torch.equal(before, torch.random.get_rng_state())
    assert seen["shapes"] == ((40, 1, 8, 8), (40, 1, 8, 8)) and metrics["eval_answer"] == 42.0
    names = {name for name in metrics if name.endswith("_bound")}
    assert {"eval_js_bound", "eval_kl_bound", "eval_non_saturating_bound"} <= names and "eval_tv_bound" not in names
    assert metrics == trainer.evaluate()


def test_a_conditional_game_runs_on_the_datas_labels(tmp_path):
    trainer = gan(tmp_path, shape={"num_classes": 3}, max_steps=3, sample_steps=3, augmentation=["translate", "cutout"])
    trainer.train()
    assert trainer.evaluate()["eval_discriminator_accuracy"] >= 0


# ---- refusals ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"discriminator_loss": "hinge"}, "discriminator_loss must be one of bce, relativistic, bound, but is 'hinge'"),
        ({"constrain": "both"}, "constrain must be one of data, generator"),
        ({"augmentation": ["flip"]}, "unknown augmentation 'flip'; known: translate, cutout, brightness"),
        ({"r1_gamma": -1.0}, "r1_gamma can't be negative"),
        ({"ema_decay": 1.0}, r"ema_decay must lie in \[0, 1\)"),
        ({"eval_samples": 0}, "eval_samples must be at least 1"),
        ({"divergense": "js"}, "Did you mean `divergence`?"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        ImageGANConfig(output_dir="never", use_cpu=True, **options)


def test_what_does_not_fit_is_refused(tmp_path):
    def fails(message, data=None, target=None, train=False, **options):
        with pytest.raises(ValueError, match=message):
            trainer = gan(tmp_path / "never", data, target, **options)
            if train:
                trainer.train()

    fails("conditioned on 3 classes, but the data has no labels", dataset(labels=False), shape={"num_classes": 3})
    fails(r"images are \(1, 8, 8\) and the generator makes \(1, 14, 14\)", shape={"image_size": 14})
    fails("12 training images don't fill one batch of 16", dataset(12))
    fails("unknown divergence 'jss'. Did you mean 'js'", divergence="jss")
    fails("a generator of images has no density", target=Reference() * Moment(is_label_1, 0.5), train=True)
    fails("none of 96 real images satisfies", target=Pointwise(lambda images, **_: [0.0] * len(images)), train=True)
    fails("its features give no graph", target=Moment(is_label_1, 0.5), constrain="generator", train=True)
    fails("lies outside of what", target=Moment(is_label_1, 1.5), train=True)
    generator = DCGANGenerator(DCGANConfig(**SHAPE))
    other = DCGANDiscriminator(DCGANConfig(**(SHAPE | {"image_size": 16})))
    args = ImageGANConfig(output_dir=str(tmp_path / "never"), use_cpu=True)
    with pytest.raises(ValueError, match="the generator has image_size=8 and the discriminator 16"):
        ImageGANTrainer(generator, other, args=args, train_dataset=dataset())
    with pytest.raises(ValueError, match="train_dataset is missing"):
        ImageGANTrainer(generator, args=args)
    rows = [{"pixel_values": torch.full((1, 8, 8), 1.5)}] * 32
    with pytest.raises(ValueError, match=r"pixel_values must lie in \[-1, 1\], but one is 1.5"):
        ImageGANTrainer(generator, args=args, train_dataset=rows)
    assert not any((tmp_path / "never").iterdir())


def test_a_second_fresh_run_is_refused(tmp_path):
    trainer = gan(tmp_path, max_steps=1)
    (tmp_path / "precious").write_text("")
    with pytest.raises(ValueError, match="is not empty"):
        trainer.train()
