# SPDX-License-Identifier: Apache-2.0
"""Ways of generating that must all give what greedy search by plain forward passes gives.

The cache, left padding, a static cache and exhaustive beam search are in `tests/test_models.py`.
"""

import shutil

import pytest
import torch
from test_models import POSITIONS, VOCAB, left_padded, make_ids, make_model
from transformers import TextStreamer

GREEDY = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("same_assistant", [True, False], ids=["accepts all", "accepts few"])
def test_assisted_generation_equals_greedy(position, same_assistant):
    model = make_model(position_embedding_type=position)
    assistant = make_model(0 if same_assistant else 1, position_embedding_type=position)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    ids = make_ids(1)
    expected = model.generate(ids, **GREEDY)
    plain = len(calls)
    assert torch.equal(model.generate(ids, **GREEDY, assistant_model=assistant), expected)
    assert plain == 10 and (len(calls) - plain < 10) == same_assistant  # a good assistant saves forward passes


def test_prompt_lookup_equals_greedy():
    model = make_model()
    ids = make_ids(1, 6).repeat(1, 3)  # a text that repeats itself, in which there is something to look up
    assert torch.equal(model.generate(ids, **GREEDY, prompt_lookup_num_tokens=3), model.generate(ids, **GREEDY))


@pytest.mark.parametrize("position", POSITIONS)
def test_beam_search_needs_no_cache_and_no_equal_lengths(position):
    model = make_model(position_embedding_type=position)
    rows, ids, mask = left_padded()
    settings = GREEDY | {"num_beams": 4, "num_return_sequences": 2}
    beams = model.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(model.generate(ids, attention_mask=mask, **settings, use_cache=False), beams)
    for i, row in enumerate(rows):
        alone = model.generate(row, **settings)
        assert torch.equal(beams[2 * i : 2 * i + 2, -10:], alone[:, -10:])


def test_samples_are_the_same_with_and_without_a_cache():
    model = make_model()
    _, ids, mask = left_padded()
    samples = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        settings = {"max_new_tokens": 10, "do_sample": True, "top_k": 0, "pad_token_id": 0, "use_cache": use_cache}
        samples.append(model.generate(ids, attention_mask=mask, num_return_sequences=4, **settings))
    assert torch.equal(*samples)
    assert len(samples[0][:, -10:].unique(dim=0)) > 6  # 12 rows: they differ from each other


def test_a_row_that_ended_is_padded_and_changes_nothing():
    """EOS is what the first row's greedy search says third; the others go on as without it."""
    model = make_model()
    ids = make_ids()
    free = model.generate(ids, **GREEDY)[:, -10:]
    eos = int(free[0, 2])
    ended = model.generate(ids, **GREEDY, eos_token_id=eos)[:, -10:]
    for row, expected in zip(ended, free, strict=True):
        stops = (expected == eos).nonzero()
        length = int(stops[0]) + 1 if len(stops) else len(row)
        assert torch.equal(row[:length], expected[:length]) and (row[length:] == 0).all()


def test_a_streamer_gets_every_token():
    seen = []

    class Keep(TextStreamer):
        def __init__(self):
            pass

        def put(self, value):
            seen.extend(value.flatten().tolist())

        def end(self):
            seen.append("end")

    model, ids = make_model(), make_ids(1)
    expected = model.generate(ids, **GREEDY)
    model.generate(ids, **GREEDY, streamer=Keep())
    assert seen == [*expected[0].tolist(), "end"]


@pytest.mark.parametrize(
    "options", [{}, {"norm_type": "layer", "hidden_act": "gelu", "position_embedding_type": "learned"}]
)
def test_the_forward_pass_is_one_graph(options):
    model, ids = make_model(**options), make_ids()
    compiled = torch.compile(model, fullgraph=True, backend="eager")  # the graph, without a C++ compiler
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids).logits)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_generation_equals_greedy():
    model = make_model(num_key_value_heads=2)
    _, ids, mask = left_padded()
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    model.forward = torch.compile(model.forward, fullgraph=True, dynamic=False)
    settings = GREEDY | {"cache_implementation": "static"}
    assert torch.equal(model.generate(ids, attention_mask=mask, **settings), expected)


def test_continued_generation_from_a_returned_cache():
    model, ids = make_model(), make_ids(2)
    whole = model.generate(ids, **GREEDY)
    first = model.generate(ids, **GREEDY | {"max_new_tokens": 4}, return_dict_in_generate=True)
    rest = model.generate(first.sequences, **GREEDY | {"max_new_tokens": 6}, past_key_values=first.past_key_values)
    assert torch.equal(rest, whole)
    assert whole.max() < VOCAB
