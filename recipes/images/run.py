"""Train a DCGAN on images, judge it, and save it with a grid of samples, a table of metrics and a model card.

    accelerate launch recipes/images/run.py --config recipes/images/config.yaml

trains on scikit-learn's digits. Other images: MNIST as a file or a folder, any folder of images, a dataset of the Hub:

    accelerate launch recipes/images/run.py --config recipes/images/mnist.yaml --data path/to/mnist.pkl.gz

A target is spelt as for text, relative to the data; {classifier} stands for the classifier of this run:

    ... --moment 'image_class:{classifier}=3>0.5=0.5' --constrain data

Everything goes to OUTPUT_DIR: the generator and its discriminator to model/, the classifier behind the metrics to classifier/,
samples.png, report.json. Metrics compare with those of the same classifier (known by its hash) and number of images alone.
"""

import json
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import EvalPrediction

from hf_gdc import DCGANConfig, DCGANGenerator, ImageGANConfig, ImageGANTrainer, Policy, Target
from hf_gdc.checkpoints import claim_output_dir
from hf_gdc.classifier_training import train_classifier
from hf_gdc.cli import TargetArguments, further_factors, parse_options, resume_option
from hf_gdc.hub import write_model_card
from hf_gdc.images.classifier import Judged, LeNet, judge, load_classifier
from hf_gdc.images.data import ImageDataset, load_images
from hf_gdc.images.grids import save_grid
from hf_gdc.metrics.images import class_shares, image_metrics

COLUMNS = ("generated", "train (floor)", "test itself")


@dataclass
class ImageArguments:
    """What to learn from, what to build, and what judges it."""

    data: str = field(
        default="digits",
        metadata={"help": "digits, a file, a folder, or a dataset of the Hub (see hf_gdc.images.data)."},
    )
    image_size: int = field(default=8, metadata={"help": "Pixels a side: 4 * 2^n or 7 * 2^n, from 8 to 64."})
    num_channels: int = field(default=1, metadata={"help": "1 for grey, 3 for colour."})
    class_condition: bool = field(default=False, metadata={"help": "Condition both players on the labels."})
    model_kwargs: dict | str | None = field(
        default=None, metadata={"help": 'Of the DCGANConfig, a JSON object: {"hidden_size": 32, "dense_size": 512}.'}
    )
    generator: str | None = field(
        default=None, metadata={"help": "Go on from a saved generator, with its discriminator."}
    )
    classifier: str | None = field(
        default=None, metadata={"help": "A saved classifier, so that runs compare. Default: one is trained."}
    )
    classifier_epochs: float = field(default=60, metadata={"help": "Epochs of its training."})
    metric_samples: int = field(
        default=10_000, metadata={"help": "Images a side, at most; no more than the test half has."}
    )

    def __post_init__(self):
        if isinstance(self.model_kwargs, str):
            self.model_kwargs = json.loads(self.model_kwargs)


def place_classifier(options: ImageArguments, train: ImageDataset, test: ImageDataset, folder: str) -> None:
    """Train the judge, or take the given one, and save it with the run."""
    if options.classifier is not None:
        load_classifier(options.classifier).save_pretrained(folder)
        return
    classifier, accuracy = train_classifier(train, test, options.classifier_epochs)
    classifier.save_pretrained(folder)
    print(f"classifier {classifier.fingerprint()}: accuracy {accuracy:.3f} on the test half, saved {folder}")


class Judge:
    """Metrics against the test half, with the training half's beside them: the floor."""

    def __init__(self, classifier: LeNet, train: ImageDataset, test: ImageDataset, most: int):
        count = min(most, len(train), len(test))
        self.classifier, self.count = classifier, count
        self.test, self.train = (judge(classifier, part.pixel_values[:count]) for part in (test, train))
        self.floor = image_metrics(self.train, self.test)
        self.best = image_metrics(self.test, self.test)

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """As `compute_metrics`: of generated images, as many as of the test half."""
        return self.of(judge(self.classifier, torch.from_numpy(prediction.predictions)))

    def of(self, generated: Judged) -> dict[str, float]:
        metrics = image_metrics(generated, self.test)
        return metrics | {"fid_over_floor": metrics["fid"] / self.floor["fid"]}


def print_table(rows: dict[str, dict[str, float]], count: int, fingerprint: str) -> None:
    names = list(rows[COLUMNS[0]])
    print(f"\n{count:,} images a side, classifier {fingerprint}")
    print(f"{'':18}" + "".join(f"{column:>16}" for column in rows))
    for name in names:
        print(f"{name:18}" + "".join(f"{row[name]:16.4g}" if name in row else f"{'':>16}" for row in rows.values()))


