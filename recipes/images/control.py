"""Bring a trained generator to a constraint in two ways, and measure both: filter its samples, or train it further.

    python recipes/images/run.py --config recipes/images/config.yaml --class_condition false --output_dir outputs/images-plain
    python recipes/images/control.py --config recipes/images/control.yaml --run outputs/images-plain

`--run` is a folder of `run.py` with a generator that no constraint has touched, and that chooses the class itself: one that is
told the class has the shares that it is asked for. By default half of the images are to be threes.

- **filtered**: quasi-rejection sampling on that generator, within `--tv` of the target; other classes keep their shares.
- **trained**: the adversarial game goes on against real images that are weighted by the constraint, so that the discriminator
  sees p_data * exp(lambda phi); or with `--constrain generator` the log factor, a classifier's probability then, joins the log
  ratio and the generator follows its gradient.

Shares are the classifier's, of `--measured` fresh images; the real images' of the test half stand beside them.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hf_gdc import DCGANGenerator, ImageGANConfig, ImageGANTrainer, ImageRejectionSampler, Moment, Policy, load_images
from hf_gdc.checkpoints import claim_output_dir
from hf_gdc.cli import parse_options, resume_option
from hf_gdc.images.classifier import LeNet, judge, load_classifier
from hf_gdc.images.features import class_probability
from hf_gdc.images.grids import save_grid
from hf_gdc.metrics.images import class_shares


@dataclass
class ControlArguments:
    """The run to start from and the wanted share of one class."""

    run: str = field(
        default="outputs/images-plain", metadata={"help": "Folder of run.py: a generator and its classifier."}
    )
    data: str = field(default="digits", metadata={"help": "The data of that run."})
    label: int = field(default=3, metadata={"help": "The class."})
    share: float = field(default=0.5, metadata={"help": "Its wanted share."})
    tv: float = field(default=0.05, metadata={"help": "Bound of TV to the target that the filter keeps."})
    pool: int = field(default=20_000, metadata={"help": "Images of the generator on which the filter is fitted."})
    measured: int = field(default=10_000, metadata={"help": "Fresh images on which shares are measured."})


def describe(images: torch.Tensor, classifier: LeNet, label: int, base: torch.Tensor) -> dict[str, float | list[float]]:
    """The class's share; and the other classes' shares among themselves over those of `base`: the least and the most."""
    shares = class_shares(judge(classifier, images))
    rest = [n for n in range(len(shares)) if n != label]
    ratio = (shares[rest] / shares[rest].sum()) / (base[rest] / base[rest].sum())
    return {
        "share": float(shares[label]),
        "least": float(ratio.min()),
        "most": float(ratio.max()),
        "shares": shares.tolist(),
    }


def main(argv: list[str] | None = None) -> None:
    options, args = parse_options(ControlArguments, ImageGANConfig, argv=argv)
    run, output = Path(options.run), Path(args.output_dir)
    classifier = load_classifier(str(run / "classifier")).eval()
    generator = DCGANGenerator.from_pretrained(run / "model")
    if generator.config.num_classes:
        raise ValueError(
            f"the generator in {options.run} is told the class of each image, so its shares can't be trained: ask it for the "
            "labels that you want, or make one with run.py --class_condition false."
        )
    shape = generator.config.image_size, generator.config.num_channels
    train, test = (load_images(options.data, split, *shape) for split in ("train", "test"))
    if not resume_option(args):
        claim_output_dir(args.output_dir, args.overwrite)
    args.output_dir = str(output / "training")

    def classified(images: torch.Tensor, **_) -> torch.Tensor:
        """Whether the classifier's choice is the label, as shares count it: 0 or 1, without a gradient."""
        return (judge(classifier, images * 2 - 1).labels_B == options.label).double()

    # The generator needs the probability itself, for its gradient.
    trained_on = classified if args.constrain == "data" else class_probability(classifier, options.label)
    before = generator.sample(options.measured, generator=torch.Generator().manual_seed(1))
    own, real = class_shares(judge(classifier, before)), class_shares(judge(classifier, test.pixel_values))
    rows = {"before": describe(before, classifier, options.label, own)}

    target = Policy() * Moment(classified, options.share)
    sampler = ImageRejectionSampler(target, generator, tv=options.tv, pool_samples=options.pool)
    filtered = sampler.sample(options.measured)
    rows["filtered"] = describe(filtered, classifier, options.label, own)
    rows["filtered"] |= {"acceptance_rate": sampler.accepted / sampler.drawn, "tv_upper": sampler.estimate().tv_upper}

    trainer = ImageGANTrainer(
        generator,
        str(run / "model" / "discriminator"),
        args=args,
        train_dataset=train,
        eval_dataset=test,
        target=Policy() * Moment(trained_on, options.share),
    )
    trainer.train(resume_from_checkpoint=resume_option(args))
    trained = trainer.sampler.sample(options.measured, generator=torch.Generator().manual_seed(2))
    rows["trained"] = describe(trained, classifier, options.label, own)
    rows["trained, against the data"] = describe(trained, classifier, options.label, real)
    trainer.save_model(str(output / "model"))
    for name, images in (("before", before), ("filtered", filtered), ("trained", trained)):
        save_grid(images[:64], output / f"{name}.png")
    (output / "report.json").write_text(json.dumps({"formula": trainer.target.formula(), **rows}, indent=2) + "\n")
    print(f"\nwanted: {options.share:g} of class {options.label}; the other classes' proportions kept, 1 to 1")
    for name, row in rows.items():
        print(f"{name:28} share {row['share']:.3f}   others from {row['least']:.2f} to {row['most']:.2f}")
    print(f"filtered: {rows['filtered']['acceptance_rate']:.3f} accepted; saved {output}")


if __name__ == "__main__":
    main()
