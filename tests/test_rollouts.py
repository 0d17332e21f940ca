"""Rollouts and their sampler: recorded log q against recomputed ones, and samples against enumeration."""

import io
from types import SimpleNamespace

import pytest
import tiny
import torch
from builders import gpt2, letters, rollouts_by_hand, small_gpt
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gdc.partition import prompt_key
from hf_gdc.rollouts import Rollouts, completion_mask
from hf_gdc.sampling import TransformersSampler
from hf_gdc.scoring import Scorer

MODELS = {"small_gpt": small_gpt, "learned": lambda: small_gpt(position_embedding_type="learned"), "gpt2": gpt2}
PROMPTS = ["", "a b c", "d", "a a b b c c"] * 8
EOS = 0


def sample(model, prompts=PROMPTS, **options):
    torch.manual_seed(0)
    return TransformersSampler(letters(), 8, **options)(model, prompts)


# ---- log-probabilities ----


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_recorded_log_probs_are_the_scorers(build):
    model = build()
    rollouts = sample(model)
    with torch.no_grad():
        out = Scorer(model).rollouts(rollouts)
    torch.testing.assert_close(rollouts.sampler_logps_BT, out.logps_BT, rtol=0, atol=1e-5)
    torch.testing.assert_close(rollouts.sampler_logp_B, out.logp_B.double(), rtol=0, atol=1e-5)
    assert torch.equal(rollouts.policy_logp_B, rollouts.sampler_logp_B) and rollouts.sampler_logp_B.std() > 1
    ended = (rollouts.completion_ids_BT == EOS).any(1)
    assert ended.any() and not ended.all()  # both endings were scored


