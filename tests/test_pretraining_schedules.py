"""Pretraining's schedules, early stopping, streams, mixed precision and compilation."""

import json

import pytest
import torch
from test_pretraining import config, options, weights
from transformers import AutoModelForCausalLM

from hf_gdc import stories
from hf_gdc.trainers.pretraining import PretrainArguments, PretrainConfig, build_trainer, pretrain

STEPS = 20


def rates(tmp_path, **kwargs):
    """The learning rate of each step, of every group, over the peak."""
    args = config(tmp_path / "out", max_steps=STEPS, **kwargs)
    trainer = build_trainer(options(), args)
    before = args.lr_scheduler_kwargs
    trainer.create_optimizer_and_scheduler(STEPS)
    assert args.lr_scheduler_kwargs == before  # another schedule may follow, in a search
    found = []
    for _ in range(STEPS):
        assert len(set(trainer.lr_scheduler.get_last_lr())) == 1
        found.append(trainer.lr_scheduler.get_last_lr()[0] / args.learning_rate)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    return found


def test_constant_and_its_drops(tmp_path):
    assert rates(tmp_path, lr_scheduler_type="constant") == [1.0] * 20
    assert rates(tmp_path, lr_scheduler_type="constant", lr_drops=[0.5]) == pytest.approx([1.0] * 10 + [0.1] * 10)
    warm = rates(tmp_path, lr_scheduler_type="constant_with_warmup", warmup_steps=0.1, lr_drops=[0.75, 0.5])
    assert warm == pytest.approx([0.0, 0.5] + [1.0] * 8 + [0.1] * 5 + [0.01] * 5)


def test_cosine_and_linear(tmp_path):
    half_cosine = (1 + torch.cos(torch.pi * torch.arange(20) / 20)) / 2
    assert rates(tmp_path, lr_scheduler_type="cosine", warmup_steps=0) == pytest.approx(half_cosine.tolist(), abs=1e-6)
    linear = rates(tmp_path, lr_scheduler_type="linear", warmup_steps=0.2)
    assert linear == pytest.approx([i / 4 for i in range(4)] + [(20 - i) / 16 for i in range(4, 20)])


def test_warmup_stable_decay(tmp_path):
    kwargs = {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 2}
    shape = rates(tmp_path, **kwargs, decay_steps=0.4, lr_scheduler_kwargs={"decay_type": "linear"})
    assert shape == pytest.approx([0.0, 0.5] + [1.0] * 10 + [1 - i / 8 for i in range(8)])
    in_steps = rates(tmp_path, **kwargs, decay_steps=8, lr_scheduler_kwargs='{"decay_type": "linear"}')
    assert in_steps == pytest.approx(shape)


def test_a_schedule_with_drops_goes_on_exactly(tmp_path):
    kwargs = {"lr_scheduler_type": "constant", "lr_drops": [0.5], "max_steps": 4}
    pretrain(options(), config(tmp_path / "whole", save_steps=3, **kwargs))
    resumed = build_trainer(options(), config(tmp_path / "resumed", **kwargs))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "model")
    assert torch.equal(weights(resumed.model), weights(model))


def test_early_stopping_stops_where_the_loss_grows(tmp_path):
    """A learning rate that spoils the model: the first evaluation stays the best."""
    stop = {"early_stopping_patience": 2, "eval_strategy": "steps", "eval_steps": 1}
    args = config(tmp_path, max_steps=9, learning_rate=3.0, lr_scheduler_type="constant", muon=False, **stop)
    trainer = build_trainer(options(), args)
    trainer.train()
    losses = [row["eval_nll_per_token"] for row in trainer.state.log_history if "eval_nll_per_token" in row]
    best = losses.index(min(losses))
    assert len(losses) == trainer.state.global_step == best + 3 < 9
    assert trainer.state.best_metric == min(losses)


# ---- streams ----


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in stories.sample(60, 0)))
    return str(path)


