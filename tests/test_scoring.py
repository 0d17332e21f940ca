"""The scorer against a naive float64 loop: one unpadded sequence, one token at a time."""

import copy

import pytest
import torch
from builders import VOCABULARY, gemma2, gpt2, small_gpt
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_gdc.scoring import Scorer

MODELS = {
    "small_gpt": small_gpt,
    "learned": lambda: small_gpt(position_embedding_type="learned"),
    "gpt2": gpt2,
    "gemma2": gemma2,
}
# In float64 Gemma 2's eager attention gives NaN behind left padding, a defect of transformers.
every_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
exact_model = pytest.mark.parametrize("build", list(MODELS.values())[:3], ids=list(MODELS)[:3])
EOS = 0  # also BOS and the padding

PROMPTS = [[EOS], [4, 9, 2, 7], [EOS, 5], [EOS, 3, EOS, 8, 1]]
COMPLETIONS = [[5, 6, EOS], [EOS], [7, 8, 9, 10, 11], [3, 2]]  # ended, at once, cut, cut


def padded():
    """Prompts padded on the left and completions on the right, with the EOS id; masks by length."""
    width, length = max(map(len, PROMPTS)), max(map(len, COMPLETIONS))
    prompt_mask = torch.tensor([[n >= width - len(row) for n in range(width)] for row in PROMPTS])
    completion_mask = torch.tensor([[n < len(row) for n in range(length)] for row in COMPLETIONS])
    prompts = torch.tensor([[EOS] * (width - len(row)) + row for row in PROMPTS])
    completions = torch.tensor([row + [EOS] * (length - len(row)) for row in COMPLETIONS])
    return prompts, prompt_mask, completions, completion_mask


def naive(model):
    """(B, T) log-probs and entropies in float64, 0 after the end."""
    model = copy.deepcopy(model).double()
    length = max(map(len, COMPLETIONS))
    logps, entropies = torch.zeros(2, len(PROMPTS), length, dtype=torch.float64).unbind()
    for b, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        for t, token in enumerate(completion):
            with torch.no_grad():
                distribution = model(torch.tensor([prompt + completion[:t]])).logits[0, -1].log_softmax(-1)
            logps[b, t], entropies[b, t] = distribution[token], -(distribution.exp() * distribution).sum()
    return logps, entropies


def close(value, wanted, atol=1e-5):
    torch.testing.assert_close(value.double(), wanted.double(), rtol=0, atol=atol)


def gradients(scorer, weights_BT, module=None):
    scorer.model.zero_grad()
    out = scorer(*padded(), module=module)
    (out.logps_BT * weights_BT).sum().backward()
    return out, {name: p.grad.clone() for name, p in scorer.model.named_parameters() if p.grad is not None}


@every_model
def test_equals_the_naive_loop(build):
    model = build()
    out = Scorer(model)(*padded(), entropy=True)
    logps, entropies = naive(model)
    assert logps.std() > 0.1  # a model that tells tokens apart
    close(out.logps_BT, logps)
    close(out.entropy_BT, entropies)
    close(out.logp_B, logps.sum(-1))
    assert not out.entropy_BT.requires_grad and out.logps_BT.dtype == torch.float32


@exact_model
def test_float64_stays(build):
    model = build().double()
    out = Scorer(model)(*padded())
    assert out.entropy_BT is None
    close(out.logps_BT, naive(model)[0], atol=1e-12)


@every_model
def test_unpadded_prompts(build):
    """Without padding no mask is passed; each row by itself gives what the batch gives."""
    model = build()
    scorer, (_, _, completions, completion_mask) = Scorer(model), padded()
    for b, prompt in enumerate(PROMPTS):
        row = torch.tensor([prompt]), torch.ones(1, len(prompt)), completions[b : b + 1], completion_mask[b : b + 1]
        close(scorer(*row).logps_BT[0], naive(model)[0][b])


