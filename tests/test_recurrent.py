# SPDX-License-Identifier: Apache-2.0
"""Small GPTs with a memory (a recurrent layer, shifted tokens): against their equations, and by every way of generating."""

import pytest
import torch
from test_generation import GREEDY
from test_models import LENGTH, gradients, left_padded, make_ids, make_model
from torch import nn
from transformers import DynamicCache, StaticCache

from hf_gdc.kv_cache import roomy_cache
from hf_gdc.models import SmallGPTConfig, SmallGPTForSequenceClassification

MEMORIES = {
    "gru": {"recurrent_type": "gru"},
    "lstm": {"recurrent_type": "lstm"},
    "shift": {"token_shift": True},
    "both": {"token_shift": True, "recurrent_type": "gru"},
}
every_memory = pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)


def by_equations(kind, rnn, features_BTW):
    """The papers' equations, gate by gate (for the GRU torch's variant, whose reset gate acts on W h), from zero states."""
    gates_in = rnn.weight_ih_l0.chunk(3 if kind == "gru" else 4)
    gates_hidden = rnn.weight_hh_l0.chunk(len(gates_in))
    h_BW = c_BW = torch.zeros_like(features_BTW[:, 0])
    said = []
    for x_BW in features_BTW.unbind(1):
        a = [x_BW @ w.T for w in gates_in]
        b = [h_BW @ w.T for w in gates_hidden]
        if kind == "gru":
            reset, update = (a[0] + b[0]).sigmoid(), (a[1] + b[1]).sigmoid()
            h_BW = (1 - update) * (a[2] + reset * b[2]).tanh() + update * h_BW
        else:
            entry, forget, out = ((a[i] + b[i]).sigmoid() for i in (0, 1, 3))
            c_BW = forget * c_BW + entry * (a[2] + b[2]).tanh()
            h_BW = out * c_BW.tanh()
        said.append(h_BW)
    return torch.stack(said, 1)


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_adds_the_recurrence_of_the_features(kind):
    model, plain = make_model(recurrent_type=kind), make_model()
    rest = plain.load_state_dict(model.state_dict(), strict=False)
    assert not rest.missing_keys  # without a recurrence nothing has changed, not even a name
    assert {name.removeprefix("model.recurrence.") for name in rest.unexpected_keys} == {
        "norm.weight",
        "rnn.weight_ih_l0",
        "rnn.weight_hh_l0",
    }
    ids, layer, seen = make_ids(), model.model.recurrence, []
    plain.model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    plain(ids)
    hidden_BTW = seen[0] + by_equations(kind, layer.rnn, layer.norm(seen[0]))
    torch.testing.assert_close(model(ids).logits, model.lm_head(model.model.norm(hidden_BTW)), atol=1e-5, rtol=1e-5)