def build_generator(options: ImageArguments, train: ImageDataset) -> DCGANGenerator:
    if options.generator is not None:
        return DCGANGenerator.from_pretrained(options.generator)
    classes = 0
    if options.class_condition:
        if train.labels is None:
            raise ValueError(
                f"class_condition needs labels, and {options.data!r} has none: one subfolder for each class."
            )
        classes = int(train.labels.max()) + 1
    shape = {"image_size": options.image_size, "num_channels": options.num_channels, "num_classes": classes}
    return DCGANGenerator(DCGANConfig(**(shape | (options.model_kwargs or {}))))


def main(argv: list[str] | None = None) -> None:
    start = time.time()
    options, factors, args = parse_options(ImageArguments, TargetArguments, ImageGANConfig, argv=argv)
    train, test = (
        load_images(options.data, split, options.image_size, options.num_channels) for split in ("train", "test")
    )
    torch.manual_seed(args.seed)
    generator = build_generator(options, train)
    output, process = Path(args.output_dir), PartialState()
    place = str(output / "classifier")
    if process.is_main_process and not resume_option(args):
        claim_output_dir(args.output_dir, args.overwrite)
        place_classifier(options, train, test, place)
    process.wait_for_everyone()
    args.output_dir = str(output / "training")
    compute_metrics = Judge(LeNet.from_pretrained(place).eval(), train, test, options.metric_samples)
    args.eval_samples = compute_metrics.count
    for name in ("pointwise", "moment", "reward"):
        specs = getattr(factors, name)
        setattr(factors, name, specs and [spec.replace("{classifier}", place) for spec in specs])
    further = further_factors(factors)
    target = None if further is None else Policy() * further
    trainer = ImageGANTrainer(
        generator,
        None if options.generator is None else f"{options.generator}/discriminator",
        args=args,
        train_dataset=train,
        eval_dataset=test,
        target=target,
        compute_metrics=compute_metrics,
    )
    trainer.train(resume_from_checkpoint=resume_option(args))
    trainer.evaluate()
    trainer.save_model(str(output / "model"))
    if trainer.is_world_process_zero():
        command = shlex.join(
            ["accelerate", "launch", "recipes/images/run.py", *(sys.argv[1:] if argv is None else argv)]
        )
        report(trainer, compute_metrics, target, options.data, command, output, time.time() - start)


def grid_images(generator: DCGANGenerator, count: int = 100) -> torch.Tensor:
    """Fresh images for a picture: the classes line by line where the generator takes them."""
    classes, labels = generator.config.num_classes, None
    if classes:
        labels = (torch.arange(count) // round(count**0.5) % classes).to(generator.device)
    return generator.sample(count, labels, torch.Generator().manual_seed(0))


def report(
    trainer, judged: Judge, target: Target | None, data: str, command: str, output: Path, seconds: float
) -> None:
    """The table, the grid, report.json and the model card."""
    fresh = torch.Generator().manual_seed(trainer.args.seed + 1)
    images = trainer.sampler.sample(judged.count, generator=fresh)
    own = judge(judged.classifier, images)
    rows = dict(zip(COLUMNS, (judged.of(own), judged.floor, judged.best), strict=True))
    fingerprint = judged.classifier.fingerprint()
    print_table(rows, judged.count, fingerprint)
    shares = {name: class_shares(part).tolist() for name, part in (("generated", own), ("test", judged.test))}
    for name, values in shares.items():
        print(f"share of classes, {name:10}" + " ".join(f"{value:.3f}" for value in values))
    picture = grid_images(trainer.sampler)
    for folder in (output, output / "model"):
        save_grid(picture, folder / "samples.png")
    numbers = {
        "images": judged.count,
        "classifier": fingerprint,
        "metrics": rows,
        "class_shares": shares,
        "seconds": seconds,
    }
    (output / "report.json").write_text(json.dumps(numbers, indent=2) + "\n")
    results = {f"{name}, {column}": row[name] for column, row in rows.items() for name in row}
    write_model_card(
        output / "model",
        title=f"DCGAN on {Path(data).name}",
        formula="P(x) = q(x)" if target is None else target.formula(),
        command=command,
        results={f"images a side, classifier {fingerprint}": judged.count, **results},
        data=data,
        template="image_model_card.md",
    )
    print(f"{seconds:.0f} seconds; saved {output / 'model'}, {output / 'samples.png'} and {output / 'report.json'}")


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()
