# SPDX-License-Identifier: Apache-2.0
"""The small GPT against Llama, against itself by another route, and after a trip to the Hub.

Left out: transformers' own model tests, which take minutes. Every test is offline and takes a second or two.
"""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from hf_gdc.models import SmallGPTConfig, SmallGPTForCausalLM, SmallGPTModel, register

POSITIONS = ("rotary", "learned", "sinusoidal")
VOCAB, LENGTH = 61, 12


def make_model(seed=0, model_class=SmallGPTForCausalLM, **options):
    """A tiny model in eval mode, with weights large enough that every part of it shows in the logits."""
    shape = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 32}
    config = SmallGPTConfig(**(shape | {"initializer_range": 0.2} | options))
    torch.manual_seed(seed)
    return model_class(config).eval()


def make_ids(batch=3, length=LENGTH, seed=1):
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def gradients(model, **inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def left_padded(lengths=(5, 12, 8)):
    """Rows of different lengths as (unpadded rows, padded ids, mask)."""
    rows = [make_ids(1, length, seed=length) for length in lengths]
    pad = [max(lengths) - length for length in lengths]
    ids = torch.cat([torch.nn.functional.pad(row, (n, 0)) for row, n in zip(rows, pad, strict=True)])
    mask = torch.tensor([[0] * n + [1] * (max(lengths) - n) for n in pad])
    return rows, ids, mask


# --- the function it computes


@pytest.mark.parametrize("key_value_heads", [4, 2])
def test_equals_llama_with_the_same_weights(key_value_heads):
    model = make_model(num_key_value_heads=key_value_heads, rope_theta=500.0, tie_word_embeddings=False)
    config = model.config
    llama_config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=key_value_heads,
        rms_norm_eps=config.norm_eps,
        rope_theta=config.rope_theta,
    )
    llama = LlamaForCausalLM(llama_config).eval()
    llama.load_state_dict(model.state_dict())  # strict: the names are the same, none is left over
    ids = make_ids()
    ours, theirs = model(ids, labels=ids), llama(ids, labels=ids)
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.loss, theirs.loss)
    our_gradients = gradients(model, input_ids=ids, labels=ids)
    their_gradients = gradients(llama, input_ids=ids, labels=ids)
    torch.testing.assert_close(our_gradients, their_gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("position", POSITIONS)
def test_is_causal_and_sees_the_past(position):
    model = make_model(position_embedding_type=position)
    ids = make_ids()
    changed = ids.clone()
    changed[:, 6] = (changed[:, 6] + 1) % VOCAB
    before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(before[:, :6], after[:, :6], atol=1e-6, rtol=0)
    assert ((before - after)[:, 6:].abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize("position", POSITIONS)
def test_order_matters_only_through_positions(position):
    """With one position for all tokens the last logits don't depend on the past's order; by default they do.

    One layer, because a second one sees the order through the first one's causal mask.
    """
    model = make_model(position_embedding_type=position, num_hidden_layers=1)
    ids = make_ids()
    swapped = ids[:, [1, 0, *range(2, LENGTH)]]
    same_place = torch.zeros_like(ids)
    mask = torch.ones_like(ids)  # says that the equal positions don't mean sequences packed into one row
    torch.testing.assert_close(
        model(ids, mask, same_place).logits[:, -1],
        model(swapped, mask, same_place).logits[:, -1],
        atol=1e-5,
        rtol=0,
    )
    assert (model(ids).logits - model(swapped).logits)[:, -1].abs().max() > 1e-3


def test_sinusoids_are_those_of_the_paper():
    """PE(pos, 2i) = sin(pos / 10000^(2i/d)), PE(pos, 2i+1) = cos of it; here all sines come first."""
    model = make_model(position_embedding_type="sinusoidal", model_class=SmallGPTModel)
    embeds = torch.randn(1, 4, 32)
    hidden, _ = model._add_positions(embeds, torch.arange(4)[None])
    angles = [[pos / 10000 ** (2 * i / 32) for i in range(16)] for pos in range(4)]
    expected = torch.cat((torch.tensor(angles).sin(), torch.tensor(angles).cos()), dim=-1)
    torch.testing.assert_close(hidden[0], embeds[0] * 32**0.5 + expected)


@pytest.mark.parametrize("options", [{"norm_type": "layer"}, {"hidden_act": "gelu"}, {"num_key_value_heads": 1}])
def test_sdpa_equals_eager(options):
    model = make_model(**options)
    _, ids, mask = left_padded()
    fast = model(ids, mask).logits
    model.set_attn_implementation("eager")
    slow = model(ids, mask, output_attentions=True)
    torch.testing.assert_close(fast[mask == 1], slow.logits[mask == 1], atol=1e-5, rtol=1e-5)
    weights = slow.attentions[0]
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert weights[0, :, -1, :7].abs().max() == 0  # row 0 has 7 tokens of padding


def test_grouped_key_value_heads_equal_repeated_ones():
    grouped = make_model(num_key_value_heads=2)
    full = make_model()
    state = grouped.state_dict()
    for name, weight in state.items():
        if "k_proj" in name or "v_proj" in name:
            state[name] = weight.view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32)
    full.load_state_dict(state)
    ids = make_ids()
    torch.testing.assert_close(grouped(ids).logits, full(ids).logits, atol=1e-5, rtol=1e-5)


def test_labels_give_the_shifted_cross_entropy():
    model, ids = make_model(), make_ids()
    labels = ids.clone()
    labels[:, :4] = -100
    output = model(ids, labels=labels)
    logps = output.logits.log_softmax(-1)[:, 3:-1].gather(-1, ids[:, 4:, None])
    torch.testing.assert_close(output.loss, -logps.mean())


def test_logits_to_keep_and_inputs_embeds():
    model, ids = make_model(), make_ids()
    whole = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, whole[:, -3:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, whole[:, [0, 5]])
    torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, whole)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


