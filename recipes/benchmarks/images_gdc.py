"""Does GDC improve a GAN of images? Adversarial distillation against more of the plain game, at equal budget, several seeds.

    python recipes/benchmarks/images_gdc.py --steps 1500 --seeds 0 1 2

- **plain**: the recipe's unconditional GAN for 2 * steps updates of the generator.
- **restarted**: the same GAN for `steps`, and again for `steps` from its averaged generator and its discriminator. The learning
  rate falls to 0 over each run, so this is what a second fall alone does.
- **gdc**: the first half of restarted; then its generator q and discriminator d define P_D(x) = q(x) exp(d(x)) / Z, the energy
  model of the unified objective D_f(P_G || P_D) + lambda D(P_D, p_data), and samples of P_D (quasi-rejection sampling) join the
  real images, half and half, for the second half: D_f(P_G || (P_D + p_data) / 2), at most the mean of the two divergences. The
  generator is distilled from the discriminator, and the discriminator goes on learning from data.

All have the same updates, batches and first random numbers; drawing the samples is not counted. One classifier that no
generator has seen judges them, on as many images as the test half has. Seeds that the result file has, of as many steps and
judged alike, are not played again.
"""

import argparse
import copy
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import torch

from hf_gdc import (
    DCGANConfig,
    DCGANGenerator,
    ImageGANConfig,
    ImageGANTrainer,
    ImageRejectionSampler,
    Policy,
    Reward,
    load_images,
)
from hf_gdc.classifier_training import train_classifier
from hf_gdc.images.classifier import judge
from hf_gdc.images.data import ImageDataset
from hf_gdc.metrics.images import image_metrics, inception_score

SHAPE = {"image_size": 8, "hidden_size": 32, "dense_size": 512, "latent_size": 16, "generator_norm": "group"}
GAME = {
    "r1_gamma": 0.1,
    "penalty_interval": 8,
    "learning_rate": 6e-4,
    "lr_scheduler_type": "linear",
    "ema_decay": 0.998,
}
GAME |= {"adam_beta2": 0.99, "per_device_train_batch_size": 32, "sample_steps": 0, "use_cpu": True, "report_to": "none"}
GAME |= {"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
SHOWN = ("fid", "inception_score", "precision", "recall", "confident")
PLACE = Path("outputs/benchmarks/images_gdc.json")
ARMS = ("plain", "restarted", "gdc")


def play(data: ImageDataset, steps: int, seed: int, generator=None, discriminator=None) -> ImageGANTrainer:
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        generator = DCGANGenerator(DCGANConfig(**SHAPE)) if generator is None else generator
        args = ImageGANConfig(output_dir=folder, max_steps=steps, seed=seed, **GAME)
        trainer = ImageGANTrainer(generator, discriminator, args=args, train_dataset=data)
        trainer.train()
    return trainer


def with_energy_samples(trainer: ImageGANTrainer, real: ImageDataset, seed: int) -> tuple[ImageDataset, float]:
    """The real images and as many of P_D, and a bound of the samples' distance (TV) to P_D."""
    critic = trainer.adversary.model.eval()

    def logit(images: torch.Tensor, **_) -> torch.Tensor:
        return critic(images * 2 - 1).logits

    target = Policy() * Reward(logit, beta=1.0)
    sampler = ImageRejectionSampler(target, trainer.sampler, acceptance_rate=0.1, seed=seed)
    ours = ((sampler.sample(len(real)) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return ImageDataset(torch.cat([real.images, ours])), sampler.estimate().tv_upper


def compare(train: ImageDataset, steps: int, seed: int) -> Iterator[tuple[str, ImageGANTrainer, dict[str, float]]]:
    """The three arms, one after another, and what else is known of each."""
    yield "plain", play(train, 2 * steps, seed), {}
    half = play(train, steps, seed)
    both, tv = with_energy_samples(half, train, seed)
    for name, data, notes in (("restarted", train, {}), ("gdc", both, {"tv_upper": tv})):
        players = copy.deepcopy(half.sampler), copy.deepcopy(half.adversary.model)
        yield name, play(data, steps, seed + 1000, *players), notes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    train, test = (load_images("digits", split, 8) for split in ("train", "test"))
    classifier, accuracy = train_classifier(train, test, epochs=120)
    real = judge(classifier, test.pixel_values)
    floor = image_metrics(judge(classifier, train.pixel_values[: len(test)]), real)
    setting = {"steps": options.steps, "classifier": classifier.fingerprint(), "accuracy": accuracy}
    setting |= {"floor_fid": floor["fid"], "real_inception_score": inception_score(real.logps_BK)}
    known = json.loads(PLACE.read_text()) if PLACE.exists() else {}
    runs = known["runs"] if setting.items() <= known.items() else {}
    PLACE.parent.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        if str(seed) in runs:
            continue
        own = {}
        for name, trainer, notes in compare(train, options.steps, seed):
            own[name] = measured(trainer, classifier, real, seed) | notes
            print(f"seed {seed} {name:9}" + "".join(f"  {key} {own[name][key]:.3f}" for key in SHOWN), flush=True)
        runs[str(seed)] = own
        PLACE.write_text(json.dumps(setting | summary(runs)) + "\n")
    print(json.dumps(setting | summary(runs)))


def summary(runs: dict[str, dict[str, dict[str, float]]]) -> dict:
    """Means over seeds, and gdc's over those of the others."""
    average = {name: {key: mean(own[name][key] for own in runs.values()) for key in SHOWN} for name in ARMS}
    ratios = {
        f"gdc_over_{name}": {key: average["gdc"][key] / average[name][key] for key in SHOWN}
        for name in ("plain", "restarted")
    }
    return {"mean": average, **ratios, "runs": runs}


def measured(trainer: ImageGANTrainer, classifier, real, seed: int) -> dict[str, float]:
    images = trainer.sampler.sample(len(real.labels_B), generator=torch.Generator().manual_seed(seed))
    return image_metrics(judge(classifier, images), real)


if __name__ == "__main__":
    main()