def warp(logits, seen, repetition_penalty=1.0, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The renormalised distribution, one token at a time, as the options are described."""
    values = logits.tolist()
    for token in set(seen):
        values[token] *= repetition_penalty if values[token] < 0 else 1 / repetition_penalty
    values = torch.tensor(values, dtype=torch.float64) / temperature
    if top_k:
        values = torch.where(values >= values.sort(descending=True).values[top_k - 1], values, -torch.inf)
    kept, total = torch.zeros(len(values), dtype=torch.bool), 0.0
    for token in values.argsort(descending=True).tolist():
        if total < top_p:
            kept[token] = True
        total += float(values.softmax(-1)[token])
    values = torch.where(kept, values, -torch.inf)
    values = torch.where(values.softmax(-1) >= min_p * values.softmax(-1).max(), values, -torch.inf)
    return values.log_softmax(-1)


WARPS = [
    {"temperature": 0.7},
    {"temperature": 1.5, "top_k": 4},
    {"top_p": 0.8},
    {"min_p": 0.2},
    {"repetition_penalty": 1.6},
    {"repetition_penalty": 1.3, "temperature": 1.2, "top_k": 9, "top_p": 0.9, "min_p": 0.05},
]


@pytest.mark.parametrize("options", WARPS, ids=lambda options: "-".join(options))
def test_warped_sampling_records_both_densities(options):
    model = small_gpt()
    rollouts = sample(model, PROMPTS[:8], **options)
    for b, completion in enumerate(rollouts.completion_ids()):
        padded, prompt = rollouts.prompt_ids_BP[b].tolist(), rollouts.prompt_ids_BP[b][rollouts.prompt_mask_BP[b]]
        sampler_logps, policy_logp = [], 0.0
        for t, token in enumerate(completion):
            with torch.no_grad():
                logits = model(torch.tensor([prompt.tolist() + completion[:t]])).logits[0, -1].double()
            sampler_logps.append(float(warp(logits, padded + completion[:t], **options)[token]))
            policy_logp += float(logits.log_softmax(-1)[token])
        recorded = rollouts.sampler_logps_BT[b]
        assert recorded[: len(completion)].tolist() == pytest.approx(sampler_logps, abs=1e-5)
        assert recorded[len(completion) :].abs().sum() == 0
        assert float(rollouts.sampler_logp_B[b]) == pytest.approx(sum(sampler_logps), abs=1e-5)
        assert float(rollouts.policy_logp_B[b]) == pytest.approx(policy_logp, abs=1e-5)
    assert (rollouts.sampler_logp_B - rollouts.policy_logp_B).abs().max() > 0.05


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_enumerated_distribution(temperature):
    """Chi-squared over the 15 strings with 14 degrees of freedom: 42.6 is exceeded once in 10,000."""
    model, outcomes, size = tiny.model(3, scale=2.0), tiny.strings(), 4000
    torch.manual_seed(0)
    sampler = TransformersSampler(tiny.tokenizer(), tiny.LENGTH, temperature=temperature)
    rollouts = sampler(model, [""] * size)
    probability = torch.zeros(len(outcomes), dtype=torch.float64)
    for n, string in enumerate(outcomes):
        with torch.no_grad():
            logps = (model(torch.tensor([[0, *string]])).logits[0, :-1] / temperature).log_softmax(-1)
        probability[n] = logps.gather(1, torch.tensor(string)[:, None]).sum().exp()
    assert float(probability.sum()) == pytest.approx(1)
    drawn = torch.tensor([outcomes.index(string) for string in rollouts.completion_ids()])
    torch.testing.assert_close(rollouts.sampler_logp_B, probability.log()[drawn], rtol=0, atol=1e-5)
    expected = size * probability
    assert float(((drawn.bincount(minlength=15) - expected) ** 2 / expected).sum()) < 42.6


# ---- ends ----


@given(rows=st.lists(st.lists(st.integers(0, 4), min_size=6, max_size=6), min_size=1, max_size=5), second=st.booleans())
def test_the_mask_keeps_the_first_eos(rows, second):
    eos_ids = [0, 3] if second else [0]
    for row, mask in zip(rows, completion_mask(torch.tensor(rows), eos_ids).tolist(), strict=True):
        first = min([row.index(eos) for eos in eos_ids if eos in row], default=5)
        assert mask == [n <= first for n in range(6)]


def test_completions_end_at_any_eos_or_at_the_maximum():
    rollouts = sample(small_gpt(), PROMPTS, eos_ids=[13])
    lengths, endings = [], set()
    for ids, text in zip(rollouts.completion_ids(), rollouts.texts, strict=True):
        assert not {EOS, 13} & set(ids[:-1]) and (ids[-1] in (EOS, 13) or len(ids) == 8)
        assert text.split() == [chr(96 + i) for i in ids if i != EOS]
        lengths.append(len(ids))
        endings.add(ids[-1] if ids[-1] in (EOS, 13) else "cut")
    assert rollouts.lengths_B.tolist() == lengths and endings == {EOS, 13, "cut"}


@pytest.mark.parametrize("training", [True, False])
def test_the_models_own_generation_defaults_are_ignored_and_kept(training):
    model = small_gpt(residual_dropout=0.9).train(training)
    plain = sample(model)
    own = model.generation_config
    own.top_k, own.temperature, own.do_sample, own.min_new_tokens, own.repetition_penalty = 5, 0.3, False, 8, 1.7
    before = own.to_dict()
    again = sample(model)
    assert again.completion_ids() == plain.completion_ids()
    assert torch.equal(again.sampler_logp_B, plain.sampler_logp_B)
    assert model.generation_config is own and own.to_dict() == before and model.training is training


def test_a_failure_puts_the_models_state_back():
    model = small_gpt(vocab_size=5).train()
    own = model.generation_config
    with pytest.raises(IndexError):
        sample(model, ["v"])  # id 22
    assert model.generation_config is own and model.training


# ---- prompts ----


def test_prompts_are_padded_on_the_left_and_keyed_by_their_ids():
    rollouts = sample(small_gpt(), ["", "a b c", "d", "a b c"])
    assert rollouts.prompt_ids_BP.tolist() == [[0, 0, 0], [1, 2, 3], [0, 0, 4], [1, 2, 3]]
    assert rollouts.prompt_mask_BP.int().tolist() == [[0, 0, 1], [1, 1, 1], [0, 0, 1], [1, 1, 1]]
    assert rollouts.prompt_key_B.tolist() == [prompt_key(ids) for ids in ([0], [1, 2, 3], [4], [1, 2, 3])]


def test_chat_prompts():
    chats = [[{"role": "user", "content": "b c"}], [{"role": "user", "content": "d"}]]
    rollouts = sample(small_gpt(), [chats[0], chats[1], chats[0]])
    assert rollouts.prompt_ids_BP.tolist() == [[21, 2, 3, 0, 1], [0, 21, 4, 0, 1], [21, 2, 3, 0, 1]]  # "u b c E a"
    assert rollouts.prompt_mask_BP.sum(1).tolist() == [5, 4, 5]
    assert rollouts.completions == [[{"role": "assistant", "content": text}] for text in rollouts.texts]
    assert rollouts.prompts == [chats[0], chats[1], chats[0]]
    with torch.no_grad():
        logp = Scorer(small_gpt()).rollouts(rollouts).logp_B
    torch.testing.assert_close(rollouts.sampler_logp_B, logp.double(), rtol=0, atol=1e-5)


def test_errors():
    tokenizer = letters()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token.*Set one"):
        TransformersSampler(tokenizer, 8)
    with pytest.raises(ValueError, match="generation_kwargs num_beams, typical_p may change what is sampled.*top_k"):
        TransformersSampler(letters(), 8, generation_kwargs={"typical_p": 0.5, "use_cache": False, "num_beams": 2})
    with pytest.raises(
        ValueError, match=r"prompt of 3 tokens and max_completion_length=8 exceed .* 10.*begins 'a b c'"
    ):
        sample(small_gpt(), ["a", "a b c"], max_context=10)
    assert len(sample(small_gpt(), ["a", "a b c"], max_context=11)) == 2


def test_from_options_reads_the_model():
    model = small_gpt()
    model.generation_config.eos_token_id = [0, 9]
    warps = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1}
    rest = {"max_completion_length": 60, "chat_template_kwargs": None, "generation_kwargs": {"use_cache": False}}
    sampler = TransformersSampler.from_options(letters(), model, SimpleNamespace(**warps, **rest))
    assert sampler.eos_ids == [0, 9] and len(sampler.warpers) == 5
    with pytest.raises(ValueError, match="context of 64"):
        sampler.encode(["a b c d e"])


# ---- the data class ----


def rows(rollouts):
    """Everything about each sample, free of padding."""
    scores, columns = rollouts.scores, rollouts.columns
    return [
        (
            rollouts.prompt_ids_BP[b][rollouts.prompt_mask_BP[b]].tolist(),
            rollouts.completion_ids()[b],
            rollouts.sampler_logps_BT[b][rollouts.completion_mask_BT[b]].tolist(),
            [float(getattr(rollouts, name)[b]) for name in ("prompt_key_B", "sampler_logp_B", "policy_logp_B")],
            (rollouts.prompts[b], rollouts.texts[b]),
            ({name: values[b] for name, values in columns.items()}, {name: float(v[b]) for name, v in scores.items()}),
        )
        for b in range(len(rollouts))
    ]


def numbered(texts, start=0):
    rollouts = rollouts_by_hand(texts, torch.arange(len(texts)) + start, [f"p{t}" for t in texts], extra=texts)
    rollouts.scores["length"] = torch.tensor([float(len(text)) for text in texts])
    logps = torch.arange(rollouts.completion_mask_BT.numel()).view(rollouts.completion_mask_BT.shape) * -0.5
    rollouts.sampler_logps_BT = torch.where(rollouts.completion_mask_BT, logps, 0.0)
    return rollouts


texts = st.lists(st.text("abc", max_size=5), min_size=1, max_size=8)


@settings(deadline=None)
@given(texts=texts, data=st.data())
def test_select_and_concatenate_are_those_of_lists(texts, data):
    whole = numbered(texts)
    order = data.draw(st.permutations(range(len(texts))))
    cut = data.draw(st.integers(0, len(texts)))
    parts = [whole.select(torch.tensor(part)) for part in (order[:cut], order[cut:]) if part]
    for part, index in zip(parts, [p for p in (order[:cut], order[cut:]) if p], strict=True):
        assert rows(part) == [rows(whole)[i] for i in index]
        assert part.completion_ids_BT.shape[1] == int(part.lengths_B.max())  # trimmed
    assert rows(Rollouts.concatenate(parts)) == [rows(whole)[i] for i in order]


@settings(deadline=None)
@given(first=texts, second=texts)
def test_concatenate_pads_prompts_left_and_completions_right(first, second):
    a, b = numbered(first), numbered(second, start=100)
    b.prompt_ids_BP = torch.tensor([[0, 5, 6]] * len(second))
    b.prompt_mask_BP = torch.tensor([[False, True, True]] * len(second))
    joined = Rollouts.concatenate([a, b])
    assert rows(joined) == rows(a) + rows(b) and joined.prompt_mask_BP[:, -1].all()
    assert joined.completion_mask_BT[:, 0].all() and joined.log_score_B is None


def test_state_travels_through_a_file():
    rollouts = numbered(["ab", "", "abc"])
    rollouts.log_z_B, file = torch.tensor([0.0, -torch.inf, 1.0]), io.BytesIO()
    torch.save(rollouts.state_dict(), file)
    file.seek(0)
    back = Rollouts(**torch.load(file, weights_only=True)).tokens_to("cpu")
    assert rows(back) == rows(rollouts) and torch.equal(back.log_z_B, rollouts.log_z_B) and back.baseline_B is None