def test_packed_rows_equal_separate_ones():
    model, (a, b) = make_model(), (make_ids(1, 5), make_ids(1, 7, seed=2))
    positions = torch.cat((torch.arange(5), torch.arange(7)))[None]
    packed = model(torch.cat((a, b), dim=1), position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed[:, :5], model(a).logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed[:, 5:], model(b).logits, atol=1e-5, rtol=1e-5)


def test_double_precision_refines_single():
    model, ids = make_model(), make_ids()
    single = model(ids).logits
    model.double()
    sdpa = model(ids).logits
    torch.testing.assert_close(sdpa.float(), single, atol=1e-5, rtol=1e-5)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids).logits, sdpa, atol=1e-12, rtol=1e-12)


def test_bfloat16_and_autocast_stay_near_single():
    model, ids = make_model(initializer_range=0.05), make_ids()
    single = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(ids).logits
    half = model.bfloat16()(ids).logits
    scale = single.std()
    assert (mixed.float() - single).abs().max() < 0.05 * scale
    assert (half.float() - single).abs().max() < 0.1 * scale


# --- caches, padding and generation


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("static", [False, True])
def test_cached_logits_equal_uncached(position, static):
    model, ids = make_model(position_embedding_type=position), make_ids()
    cache = StaticCache(model.config, max_cache_len=LENGTH) if static else DynamicCache(config=model.config)
    pieces = [model(piece, past_key_values=cache).logits for piece in ids.split([5, 1, 4, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("position", POSITIONS)
def test_left_padding_changes_nothing(position):
    model = make_model(position_embedding_type=position)
    rows, ids, mask = left_padded()
    padded = model(ids, mask).logits
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    prefix = model(ids[:, :-2], mask[:, :-2])
    continued = model(ids[:, -2:], mask, past_key_values=prefix.past_key_values).logits
    torch.testing.assert_close(continued, padded[:, -2:], atol=1e-5, rtol=1e-5)
    for i, row in enumerate(rows):
        length = row.shape[1]
        torch.testing.assert_close(padded[i, -length:], model(row).logits[0], atol=1e-5, rtol=1e-5)
        alone = model.generate(row, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert torch.equal(generated[i, -length - 6 :], alone[0])


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}])
def test_generation_does_not_depend_on_the_cache(options):
    model = make_model(num_key_value_heads=2)
    _, ids, mask = left_padded()
    settings = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    dynamic = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, **settings, **options, disable_compile=True), dynamic)
    for t in range(LENGTH, LENGTH + 10):  # and it is the argmax of plain forward passes
        full_mask = torch.nn.functional.pad(mask, (0, t - LENGTH), value=1)
        assert torch.equal(model(dynamic[:, :t], full_mask).logits[:, -1].argmax(-1), dynamic[:, t])


