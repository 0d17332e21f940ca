"""Sampling with the roomy cache is bit-equal to sampling with transformers' own."""

import pytest
import tiny
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from hf_gdc.kv_cache import RoomyLayer, roomy_cache
from hf_gdc.sampling import TransformersSampler

IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=3, n_embd=16, n_layer=2, n_head=2, n_positions=32, **IDS)).eval()


def mistral(window: int | None) -> MistralForCausalLM:
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return MistralForCausalLM(
        MistralConfig(vocab_size=3, num_key_value_heads=1, sliding_window=window, **size, **IDS)
    ).eval()


@pytest.mark.parametrize("make", [lambda: tiny.model(0, 0.5, torch.float32), gpt2, lambda: mistral(None)])
def test_the_same_samples(make):
    model, prompts = make(), ["", "a", "b a b"] * 20
    assert all(type(layer) is RoomyLayer for layer in roomy_cache(model, 8).layers)
    drawn = []
    for options in ({"cache_implementation": "dynamic"}, {}):
        torch.manual_seed(1)
        drawn.append(TransformersSampler(tiny.tokenizer(), 12, generation_kwargs=options)(model, prompts))
    assert torch.equal(drawn[0].completion_ids_BT, drawn[1].completion_ids_BT)
    assert torch.equal(drawn[0].policy_logp_B, drawn[1].policy_logp_B)


def test_other_layers_keep_their_own_cache():
    assert roomy_cache(mistral(window=4), 8) is None


def test_too_little_room_is_an_error():
    states = torch.zeros(1, 1, 3, 2)
    layer = RoomyLayer(5)
    layer.update(states, states)
    with pytest.raises(ValueError, match="room for 5 tokens, but 6"):
        layer.update(states, states)
