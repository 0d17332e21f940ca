"""Can a classifier tell samples from real texts? A fresh one is trained on some of each and judged on others.

Its accuracy is 1/2 where it can't, and (1 + TV)/2 at most, TV being the total variation between the two (Lopez-Paz & Oquab
2017, arXiv 1610.06545). It was trained on nothing that it judges and took no part in any game: one procedure for every model.

Left out: the discriminators that models are trained against (`adversarial`).
"""

import tempfile
from collections.abc import Sequence

import torch
from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, Trainer, TrainingArguments

from .adversarial.logit_networks import load_classifier
from .encoding import tokenize_rows

Pairs = Sequence[tuple[str, str]]  # prompt and completion


def two_sample_accuracy(
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    real: Pairs,
    sampled: Pairs,
    epochs: float = 3,
    learning_rate: float = 2e-3,
    max_length: int = 512,
    seed: int = 0,
) -> float:
    """Accuracy of a classifier on the second half of the pairs, trained on the first; both sides weigh the same.

    Args:
        model: what it starts from, a path or Hub id: a language model gets a new head.
        real, sampled: as many (prompt, completion) of each.

    Raises:
        ValueError: sides of different sizes, or of fewer than four pairs.
    """
    if len(real) != len(sampled) or len(real) < 4:
        raise ValueError(f"both sides need as many texts, and at least four, not {len(real)} and {len(sampled)}.")
    half = len(real) // 2
    parts = [(side[:half], side[half:]) for side in (real, sampled)]
    train, test = (_rows(*sides, tokenizer, max_length) for sides in zip(*parts, strict=True))
    torch.manual_seed(seed)
    classifier = load_classifier(model, dense=False)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=256,
            warmup_steps=0.1,
            adam_beta2=0.95,
            seed=seed,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = _Judge(classifier, args, DataCollatorWithPadding(tokenizer), train, processing_class=tokenizer)
        trainer.train()
        logits = torch.from_numpy(trainer.predict(test).predictions).flatten()
    right = torch.where(torch.tensor(test["labels"]) > 0, logits > 0, logits < 0)
    return float(right.double().mean())


class _Judge(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **_):
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            outputs.logits.squeeze(-1), inputs["labels"].float()
        )
        return (loss, outputs) if return_outputs else loss


def _rows(real: Pairs, sampled: Pairs, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Token ids with EOS, and 1.0 where the text is real."""
    pairs = [{"prompt": prompt, "completion": completion} for prompt, completion in (*real, *sampled)]
    rows = tokenize_rows(Dataset.from_list(pairs), tokenizer, max_length).select_columns("input_ids")
    return rows.add_column("labels", [1.0] * len(real) + [0.0] * len(sampled))