def test_beam_search_over_all_beams_finds_the_best_completion():
    """With a beam for every prefix, two tokens' beam search is exhaustive search."""
    model = make_model(vocab_size=7)
    prompt = torch.tensor([[1, 2, 3]])
    beams = model.generate(prompt, num_beams=7, max_new_tokens=2, do_sample=False, pad_token_id=0, length_penalty=0.0)
    pairs = torch.cartesian_prod(torch.arange(7), torch.arange(7))
    logps = model(torch.cat((prompt.expand(49, -1), pairs), dim=1)).logits.log_softmax(-1)[:, 2:4]
    best = logps.gather(-1, pairs[..., None]).sum((1, 2)).argmax()
    assert torch.equal(beams[0, 3:], pairs[best])


# --- training


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing_enable")  # the new name is younger than 5.20
def test_gradient_checkpointing_gives_the_same_gradients():
    model, ids = make_model(attention_dropout=0.3, residual_dropout=0.3, embedding_dropout=0.3), make_ids()
    model.train()

    def seeded_gradients():
        torch.manual_seed(0)
        return gradients(model, input_ids=ids, labels=ids)

    plain = seeded_gradients()
    model.gradient_checkpointing_enable()
    calls = []
    hook = model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(seeded_gradients(), plain)
    hook.remove()
    assert len(calls) == 2  # once in the forward pass, once more in the backward pass


@pytest.mark.parametrize("name", ["attention_dropout", "residual_dropout", "embedding_dropout"])
def test_dropout_acts_in_training_alone(name):
    model, ids = make_model(**{name: 0.5}), make_ids()
    torch.testing.assert_close(model(ids).logits, make_model()(ids).logits)
    model.train()
    assert not torch.allclose(model(ids).logits, model(ids).logits)
    for module in model.modules():  # as TRL disables dropout
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.testing.assert_close(model(ids).logits, make_model()(ids).logits)


def test_initial_weights_have_their_scale():
    model = make_model(hidden_size=256, num_hidden_layers=3, initializer_range=0.02, norm_type="layer")
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight") or name.endswith("norm.bias"):
            assert (parameter == float(name.endswith("weight"))).all()
            continue
        std = 0.02 / 6**0.5 if re.search("o_proj|down_proj", name) else 0.02
        # The standard error of a standard deviation is std / sqrt(2n); five of them.
        assert abs(parameter.std().item() - std) < 5 * std / (2 * parameter.numel()) ** 0.5, name


# --- saving, loading and the Hub


