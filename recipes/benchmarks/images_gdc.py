"""Does GDC improve a GAN of images? Adversarial distillation against more of the plain game, at equal budget, several seeds.

    python recipes/benchmarks/images_gdc.py --steps 1500 --seeds 0 1 2

- **plain**: the recipe's GAN for 2 * steps updates of the generator.
- **gdc**: the same GAN for `steps`; then its generator q and discriminator d define the target P_D(x) = q(x) exp(d(x)) / Z, the
  energy model of the unified objective. Samples of P_D (quasi-rejection sampling) join the real images, half and half, and the
  game goes on against both for `steps` more: D_f(P_G || P_D) and the data term together. Drawing the samples is not counted.

Both are judged by one classifier that neither has seen, on as many images as the test half has. The learning rate falls to
0 over each run, in two falls for gdc.
"""

import argparse
import json
import tempfile
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
from hf_gdc.metrics.images import image_metrics

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


def play(data: ImageDataset, steps: int, seed: int, generator=None, discriminator=None) -> ImageGANTrainer:
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        generator = DCGANGenerator(DCGANConfig(**SHAPE)) if generator is None else generator
        args = ImageGANConfig(output_dir=folder, max_steps=steps, seed=seed, **GAME)
        trainer = ImageGANTrainer(generator, discriminator, args=args, train_dataset=data)
        trainer.train()
    return trainer


def distil(trainer: ImageGANTrainer, real: ImageDataset, steps: int, seed: int) -> ImageGANTrainer:
    """The second half of gdc, from the players of the first."""
    critic = trainer.adversary.model.eval().requires_grad_(False)

    def logit(images: torch.Tensor, **_) -> torch.Tensor:
        return critic(images * 2 - 1).logits

    target = Policy() * Reward(logit, beta=1.0)
    sampler = ImageRejectionSampler(target, trainer.sampler, acceptance_rate=0.1, seed=seed)
    ours = ((sampler.sample(len(real)) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    critic.requires_grad_(True)
    both = ImageDataset(torch.cat([real.images, ours]))
    return play(both, steps, seed + 1000, trainer.sampler, critic)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    train, test = (load_images("digits", split, 8) for split in ("train", "test"))
    classifier, accuracy = train_classifier(train, test, epochs=60)
    real = judge(classifier, test.pixel_values)
    floor = image_metrics(judge(classifier, train.pixel_values[: len(test)]), real)
    rows: dict[str, list[dict]] = {"plain": [], "gdc": []}
    for seed in options.seeds:
        half = play(train, options.steps, seed)
        rows["gdc"].append(measured(distil(half, train, options.steps, seed), classifier, real, seed))
        rows["plain"].append(measured(play(train, 2 * options.steps, seed), classifier, real, seed))
        for name in rows:
            print(f"seed {seed} {name:6}" + "".join(f"  {key} {rows[name][-1][key]:.3f}" for key in SHOWN), flush=True)
    average = {name: {key: mean(row[key] for row in own) for key in SHOWN} for name, own in rows.items()}
    ratios = {key: average["gdc"][key] / average["plain"][key] for key in SHOWN}
    result = {
        "steps": options.steps,
        "seeds": options.seeds,
        "classifier": classifier.fingerprint(),
        "accuracy": accuracy,
    }
    result |= {"floor_fid": floor["fid"], "mean": average, "gdc_over_plain": ratios, "runs": rows}
    place = Path("outputs/benchmarks/images_gdc.json")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(result) + "\n")
    print(json.dumps(result))


def measured(trainer: ImageGANTrainer, classifier, real, seed: int) -> dict[str, float]:
    images = trainer.sampler.sample(len(real.labels_B), generator=torch.Generator().manual_seed(seed))
    return image_metrics(judge(classifier, images), real)


if __name__ == "__main__":
    main()
