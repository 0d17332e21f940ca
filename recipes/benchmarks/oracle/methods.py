"""What the benchmark compares: maximum likelihood, adversarial training and the unified objective, by this library's trainers.

Each takes the generator's start and the training sequences, and gives the trained generator.

Left out: how they are judged (`frontier`). Shapes: B sequences, T words.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from discriminators import PairDiscriminator
from energies import ResidualEnergy, SampledEnergyTrainer, frozen, make_energy, pair_probabilities
from language import LENGTH, START, VOCABULARY, as_dataset, make_tokenizer
from lstm import LSTMConfig, LSTMForCausalLM
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from hf_gdc import Discriminator, GANConfig, GANTrainer, SmallGPTConfig, SmallGPTForCausalLM, UnifiedConfig

QUIET = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "overwrite": True}


def make_generator(kind: str, seed: int, vocab_size: int = VOCABULARY, dropout: float = 0.0) -> PreTrainedModel:
    """An untrained generator: "lstm" is SeqGAN's, "gpt" a small GPT with about as many parameters (without dropout)."""
    torch.manual_seed(seed)
    if kind == "lstm":
        return LSTMForCausalLM(LSTMConfig(vocab_size=vocab_size, dropout=dropout))
    config = SmallGPTConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH + 1,
        tie_word_embeddings=False,
        bos_token_id=START,
        eos_token_id=None,
        pad_token_id=None,
    )
    return SmallGPTForCausalLM(config)


def as_rows(words_BT: Tensor) -> list[dict[str, Tensor]]:
    """Rows for `Trainer`: the start word and the sequence."""
    ids = torch.cat([torch.full_like(words_BT[:, :1], START), words_BT], 1)
    return [{"input_ids": row, "labels": row} for row in ids]


def train_mle(
    model: PreTrainedModel,
    train_BT: Tensor,
    validation_BT: Tensor,
    folder: Path,
    seed: int,
    learning_rate: float = 0.01,
    epochs: int = 40,
    patience: int | None = 3,
) -> PreTrainedModel:
    """Maximum likelihood; with `patience`, until so many epochs were no better on the validation sequences: the best one."""
    args = TrainingArguments(
        output_dir=str(folder),
        seed=seed,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        per_device_train_batch_size=64,
        per_device_eval_batch_size=100,
        max_grad_norm=5.0,
        num_train_epochs=epochs,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=patience is not None,
        metric_for_best_model="eval_loss",
        prediction_loss_only=True,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=as_rows(train_BT),
        eval_dataset=as_rows(validation_BT),
        callbacks=[] if patience is None else [EarlyStoppingCallback(patience)],
    )
    trainer.train()
    return trainer.model


def train_gan(
    model: PreTrainedModel, train_BT: Tensor, folder: Path, seed: int, steps: int, **options
) -> PreTrainedModel:
    """Adversarial training from a generator that maximum likelihood made."""
    discriminator = PairDiscriminator(pair_probabilities(train_BT, model.config.vocab_size, discount=0.9))
    defaults = {
        "divergence": "reverse_kl",
        "per_device_train_batch_size": 128,
        "learning_rate": 4e-3,
        "lr_scheduler_type": "linear",
        "discriminator_learning_rate": 0.01,
        "discriminator_steps": 4,
        "discriminator_warmup_steps": 8,
        "max_grad_norm": 5.0,
    }
    args = GANConfig(
        output_dir=str(folder),
        seed=seed,
        max_steps=steps,
        num_generations=1,
        max_completion_length=LENGTH,
        per_device_eval_batch_size=512,
        save_strategy="no",
        **QUIET,
        **defaults | options,
    )
    trainer = GANTrainer(
        model,
        Discriminator(discriminator),
        args=args,
        train_dataset=as_dataset(train_BT),
        processing_class=make_tokenizer(model.config.vocab_size),
    )
    trainer.train()
    return trainer.model


def train_unified(
    model: PreTrainedModel, train_BT: Tensor, validation_BT: Tensor, folder: Path, seed: int, steps: int, **options
) -> PreTrainedModel:
    """The generator and an energy beside its start, each moved towards the other, the energy also towards the data."""
    defaults = {
        "per_device_train_batch_size": 64,
        "learning_rate": 6e-3,
        "lr_scheduler_type": "linear",
        "discriminator_learning_rate": 1e-5,
        "data_weight": 1.0,
        "max_grad_norm": 5.0,
    }
    args = UnifiedConfig(
        output_dir=str(folder),
        seed=seed,
        divergence="kl",
        max_steps=steps,
        num_generations=1,
        max_completion_length=LENGTH,
        per_device_eval_batch_size=512,
        save_strategy="no",
        **QUIET,
        **defaults | options,
    )
    energy = make_energy(frozen(model), train_BT, validation_BT)
    trainer = SampledEnergyTrainer(
        model,
        Discriminator(ResidualEnergy(energy)),
        args=args,
        train_dataset=as_dataset(train_BT),
        processing_class=make_tokenizer(model.config.vocab_size),
    )
    trainer.train()
    return trainer.model


def load_generator(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


# ---- the parts of the benchmark ----


@dataclass
class Method:
    """`train(benchmark, seed, folder)` gives the generator; it may load what the method `start` left for that seed."""

    train: Callable[..., PreTrainedModel]
    start: str | None = None


def _mle(benchmark, seed: int, folder: Path) -> PreTrainedModel:
    start = make_generator(benchmark.generator, seed)
    return train_mle(start, benchmark.train, benchmark.validation, folder / "run", seed)


def _mle_long(benchmark, seed: int, folder: Path) -> PreTrainedModel:
    """As SeqGAN's generator is pretrained: until NLL_oracle hardly falls any more, long after NLL_gen has begun to rise."""
    start = make_generator(benchmark.generator, seed)
    return train_mle(start, benchmark.sequences, benchmark.validation, folder / "run", seed, epochs=16, patience=None)


def _mle_dropout(benchmark, seed: int, folder: Path) -> PreTrainedModel:
    """The usual regulariser: dropout of 0.2 on embeddings and hidden states, stopped early."""
    start = make_generator(benchmark.generator, seed, dropout=0.2)
    return train_mle(start, benchmark.train, benchmark.validation, folder / "run", seed)


def _gan(benchmark, seed: int, folder: Path) -> PreTrainedModel:
    start = load_generator(benchmark.folder(seed, "mle_long") / "model")
    return train_gan(start, benchmark.sequences, folder / "run", seed, steps=208)


def _gan_early(benchmark, seed: int, folder: Path) -> PreTrainedModel:
    start = load_generator(benchmark.folder(seed, "mle") / "model")
    return train_gan(start, benchmark.sequences, folder / "run", seed, steps=208)


def _unified(benchmark, seed: int, folder: Path) -> PreTrainedModel:
    start = load_generator(benchmark.folder(seed, "mle") / "model")
    return train_unified(start, benchmark.train, benchmark.validation, folder / "run", seed, steps=80)


METHODS = {
    "mle": Method(_mle),
    "mle_long": Method(_mle_long),
    "mle_dropout": Method(_mle_dropout),
    "gan": Method(_gan, start="mle_long"),
    "gan_early": Method(_gan_early, start="mle"),
    "unified": Method(_unified, start="mle"),
}
