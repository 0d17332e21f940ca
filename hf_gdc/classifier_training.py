"""Training of the classifier behind the metrics of images, by transformers' Trainer.

Left out: the classifier (`image_classifier`).
"""

import tempfile

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from .images.augmentation import translate
from .images.classifier import LeNet, judge
from .images.data import ImageDataset


def train_classifier(
    train: ImageDataset, test: ImageDataset, epochs: float = 10, seed: int = 0, learning_rate: float = 2e-3
) -> tuple[LeNet, float]:
    """A classifier for these labels, trained on images that are shifted at random, and its accuracy on the test images.

    Raises:
        ValueError: images without labels.
    """
    if train.labels is None or test.labels is None:
        raise ValueError(
            "the classifier behind the metrics needs labels: sort the folder's images into one subfolder for each class, or "
            "pass the path of a classifier that is trained already."
        )
    torch.manual_seed(seed)
    classes = int(torch.cat([train.labels, test.labels]).max()) + 1
    classifier = LeNet(train.images.shape[-1], train.images.shape[1], classes)

    def collate(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return batch | {"pixel_values": translate(batch["pixel_values"])}

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            per_device_train_batch_size=64,
            lr_scheduler_type="linear",
            weight_decay=1e-3,
            seed=seed,
            remove_unused_columns=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
        )
        Trainer(classifier, args, collate, train).train()
    judged = judge(classifier.eval(), test.pixel_values)
    return classifier, float((judged.labels_B == test.labels).double().mean())