@exact_model
@pytest.mark.parametrize("chunk", [1, VOCABULARY, 3 * VOCABULARY + 5])
def test_chunks_change_neither_values_nor_gradients(build, chunk):
    model = build().double()
    weights = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).double()
    whole, whole_gradients = gradients(Scorer(model), weights)
    out, chunk_gradients = gradients(Scorer(model, chunk_elements=chunk), weights)
    close(out.logps_BT, whole.logps_BT, atol=1e-12)
    assert set(chunk_gradients) == set(whole_gradients) and len(whole_gradients) > 10
    for name, gradient in chunk_gradients.items():
        close(gradient, whole_gradients[name], atol=1e-10)
    entropy = Scorer(model, chunk_elements=chunk)(*padded(), entropy=True).entropy_BT
    close(entropy, naive(model)[1], atol=1e-12)


def test_chunks_are_used_where_they_may_be():
    assert [Scorer(build())._head_is_separate for build in (small_gpt, gpt2, gemma2)] == [True, True, False]
    model, calls = small_gpt(), []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    scorer = Scorer(model, chunk_elements=4 * VOCABULARY)
    calls.clear()
    with torch.no_grad():
        scorer(*padded())
    assert len(calls) == 3  # 11 real tokens, at most 4 at once


@exact_model
def test_gradients_are_those_of_finite_differences(build):
    model = build().double()
    weights = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)).double()
    scorer = Scorer(model, chunk_elements=50)
    _, found = gradients(scorer, weights)
    for name, parameter in list(model.named_parameters())[-4:]:
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)).double()
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * 1e-5 * direction
                ends.append(float((scorer(*padded()).logps_BT * weights).sum()))
                parameter -= sign * 1e-5 * direction
        assert float((found[name] * direction).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5, abs=1e-7)


class Wrapper(nn.Module):
    """As DDP does: own work around the model's call, nothing known of the model's signature."""

    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.module(*args, **kwargs)


@every_model
def test_runs_inside_a_wrapper(build):
    model, weights = build(), torch.ones(4, 5)
    wrapper, hooked = Wrapper(model), []
    model.register_forward_hook(lambda *_: hooked.append(1))
    scorer = Scorer(model)
    plain, plain_gradients = gradients(scorer, weights)
    hooked.clear()
    out, wrapped_gradients = gradients(scorer, weights, module=wrapper)
    assert wrapper.calls == 1 and len(hooked) == 1  # the wrapper's own call, and the model's hooks
    close(out.logps_BT, plain.logps_BT, atol=1e-6)
    for name, gradient in wrapped_gradients.items():
        close(gradient, plain_gradients[name], atol=1e-6)
    ids = torch.tensor([[1, 2, 3]])
    assert model(ids).logits.shape == (1, 3, VOCABULARY)  # the model's own forward is back


def test_a_failure_inside_puts_the_forward_back():
    model = small_gpt()
    scorer, (prompts, *rest) = Scorer(model), padded()
    with pytest.raises(IndexError):
        scorer(prompts + VOCABULARY, *rest)
    close(scorer(prompts, *rest).logps_BT, naive(model)[0])


@pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|fan_in_fan_out)")
@every_model
def test_lora_with_the_adapter_on_and_off(build):
    base = build()
    plain = naive(base)[0]
    layers = ["c_attn"] if build is gpt2 else ["q_proj", "v_proj"]
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=[*layers, "lm_head"], init_lora_weights=False)
    model = get_peft_model(base, config)
    scorer = Scorer(model, chunk_elements=50)
    adapted = naive(model)[0]
    assert (adapted - plain).abs().max() > 0.01
    close(scorer(*padded()).logps_BT, adapted)
    with model.disable_adapter():
        close(scorer(*padded()).logps_BT, plain)
    _, found = gradients(scorer, torch.ones(4, 5))
    assert found and all("lora_" in name for name in found) and all(g.abs().sum() > 0 for g in found.values())


def test_dropout_is_left_to_the_caller():
    model = small_gpt(residual_dropout=0.5)
    scorer = Scorer(model.train())
    assert model.training and model.model.layers[0].training  # as it was
    assert (scorer(*padded()).logps_BT - scorer(*padded()).logps_BT).abs().max() > 0.01
    model.eval()
    close(scorer(*padded()).logps_BT, naive(model)[0])