def test_weights_stay_tied(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = SmallGPTForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    untied = make_model(tie_word_embeddings=False)
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    assert untied.num_parameters() == model.num_parameters() + VOCAB * 32


def test_auto_classes_build_it_after_register(tmp_path):
    register()
    register()  # twice is no error
    model, ids = make_model(position_embedding_type="learned"), make_ids()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is SmallGPTForCausalLM
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert type(AutoModelForCausalLM.from_config(model.config)) is SmallGPTForCausalLM


REMOTE = """
import sys, torch
from transformers import AutoModel, AutoModelForCausalLM
sys.modules["hf_gdc"] = None  # even where it is installed, importing it fails
try:
    import hf_gdc
except ImportError:
    pass
else:
    raise SystemExit("hf_gdc was imported: the test would show nothing")
for path in sys.argv[1:]:
    expected = torch.load(path + "/expected.pt")
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    torch.testing.assert_close(model(expected["ids"]).logits, expected["logits"])
    generated = model.generate(expected["ids"], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(generated, expected["generated"])
    model.save_pretrained(path + "/again")  # remote code saves itself with its code
    for place in (path, path + "/again"):
        base = AutoModel.from_pretrained(place, trust_remote_code=True)
        assert type(base).__name__ == "SmallGPTModel"
        torch.testing.assert_close(base(expected["ids"]).last_hidden_state, expected["hidden"])
"""


def test_loads_as_remote_code_without_the_library(tmp_path):
    kinds = {
        "rotary": {},
        "learned": {"position_embedding_type": "learned"},
        "memory": {"recurrent_type": "gru", "token_shift": True},
    }
    for name, options in kinds.items():
        path = tmp_path / name
        model, ids = make_model(**options), make_ids()
        model.save_pretrained(path)
        expected = {"ids": ids, "logits": model(ids).logits, "hidden": model.model(ids).last_hidden_state}
        expected["generated"] = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        torch.save({key: value.detach() for key, value in expected.items()}, path / "expected.pt")
        auto_map = json.loads((path / "config.json").read_text())["auto_map"]
        assert auto_map["AutoConfig"] == "configuration_small_gpt.SmallGPTConfig"
        assert auto_map["AutoModel"] == "modeling_small_gpt.SmallGPTModel"
        assert auto_map["AutoModelForCausalLM"] == "modeling_small_gpt.SmallGPTForCausalLM"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    subprocess.run(
        [sys.executable, "-c", REMOTE, *(str(tmp_path / name) for name in kinds)],
        cwd=tmp_path,
        env=environment,
        check=True,
    )


# --- the configuration


def test_defaults():
    config = SmallGPTConfig()
    model = SmallGPTForCausalLM(config)
    beyond_embedding = model.num_parameters() - config.vocab_size * config.hidden_size
    # 4 layers of 4 x 128 x 128 for attention, 3 x 128 x 352 for the MLP and 2 norms; 1 norm at the end.
    assert beyond_embedding == 4 * (4 * 128 * 128 + 3 * 128 * 352 + 2 * 128) + 128 == 803_968
    assert SmallGPTConfig(hidden_act="gelu").intermediate_size == 512
    assert SmallGPTConfig(hidden_size=48, num_attention_heads=3).intermediate_size == 128


def test_config_survives_saving(tmp_path):
    options = {"num_key_value_heads": 2, "norm_type": "layer", "rope_theta": 300.0, "attention_dropout": 0.1}
    config = SmallGPTConfig(**options, bos_token_id=1, eos_token_id=[2, 3])
    config.save_pretrained(tmp_path)
    assert SmallGPTConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert config.rope_theta == 300.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 130}, "hidden_size=130 .*multiple of num_attention_heads=4"),
        ({"hidden_size": 36}, "hidden_size=36 .*multiple of 8"),
        ({"hidden_size": -128}, "hidden_size=-128 .*1 or more"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 .*1 or more"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 .*1 or more"),
        ({"intermediate_size": 0}, "intermediate_size=0 .*1 or more"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 .*divisor of num_attention_heads=4"),
        ({"position_embedding_type": "alibi"}, "'alibi' .*'rotary', 'learned', 'sinusoidal'"),
        ({"norm_type": "batch"}, "norm_type='batch' .*'rms', 'layer'"),
        ({"hidden_act": "relu"}, "hidden_act='relu' .*'swiglu', 'gelu'"),
        ({"residual_dropout": 1.0}, "residual_dropout=1.0 .*below 1"),
        ({"norm_eps": 0.0}, "norm_eps=0.0 .*above 0"),
        ({"rope_theta": -1.0}, "rope_theta=-1.0 .*above 0"),
        (
            {"hidden_size": 15, "num_attention_heads": 3, "position_embedding_type": "sinusoidal"},
            "hidden_size=15 .*even",
        ),
    ],
)
def test_bad_config_is_refused_with_the_fix(options, message):
    with pytest.raises(ValueError, match=message):
        SmallGPTConfig(**options)


def test_learned_positions_end():
    model = make_model(position_embedding_type="learned", max_position_embeddings=8)
    model(make_ids(length=8))
    with pytest.raises(ValueError, match="position 8 .*max_position_embeddings=8"):
        model(make_ids(length=9))
    with pytest.raises(ValueError, match="position 8 .*max_position_embeddings=8"):
        model.generate(make_ids(length=4), max_new_tokens=6, do_sample=False, pad_token_id=0)
    _, ids, mask = left_padded((5, 8))
    padding = torch.zeros(2, 4, dtype=torch.long)
    model(torch.cat((padding, ids), 1), torch.cat((padding, mask), 1))  # padding takes no position
    make_model(max_position_embeddings=8)(make_ids(length=9))  # rotary positions go on
