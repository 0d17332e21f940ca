"""Pretraining from any text, Muon, and a recipe that resumes exactly."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_gdc import SmallGPTConfig, SmallGPTForCausalLM, stories
from hf_gdc.data import train_tokenizer
from hf_gdc.muon import MuonAdamW, hidden_matrices
from hf_gdc.trainers.pretraining import (
    PretrainArguments,
    PretrainConfig,
    build_model,
    build_tokenizer,
    build_trainer,
    nll_and_tokens,
    pretrain,
)

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TOKENIZER = train_tokenizer(stories.sample(200, 0), 400)


def options(**kwargs):
    return PretrainArguments(**{"num_stories": 120, "validation_percent": 10, "model_kwargs": TINY} | kwargs)


def config(folder, **kwargs):
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    return PretrainConfig(output_dir=str(folder), **defaults | kwargs)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ---- Muon ----


def tiny_model():
    torch.manual_seed(0)
    return SmallGPTForCausalLM(SmallGPTConfig(vocab_size=20, bos_token_id=0, **TINY))


def steps(model, optimizer, scheduler, n, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        ids = torch.randint(20, (4, 6), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def halving(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)


def test_muon_is_muon_for_the_hidden_matrices_and_adamw_for_the_rest():
    model, twin = tiny_model(), tiny_model()
    names = [name for name, p in model.named_parameters() if any(p is q for q in hidden_matrices(model))]
    assert names == [f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkvo"] + [
        f"model.layers.0.mlp.{x}_proj.weight" for x in ("gate", "up", "down")
    ]
    optimizer = MuonAdamW(model, lr=0.01, weight_decay=0.1)
    steps(model, optimizer, halving(optimizer), 3, seed=1)
    hidden = hidden_matrices(twin)
    rest = [p for p in twin.parameters() if not any(p is q for q in hidden)]
    parts = [
        torch.optim.Muon(hidden, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedulers = [halving(part) for part in parts]
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        ids = torch.randint(20, (4, 6), generator=generator)
        twin(input_ids=ids, labels=ids).loss.backward()
        for part, scheduler in zip(parts, schedulers, strict=True):
            part.step()
            scheduler.step()
            part.zero_grad()
    torch.testing.assert_close(weights(model), weights(twin), rtol=0, atol=0)


def test_muon_goes_on_exactly_from_its_state(tmp_path):
    whole, part = tiny_model(), tiny_model()
    optimizer = MuonAdamW(whole, lr=0.01)
    scheduler = halving(optimizer)
    steps(whole, optimizer, scheduler, 3, seed=1)
    torch.save((whole.state_dict(), optimizer.state_dict(), scheduler.state_dict()), tmp_path / "state.pt")
    steps(whole, optimizer, scheduler, 3, seed=2)

    model_state, optimizer_state, scheduler_state = torch.load(tmp_path / "state.pt")
    part.load_state_dict(model_state)
    optimizer = MuonAdamW(part, lr=0.5)
    scheduler = halving(optimizer)
    optimizer.load_state_dict(optimizer_state)
    scheduler.load_state_dict(scheduler_state)
    steps(part, optimizer, scheduler, 3, seed=2)
    assert torch.equal(weights(part), weights(whole))


# ---- the trainer ----


def test_evaluation_is_exact(tmp_path):
    """NLL per token and per text from sums over single texts, against the grammar's own log-probabilities."""
    trainer = build_trainer(options(max_length=96), config(tmp_path, per_device_eval_batch_size=5))
    metrics = trainer.evaluate()
    texts = stories.sample(120, trainer.args.seed)[108:]
    tokenizer, model = trainer.processing_class, trainer.model
    nll, tokens = [], []
    for text in texts:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            logps = model(ids).logits[0, :-1].log_softmax(-1)
        nll.append(-float(logps.gather(1, ids[0, 1:, None]).double().sum()))
        tokens.append(ids.shape[1] - 1)
    true = -sum(map(stories.log_prob, texts)) / len(texts)
    assert metrics["eval_nll_per_token"] == pytest.approx(sum(nll) / sum(tokens), rel=1e-5)
    assert metrics["eval_nll_per_text"] == pytest.approx(sum(nll) / len(nll), rel=1e-5)
    assert metrics["eval_excess_nats"] == pytest.approx(sum(nll) / len(nll) - true, rel=1e-5)


def test_cut_texts_have_no_excess(tmp_path):
    metrics = build_trainer(options(max_length=12), config(tmp_path)).evaluate()
    assert "eval_nll_per_token" in metrics and "eval_nll_per_text" not in metrics and "eval_excess_nats" not in metrics


