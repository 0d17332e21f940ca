"""A checkpoint of another architecture is refused, where transformers would warn and go on with random weights."""

import pytest
from builders import gpt2
from test_pretraining import TINY, config, options

from hf_gdc import SmallGPTConfig, SmallGPTForCausalLM
from hf_gdc.trainers.pretraining import build_trainer, pretrain


def test_weights_of_another_architecture(tmp_path):
    gpt2().save_pretrained(tmp_path)
    for load in (SmallGPTForCausalLM.from_pretrained, SmallGPTConfig.from_pretrained):
        with pytest.raises(ValueError, match="model_type='gpt2' is another architecture: load it with AutoModel"):
            load(tmp_path)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"model_type": "gpt2", "model_kwargs": {"n_embd": 16, "n_layer": 1, "n_head": 2}},
            "model_type='small_gpt'.*'gpt2'",
        ),
        ({"model_kwargs": TINY | {"num_hidden_layers": 2}}, "num_hidden_layers=1, and this one has 2"),
        ({"vocab_size": 300}, "vocab_size=[0-9]+, and this one has 300"),
    ],
    ids=["architecture", "layers", "vocabulary"],
)
def test_a_run_of_another_model_is_not_resumed(tmp_path, other, message):
    pretrain(options(), config(tmp_path / "run", max_steps=2, save_steps=1))
    trainer = build_trainer(options(**other), config(tmp_path / "other"))
    with pytest.raises(ValueError, match=f"can't resume from .*it is of a model with {message}"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