@every_memory
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_cached_logits_equal_uncached(memory, static, layers):
    model, ids = make_model(**memory, num_hidden_layers=layers), make_ids()
    cache = StaticCache(model.config, max_cache_len=LENGTH) if static else DynamicCache(config=model.config)
    pieces = [model(piece, past_key_values=cache).logits for piece in ids.split([5, 1, 4, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids).logits, atol=1e-5, rtol=1e-5)
    cache.reset()
    torch.testing.assert_close(model(ids, past_key_values=cache).logits[:, :5], pieces[0], atol=1e-5, rtol=1e-5)


@every_memory
def test_left_padding_changes_nothing(memory):
    model = make_model(**memory)
    rows, ids, mask = left_padded()
    padded = model(ids, mask).logits
    generated = model.generate(ids, attention_mask=mask, **GREEDY)
    for i, row in enumerate(rows):
        length = row.shape[1]
        torch.testing.assert_close(padded[i, -length:], model(row).logits[0], atol=1e-5, rtol=1e-5)
        assert torch.equal(generated[i, -length - 10 :], model.generate(row, **GREEDY)[0])


@every_memory
@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 4, "num_return_sequences": 2}, {"do_sample": True, "top_k": 0}], ids=str
)
def test_generation_does_not_depend_on_the_cache(memory, settings):
    model = make_model(**memory)
    _, ids, mask = left_padded()
    found = []
    for cache in ({}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
        torch.manual_seed(0)
        found.append(model.generate(ids, attention_mask=mask, **GREEDY | settings | cache))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert roomy_cache(model, 30) is None  # the sampler's own cache knows no states, and stands aside


@every_memory
def test_generation_goes_on_from_a_returned_cache(memory):
    model, ids = make_model(**memory), make_ids(2)
    first = model.generate(ids, **GREEDY | {"max_new_tokens": 4}, return_dict_in_generate=True)
    rest = model.generate(first.sequences, **GREEDY | {"max_new_tokens": 6}, past_key_values=first.past_key_values)
    assert torch.equal(rest, model.generate(ids, **GREEDY))


@every_memory
def test_gradients_flow_through_the_cache(memory):
    """Two halves, the second from the first one's cache, have the gradient of the whole."""
    model, ids = make_model(**memory).double(), make_ids()
    whole = gradients(model, input_ids=ids, labels=ids, use_cache=False)
    model.zero_grad()
    cache = DynamicCache(config=model.config)
    halves = [model(half, past_key_values=cache).logits for half in ids.split([5, LENGTH - 5], dim=1)]
    nn.functional.cross_entropy(torch.cat(halves, 1)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    own = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(own, whole, atol=1e-6, rtol=1e-4)  # the model's own loss is in single precision


@every_memory
def test_classifies_left_and_right_padded_rows_alike(memory):
    model = make_model(**memory, model_class=SmallGPTForSequenceClassification)
    rows, ids, mask = left_padded()
    right = nn.utils.rnn.pad_sequence([row[0] for row in rows], batch_first=True)
    right_mask = nn.utils.rnn.pad_sequence([torch.ones_like(row[0]) for row in rows], batch_first=True)
    torch.testing.assert_close(model(ids, mask).logits, model(right, right_mask).logits, atol=1e-5, rtol=1e-5)


@every_memory
def test_half_precision_stays_near_single(memory):
    model, ids = make_model(initializer_range=0.05, **memory), make_ids()
    single = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(ids).logits
    assert (mixed.float() - single).abs().max() < 0.1 * single.std()
    assert (model.bfloat16()(ids).logits.float() - single).abs().max() < 0.1 * single.std()


@every_memory
def test_no_assistant(memory):
    with pytest.raises(ValueError, match="stateful"):
        make_model(**memory).generate(make_ids(1), **GREEDY, assistant_model=make_model())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recurrent_type": "gru", "is_causal": False}, "recurrent_type='gru' .*set is_causal=True"),
        ({"token_shift": True, "is_causal": False}, "token_shift=True .*set is_causal=True"),
        ({"recurrent_type": "rnn"}, "recurrent_type='rnn' .*None, 'gru', 'lstm'"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SmallGPTConfig(**options)


def test_a_shifted_model_reads_half_of_its_channels_from_the_token_before():
    """By hand: the layer's modules on inputs whose second halves are moved by one token."""
    model, ids = make_model(token_shift=True, num_hidden_layers=1), make_ids()
    layer, transformer = model.model.layers[0], model.model

    def shift(x_BTW):
        moved = x_BTW.clone()
        moved[:, 1:, 16:], moved[:, 0, 16:] = x_BTW[:, :-1, 16:], 0
        return moved

    seen = {}
    layer.self_attn.register_forward_pre_hook(lambda _, inputs: seen.update(attention=inputs[0]))
    layer.self_attn.register_forward_hook(lambda _, __, output: seen.update(mixed=output[0]))
    layer.mlp.register_forward_pre_hook(lambda _, inputs: seen.update(mlp=inputs[0]))
    logits = model(ids).logits
    embeds = transformer.embed_tokens(ids)
    torch.testing.assert_close(seen["attention"], shift(layer.input_layernorm(embeds)))
    hidden = embeds + seen["mixed"]
    torch.testing.assert_close(seen["mlp"], shift(layer.post_attention_layernorm(hidden)))
    hidden = hidden + layer.mlp(shift(layer.post_attention_layernorm(hidden)))
    torch.testing.assert_close(logits, model.lm_head(transformer.norm(hidden)))
    assert set(make_model(num_hidden_layers=1).state_dict()) == set(model.state_dict())  # no parameter more


def test_a_shifted_model_is_one_graph():
    model, ids = make_model(token_shift=True), make_ids()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids).logits)
