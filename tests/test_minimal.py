"""The one-page algorithm and the library have the same losses, step by step, on the same completions."""

import importlib.util
from pathlib import Path

import pytest
import tiny
import torch
from transformers import TrainerCallback

RECIPE = Path(__file__).parents[1] / "recipes" / "minimal_gdc.py"


def test_minimal_gdc_has_the_library_s_losses(tmp_path):
    spec = importlib.util.spec_from_file_location("minimal_gdc", RECIPE)
    minimal = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(minimal)
    trainer = tiny.trainer(
        tiny.HARD["pointwise"](),
        tmp_path,
        tiny.model(0),
        max_steps=6,
        per_device_train_batch_size=64,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        fit_samples=0,
        logging_steps=1,
    )
    drawn, plain = [], trainer.actors.sample_policy

    def sample_policy(rows):
        drawn.append(plain(rows))
        return drawn[-1]

    trainer.actors.sample_policy = sample_policy
    losses = []

    class Losses(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            losses.extend([logs["loss"]] if "loss" in logs else [])

    trainer.add_callback(Losses())
    trainer.train()
    batches = iter(drawn)

    def draw(policy):
        batch = next(batches)
        return batch.completion_ids_BT, batch.completion_mask_BT

    def satisfied(ids, mask):
        return torch.tensor([bool(((row == 2) & keep).any()) for row, keep in zip(ids, mask, strict=True)])

    ours = minimal.train(tiny.model(0), 0, draw, satisfied, steps=6, learning_rate=1e-2)
    assert len(losses) == 6
    assert ours == pytest.approx(losses, rel=1e-4)
    assert abs(ours[0] - ours[-1]) > 0.01  # the policy did move