def test_ignored_labels_do_not_count():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    nll = nll_and_tokens(logits, torch.tensor([[-100, 2, 3], [-100, 4, -100]]))
    logps = logits.log_softmax(-1)
    expected = [[-float(logps[0, 0, 2] + logps[0, 1, 3]), 2], [-float(logps[1, 0, 4]), 1]]
    torch.testing.assert_close(nll, torch.tensor(expected))


@pytest.mark.parametrize("muon", [True, False])
def test_resuming_equals_not_stopping(tmp_path, muon):
    pretrain(options(), config(tmp_path / "whole", muon=muon, save_steps=2))
    cut = tmp_path / "whole" / "checkpoint-2"
    resumed = build_trainer(options(), config(tmp_path / "resumed", muon=muon))
    resumed.train(resume_from_checkpoint=str(cut))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "model")
    assert torch.equal(weights(resumed.model), weights(model))


def test_a_folder_in_use_is_refused_unless_told(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty.*`--overwrite`"):
        pretrain(options(), config(tmp_path))
    folder, _ = pretrain(options(), config(tmp_path, overwrite=True, max_steps=1))
    assert folder == tmp_path / "model" and (tmp_path / "notes.txt").exists()


def test_training_learns_and_saves_a_whole_model(tmp_path):
    before = build_trainer(options(), config(tmp_path)).evaluate()["eval_nll_per_token"]
    folder, metrics = pretrain(options(), config(tmp_path, max_steps=30))
    assert metrics["eval_nll_per_token"] < before - 1
    files = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "modeling_small_gpt.py", "configuration_small_gpt.py"} <= files
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = {getattr(x, name) for x in (model.config, model.generation_config, tokenizer)}
        assert len(ids) == 1 and None not in ids


# ---- any text, any architecture ----


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_a_text_file_is_packed_into_blocks(tmp_path, tokenizer):
    path = tmp_path / "book.txt"
    path.write_text("To be, or not to be, that is the question.\n" * 100)
    trainer = build_trainer(
        options(data=str(path), tokenizer=tokenizer, vocab_size=300, max_length=32), config(tmp_path / "out")
    )
    assert {len(ids) for ids in trainer.train_dataset["input_ids"]} == {32}
    metrics = trainer.evaluate()
    assert "eval_nll_per_token" in metrics and "eval_nll_per_text" not in metrics and "eval_excess_nats" not in metrics


def test_gpt2_on_prompts_and_completions(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "Who?", "completion": " Tom was."}\n' * 40)
    kwargs = '{"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 48}'
    folder, metrics = pretrain(
        options(data=str(path), vocab_size=300, model_type="gpt2", model_kwargs=kwargs), config(tmp_path / "out")
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.model_type == "gpt2" and model.config.n_positions == 48
    assert "eval_nll_per_text" in metrics and "eval_excess_nats" not in metrics
    assert not any(
        m.p
        for m in build_trainer(options(model_type="gpt2", model_kwargs=kwargs), config(tmp_path)).model.modules()
        if isinstance(m, torch.nn.Dropout)
    )


def test_an_existing_tokenizer(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    dataset = build_trainer(options(tokenizer=str(tmp_path)), config(tmp_path / "out")).train_dataset
    assert dataset[0]["input_ids"] == [*TOKENIZER(stories.sample(1, 42)[0])["input_ids"], TOKENIZER.eos_token_id][:48]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"model_kwargs": {"hidden_sise": 16}},
            "SmallGPTConfig has no option `hidden_sise`. Did you mean `hidden_size`",
        ),
        ({"model_kwargs": TINY | {"max_position_embeddings": 20}}, "max_length=48 is beyond the model's 20 positions"),
        ({"model_type": "gtp2"}, "model_type has no option `gtp2`. Did you mean `gpt2`"),
        ({"model_type": "t5"}, "model_type has no option `t5`"),
    ],
)
def test_mistakes_in_the_model(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build_model(options(**kwargs), TOKENIZER)


def test_other_mistakes(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer '/nowhere'"):
        build_tokenizer(options(tokenizer="/nowhere"), None)
    with pytest.raises(ValueError, match="validation_percent must be from 1 to 99"):
        options(validation_percent=0)
    with pytest.raises(ValueError, match="has no option `num_story`. Did you mean `num_stories`"):
        PretrainArguments(num_story=3)


def test_the_recipe(tmp_path, capsys):
    recipe = Path(__file__).parents[1] / "recipes" / "pretrain"
    argv = [f"--config={recipe / 'config.yaml'}", "--num_stories", "120", "--max_steps", "2", "--use_cpu"]
    argv += ["--output_dir", str(tmp_path / "out"), "--max_length", "96", "--model_kwargs", json.dumps(TINY)]
    runpy.run_path(str(recipe / "run.py"))["main"](argv)
    printed = capsys.readouterr().out
    assert "nats per token" in printed and "above the grammar's" in printed
    assert f"--model_name_or_path {tmp_path / 'out' / 'model'}" in printed
