"""Only a part of the parameters moves: the rest is bit-equal, the cycle visits all, and a resumed run goes on exactly."""

import pytest
import tiny
import torch
from builders import gpt2, small_gpt
from peft import LoraConfig, get_peft_model

from hf_gdc.incremental import ParameterBlocks, train_only

ADAMW = {"per_device_train_batch_size": 16, "learning_rate": 1e-2, "weight_decay": 0.1, "lr_scheduler_type": "constant"}


def deep(layers=3):
    """A tiny model of several layers."""
    torch.manual_seed(0)
    config = tiny.model(0).config
    config.num_hidden_layers = layers
    return type(tiny.model(0))(config)


def watched(trainer):
    """Names of the parameters that each optimizer step changed."""
    changed, plain = [], trainer.training_step
    before = {}

    def step(*args, **kwargs):
        if before and trainer.state.global_step > len(changed):
            changed.append({n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])})
        before.update({n: p.detach().clone() for n, p in trainer.model.named_parameters()})
        return plain(*args, **kwargs)

    trainer.training_step = step
    trainer.train()
    changed.append({n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])})
    return changed


def test_named_modules_move_and_the_rest_is_bit_equal(tmp_path):
    lm = deep()
    start = {name: p.detach().clone() for name, p in lm.named_parameters()}
    options = ADAMW | {"max_steps": 3, "trainable_modules": [r"layers\.1\.", "lm_head"]}
    trainer = tiny.trainer(tiny.SOFT["reward"](), tmp_path, lm, **options)
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, start[name])}
    assert moved == {name for name in start if "layers.1." in name or "lm_head" in name}
    assert len(trainer.optimizer.state) == len(moved)  # and no memory for what rests


def test_the_cycle_moves_one_block_at_a_time_and_visits_all(tmp_path):
    """With momentum and weight decay, which must not move a block at rest."""
    options = ADAMW | {"max_steps": 8, "cycle_blocks": 3, "cycle_steps": 2, "gradient_accumulation_steps": 2}
    trainer = tiny.trainer(tiny.SOFT["reward"](), tmp_path, deep(), **options)
    changed = watched(trainer)
    names = {name for name, _ in trainer.model.named_parameters()}
    first = {name for name in names if "layers.0." in name or "embed_tokens" in name}
    second = {name for name in names if "layers.1." in name}
    last = names - first - second
    assert changed == [first, first, second, second, last, last, first, first]


def test_a_block_takes_the_step_that_it_would_take_alone(tmp_path):
    """Gradients of the others are gone before clipping: equal to a model where only that block is trainable."""
    ends = []
    for name, how in {"cycle": {"cycle_blocks": 3}, "alone": {"trainable_modules": [r"layers\.0\.|embed"]}}.items():
        options = ADAMW | {"max_steps": 2, "cycle_steps": 5, "max_grad_norm": 0.01} | how
        trainer = tiny.trainer(tiny.SOFT["reward"](), tmp_path / name, deep().double(), **options)
        given = trainer.actors.draw([{"prompt": ""}] * 16, from_reference=True, salt=5)
        trainer.actors.sample_policy = lambda rows, given=given: given
        trainer.train()
        ends.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-12)


def test_a_resumed_cycle_goes_on_exactly(tmp_path):
    options = ADAMW | {"max_steps": 7, "cycle_blocks": 2, "cycle_steps": 2, "save_strategy": "steps", "save_steps": 3}
    whole = tiny.trainer(tiny.SOFT["reward"](), tmp_path, deep(), **options)
    whole.train()
    again = tiny.trainer(tiny.SOFT["reward"](), tmp_path, deep(), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for first, second in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("make", [small_gpt, gpt2])
def test_every_parameter_is_in_one_block(make):
    lm = make()
    blocks = ParameterBlocks(lm, 2, 5)
    assert set(blocks.block_of) == {name for name, _ in lm.named_parameters()} and set(blocks.block_of.values()) == {
        0,
        1,
    }
    assert [blocks.current(step) for step in (0, 4, 5, 9, 10, 15)] == [0, 0, 1, 1, 0, 1]


def test_an_adapter_cycles_and_its_base_stays_frozen():
    lm = get_peft_model(small_gpt(), LoraConfig(target_modules=["q_proj", "v_proj"]))
    train_only(lm, [".*"])
    trainable = {name for name, p in lm.named_parameters() if p.requires_grad}
    assert trainable and all("lora" in name for name in trainable)
    blocks = ParameterBlocks(lm, 2, 1).block_of
    assert set(blocks) == trainable and sum(blocks.values()) == len(trainable) / 2


def test_parameters_that_a_wrapper_merged():
    blocks = ParameterBlocks(small_gpt(), 2, 1)
    with pytest.raises(
        ValueError, match="'weight' is no parameter of the model as it was loaded: FSDP needs version 2"
    ):
        blocks.drop_gradients(torch.nn.Linear(2, 2), 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"trainable_modules": ["layers.9"]},
            "'layers.9' matches no trainable parameter; there are such as model.embed",
        ),
        ({"trainable_modules": ["("]}, r"'\(' is no regular expression"),
        ({"cycle_blocks": 4}, "cycle_blocks=4, but the model has trainable parameters in 3 layers"),
        ({"cycle_blocks": -1}, "cycle_blocks can't be negative, but is -1"),
        ({"cycle_steps": 0}, "cycle_steps must be at least 1, but is 0"),
    ],
)
def test_mistakes(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tiny.trainer(tiny.SOFT["reward"](), tmp_path, deep(), **options)
