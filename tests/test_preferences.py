"""Preferences over the stories: exact pairs, the stated noise; reward models trained on them, measured, loaded and used."""

import json
import math
import re
from collections import Counter

import pytest
import torch
from datasets import Dataset

from hf_gdc import Reference, Reward, data, preferences, stories
from hf_gdc.data import word_tokenizer
from hf_gdc.models import SmallGPTConfig, SmallGPTForCausalLM
from hf_gdc.preferences import kindness, story_pairs, story_preferences
from hf_gdc.reward_models import RewardAdapter, RewardModel, reward_model
from hf_gdc.trainers.reward_modeling import RewardModelArguments, judge, tokenize_pairs, train_reward_model
from hf_gdc.trl_compat import ModelConfig, RewardConfig


def test_the_true_reward_counts_words():
    texts = ["The cat was kind, kind and FRIENDLY.", "He stole it and sang.", "unkind", ""]
    assert kindness(texts) == [2.0, 0.0, 0.0, 0.0]
    assert kindness([[{"role": "assistant", "content": "sick and happy"}]]) == [0.0]
    assert Reward("hf_gdc.preferences:kindness", 0.5).features[0].function is kindness
    words = set(re.findall(r"\w+", " ".join(stories.sample(3000, 0)).lower()))
    assert preferences.KIND.issubset(words) and preferences.UNKIND.issubset(words)


def test_pairs_are_stories_of_the_grammar_with_one_beginning():
    pairs = story_pairs(60, seed=3)
    assert len(pairs) == 60 and pairs[:20] == story_pairs(20, seed=3) and pairs != story_pairs(60, seed=4)
    for prompt, first, second in pairs:
        assert first != second and prompt.endswith(".") and prompt.count(".") == 1
        assert stories.log_prob(prompt + first) > -math.inf and stories.log_prob(prompt + second) > -math.inf
    orders = Counter(kindness([first])[0] > kindness([second])[0] for _, first, second in story_pairs(400))
    assert 100 < orders[True] < 300  # no order of merit


def test_the_noise_is_bradley_terrys():
    """The share of pairs whose better story is preferred, for each difference of rewards, within four standard errors."""
    for temperature in (0.5, 1.0, 3.0):
        won: dict[float, list[bool]] = {}
        for row in story_preferences(3000, temperature, seed=1):
            difference = row["chosen_reward"] - row["rejected_reward"]
            assert kindness([row["chosen"], row["rejected"]]) == [row["chosen_reward"], row["rejected_reward"]]
            won.setdefault(abs(difference), []).append(difference > 0)
        for difference, wins in won.items():
            expected = 1 / (1 + math.exp(-difference / temperature))
            if difference and len(wins) > 50:
                error = math.sqrt(expected * (1 - expected) / len(wins))
                assert abs(sum(wins) / len(wins) - expected) < 4 * error + 1e-3, (temperature, difference)
    sure = story_preferences(300, 1e-9)
    assert all(row["chosen_reward"] >= row["rejected_reward"] for row in sure)
    for options, message in (((10, 0.0), "temperature above 0 .* not temperature=0 and 10"), ((0,), "and 0 pairs")):
        with pytest.raises(ValueError, match=message):
            story_preferences(*options)


def test_preferences_from_files(tmp_path):
    assert data.load_preferences("stories", "train[90%:]", num_pairs=40).num_rows == 4
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"chosen": "a b", "rejected": "c"}) + "\n")
    options = RewardModelArguments(data=str(file), validation_percent=50)
    file.write_text(
        json.dumps({"chosen": "a b", "rejected": "c"}) + "\n" + json.dumps({"chosen": "d", "rejected": ""}) + "\n"
    )
    assert [part[0]["prompt"] for part in options.load()] == ["", ""]
    file.write_text(json.dumps({"prompt": "a", "completion": "c"}) + "\n")
    with pytest.raises(
        ValueError, match="needs the column `prompt` and `chosen` and `rejected`, or `chosen` and `rejected`; it"
    ):
        data.load_preferences(str(file))
    with pytest.raises(ValueError, match="validation_percent must be from 1 to 99, but is 0"):
        RewardModelArguments(validation_percent=0)