STREAM = {"streaming": True, "validation_rows": 10, "tokenizer_rows": 50, "vocab_size": 300}


def test_a_stream_is_held_out_shuffled_and_tokenised_as_it_comes(tmp_path, rows):
    trainer = build_trainer(options(data=rows, max_length=200, **STREAM), config(tmp_path / "out"))
    texts = stories.sample(60, 0)
    tokenizer = trainer.processing_class

    def decoded(dataset):
        return [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in dataset]

    assert decoded(trainer.eval_dataset) == texts[:10]
    seen = decoded(trainer.train_dataset)
    assert sorted(seen) == sorted(texts[10:]) and seen != texts[10:]
    assert "eval_nll_per_text" in trainer.evaluate()


def test_resuming_a_stream_equals_not_stopping(tmp_path, rows):
    stream = options(data=rows, **STREAM)
    pretrain(stream, config(tmp_path / "whole", save_steps=3))
    resumed = build_trainer(stream, config(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "model")
    assert torch.equal(weights(resumed.model), weights(model))


def test_a_packed_stream_has_blocks(tmp_path, rows):
    trainer = build_trainer(options(data=rows, packing=True, max_length=32, **STREAM), config(tmp_path / "out"))
    assert {len(row["input_ids"]) for row in trainer.train_dataset} == {32}


# ---- faster arithmetic ----


def test_mixed_precision_computes_in_bfloat16_and_stays_near(tmp_path):
    losses, kinds = {}, set()
    for bf16 in (False, True):
        trainer = build_trainer(options(), config(tmp_path / str(bf16), bf16=bf16, max_steps=15))
        if bf16:
            layer = trainer.model.model.layers[0].mlp.up_proj
            layer.register_forward_hook(lambda *inputs: kinds.add(inputs[2].dtype))
        trainer.train()
        losses[bf16] = trainer.evaluate()["eval_nll_per_token"]
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert kinds == {torch.bfloat16}
    assert losses[True] == pytest.approx(losses[False], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled_training_is_the_same_training(tmp_path, backend):
    compiled = {"torch_compile": True, "torch_compile_backend": backend}
    models = []
    for kwargs in ({}, compiled):
        trainer = build_trainer(options(packing=True, max_length=32), config(tmp_path / str(len(models)), **kwargs))
        trainer.train()
        models.append(weights(trainer.accelerator.unwrap_model(trainer.model)))
    torch.testing.assert_close(models[1], models[0], atol=1e-3, rtol=0)
    assert (models[0] - models[1]).abs().mean() < 1e-4  # Adam divides by the size of gradients that are nearly zero


# ---- mistakes ----


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"early_stopping_patience": 2}, "early_stopping_patience needs evaluations"),
        (
            {"early_stopping_patience": 0, "eval_strategy": "epoch"},
            "early_stopping_patience must be 1 or more, but is 0",
        ),
        ({"lr_drops": [0.5]}, "lr_scheduler_type is 'linear': set it to one of 'constant'"),
        ({"lr_drops": [5.0], "lr_scheduler_type": "constant"}, r"between 0 and 1, but are \[5.0\]"),
        ({"decay_steps": 0}, "decay_steps must be above 0, but is 0"),
    ],
)
def test_mistakes_in_the_schedule(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        PretrainConfig(output_dir=str(tmp_path), **kwargs)


def test_mistakes_with_streams(tmp_path, rows):
    with pytest.raises(ValueError, match="a .txt file is read whole"):
        PretrainArguments(data="book.txt", streaming=True)
    with pytest.raises(ValueError, match="validation_rows must be 1 or more, but is 0"):
        options(data=rows, streaming=True, validation_rows=0)
    with pytest.raises(ValueError, match="set max_steps"):
        build_trainer(options(data=rows, streaming=True), config(tmp_path, max_steps=-1))
    with pytest.raises(ValueError, match="has but 60 rows, all held out: lower validation_rows"):
        build_trainer(options(data=rows, streaming=True, validation_rows=60), config(tmp_path))