TEXTS = stories.sample(2000, seed=0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model with random weights and the stories' words."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = word_tokenizer(TEXTS, 64)
    torch.manual_seed(0)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    SmallGPTForCausalLM(SmallGPTConfig(vocab_size=len(tokenizer), **ids, **size)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def config(folder, **options) -> RewardConfig:
    settings = {"learning_rate": 1e-2, "per_device_train_batch_size": 32, "num_train_epochs": 2, "use_cpu": True}
    settings |= {"bf16": False, "gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True}
    return RewardConfig(str(folder), **settings | {"report_to": "none", "logging_steps": 1000} | options)


@pytest.mark.parametrize("peft", [False, True], ids=["whole", "adapter"])
def test_a_trained_reward_model_is_read_as_it_was_trained(peft, base, tmp_path):
    model = ModelConfig(base, use_peft=peft, lora_target_modules=["q_proj", "v_proj", "up_proj"], lora_r=8)
    options = RewardModelArguments(num_pairs=900, preference_temperature=0.3)
    folder, metrics = train_reward_model(options, model, config(tmp_path / "run"))
    assert metrics["accuracy"] > (0.62 if peft else 0.75) and metrics["accuracy"] < metrics["accuracy_of_truth"] + 0.05
    assert metrics["correlation"] > (0.3 if peft else 0.7) and 0 < metrics["log_loss"] < math.log(2)
    reward = reward_model(str(folder))
    assert isinstance(reward, RewardAdapter if peft else RewardModel)
    assert "sigmoid(r(chosen) - r(rejected))" in (folder / "README.md").read_text()
    _, held_out = options.load()
    assert judge(str(folder), held_out, batch_size=7)["log_loss"] == pytest.approx(metrics["log_loss"], abs=1e-5)
    # the same ids in training and in use: the model's own forward on a training row gives what the Reward gives
    rows = tokenize_pairs(held_out, reward.tokenizer, None)
    values = reward(held_out["prompt"][:5], held_out["chosen"][:5])
    inner = reward.model if not peft else reward._reader.model
    with torch.no_grad():
        direct = [float(inner(input_ids=torch.tensor([row])).logits[0, 0]) for row in rows["chosen_ids"][:5]]
    assert values.tolist() == pytest.approx(direct, abs=1e-5)
    assert rows["chosen_ids"][0][0] == reward.tokenizer.bos_token_id
    assert reward.tokenizer.eos_token_id not in rows["chosen_ids"][0]
    assert str(folder) in (Reference() * Reward(str(folder), 0.1)).formula()
    with pytest.raises(ValueError, match="is not empty"):
        train_reward_model(options, model, config(tmp_path / "run"))


def test_mistakes(base, tmp_path):
    with pytest.raises(ValueError, match="which model"):
        train_reward_model(RewardModelArguments(), ModelConfig(), config(tmp_path / "run"))
    options = RewardModelArguments(num_pairs=20)
    with pytest.raises(
        ValueError, match=r"every pair has a text of more than max_length=4 tokens \(the shortest one has \d+"
    ):
        train_reward_model(options, ModelConfig(base), config(tmp_path / "short", max_length=4))
    pairs = Dataset.from_list([{"prompt": "Tom", "chosen": text, "rejected": " cat"} for text in (" dog", " dog dog")])
    assert (
        len(tokenize_pairs(pairs, word_tokenizer(TEXTS), 3)) == 1
        and len(tokenize_pairs(pairs, word_tokenizer(TEXTS), 4)) == 2
    )
    chats = [{"role": "user", "content": "Tom"}]
    pairs = Dataset.from_list([{"prompt": chats, "chosen": chats, "rejected": chats}])
    with pytest.raises(ValueError, match="the preferences are chats, and the tokenizer has no chat template"):
        tokenize_pairs(pairs, word_tokenizer(TEXTS), None)


def test_chats_are_written_by_the_template():
    tokenizer = word_tokenizer(TEXTS)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}.{% endfor %}"
    user, good, bad = (
        [{"role": role, "content": text}]
        for role, text in (("user", "Tom"), ("assistant", " cat"), ("assistant", " dog"))
    )
    rows = tokenize_pairs(Dataset.from_list([{"prompt": user, "chosen": good, "rejected": bad}]), tokenizer, None)
    plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Tom. cat.", "Tom. dog.")]
    assert [rows[0]["chosen_ids"], rows[0]["rejected_ids"]] == plain


def test_judging_by_hand(monkeypatch):
    """Margins 2, -1, 0 against true differences 1, -1, 2."""
    from hf_gdc.trainers import reward_modeling

    numbers = {"a": 3.0, "b": 1.0, "c": 0.0, "d": 1.0, "e": 5.0}
    monkeypatch.setattr(
        reward_modeling,
        "reward_model",
        lambda path, batch_size: lambda prompts, texts: torch.tensor([numbers[t] for t in texts]).double(),
    )
    pairs = {"prompt": [""] * 3, "chosen": ["a", "c", "e"], "rejected": ["b", "d", "e"]}
    pairs |= {"chosen_reward": [1.0, 0.0, 2.0], "rejected_reward": [0.0, 1.0, 0.0]}
    found = judge("path", Dataset.from_dict(pairs))
    assert found["accuracy"] == 0.5 and found["margin"] == pytest.approx(1 / 3)
    assert found["accuracy_of_truth"] == pytest.approx(2 / 3)
    assert found["slope"] == pytest.approx(3 / 6) and found["correlation"] == pytest.approx(3 / math.sqrt(5 * 6))
    losses = [math.log1p(math.exp(-margin)) for margin in (2.0, -1.0, 0.0)]
    assert found["log_loss"] == pytest.approx(sum(losses) / 3)
