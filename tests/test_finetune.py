"""Tasks as prompts and completions, their scores, and fine-tuning on them."""

import csv
import json
import math
import runpy
from pathlib import Path

import pytest
import torch
from builders import letters, small_gpt
from datasets import Dataset
from nltk.translate.bleu_score import corpus_bleu
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_gdc import commands, stories
from hf_gdc.data import load_rows, train_tokenizer
from hf_gdc.metrics import answer_f1, bleu, chrf, exact_match, rouge
from hf_gdc.models import SmallGPTConfig, SmallGPTForCausalLM
from hf_gdc.story_tasks import MAKERS, after, facts, story_task
from hf_gdc.task_scores import answers, label_logps, label_scores, task_scores
from hf_gdc.tasks import TASKS, fitting_rows, get_task, task_rows
from hf_gdc.trainers.finetuning import FinetuneArguments, FinetuneConfig, finetune
from hf_gdc.trl_compat import ModelConfig

SCRIPT = Path(__file__).parents[1] / "recipes" / "finetune" / "run.py"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random small GPT with a byte-level tokenizer, saved."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer(stories.sample(300, 0), 500)
    torch.manual_seed(0)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    SmallGPTForCausalLM(SmallGPTConfig(vocab_size=len(tokenizer), **size, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


# ---- rows ----


def test_templates_take_named_columns_and_several_right_answers():
    rows = Dataset.from_list([{"q": "Who?", "answers": ["Tom", "Tom the king"]}])
    task = get_task("question_answering", "Q: {q}\\nA:", " {answers}")
    assert task_rows(rows, task, letters())[0] == {
        "prompt": "Q: Who?\nA:",
        "completion": " Tom",
        "references": ["Tom", "Tom the king"],
    }
    with pytest.raises(ValueError, match=r"needs the column `context`, and a row has `q`, `answers`: name your own"):
        task_rows(rows, TASKS["question_answering"], letters())
    with pytest.raises(ValueError, match="no option `summarization`. Did you mean `summarisation`"):
        get_task("summarization")


def test_each_turn_of_the_assistant_is_a_completion_of_what_was_said_before(base):
    chat = [
        {"role": role, "content": text}
        for role, text in (("user", "b"), ("assistant", "c"), ("user", "d"), ("assistant", "e"))
    ]
    dataset = Dataset.from_list([{"messages": chat}])
    plain = AutoTokenizer.from_pretrained(base)
    found = task_rows(dataset, TASKS["dialogue"], plain)
    assert found["prompt"][1] == "user: b\nassistant: c\nuser: d\nassistant:" and found["completion"][1] == " e"
    found = task_rows(dataset, TASKS["dialogue"], letters())  # which has a chat template
    assert found["prompt"][1] == chat[:3] and found["completion"][1] == chat[3:] and found["references"][1] == ["e"]
    with pytest.raises(ValueError, match="no row has a turn of the assistant"):
        task_rows(Dataset.from_list([{"messages": chat[:1]}]), TASKS["dialogue"], plain)


def test_rows_that_do_not_fit_are_left_out_not_cut():
    rows = Dataset.from_dict({"prompt": ["a b", "a b c d e"], "completion": ["c", "f"]})
    assert fitting_rows(rows, letters(), 4)["prompt"] == ["a b"]  # two tokens, one, EOS
    assert len(fitting_rows(rows, letters(), 7)) == 2 and len(fitting_rows(rows, letters(), 7, max_new_tokens=3)) == 1
    with pytest.raises(ValueError, match=r"no row fits into max_length=3 tokens \(the shortest needs 4"):
        fitting_rows(rows, letters(), 3)


def test_rows_come_from_csv_with_line_ends_in_quotes(tmp_path):
    rows = [{"text": 'a "b",\nc', "label": "1"}, {"text": "d", "label": "2"}]
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    assert load_rows(str(tmp_path / "rows.csv")).to_list() == rows
    assert load_rows(str(tmp_path / "rows.csv"), "train[1:]").to_list() == rows[1:]
    (tmp_path / "none.csv").write_text("text,label\n")
    with pytest.raises(ValueError, match="has no rows"):
        load_rows(str(tmp_path / "none.csv"))


def test_the_stories_answers_are_right():
    assert facts("Anna the queen lived on a hill. Everyone feared the bear, but she did not.") == {
        "name": "Anna",
        "job": "queen",
        "thing": "",
        "creature": "bear",
        "kind": "feared",
        "theme": "a danger that was none",
    }
    for task in MAKERS:
        rows = story_task(task, 50, seed=3)
        assert rows == story_task(task, 60, seed=3)[:50] and len(
            task_rows(Dataset.from_list(rows), TASKS[task], letters())
        )
    found = [facts(text) for text in stories.sample(500, seed=1)]
    assert all(row[key] for row in found for key in ("name", "job", "creature"))
    kinds = {"lost": 45, "stolen": 20, "feared": 15, "friend": 20}  # the grammar's weights of its plots, of 100
    for kind, percent in kinds.items():
        share = sum(row["kind"] == kind for row in found) / 500
        assert share == pytest.approx(percent / 100, abs=4 * math.sqrt(percent / 100 * (1 - percent / 100) / 500))


def test_what_follows_a_first_sentence_has_the_grammars_conditional_probability():
    pairs = [("".join(text.partition(".")[:2]), text) for text in stories.sample(40, seed=2)]
    both: dict[str, set] = {}
    for first, text in pairs:
        difference = stories.log_prob(text) - after(first).log_prob(text)  # log p(first), whatever follows
        both.setdefault(first, set()).add(round(difference, 9))
        both[first].add(
            round(
                stories.log_prob(after(first).sample(1, 0)[0]) - after(first).log_prob(after(first).sample(1, 0)[0]), 9
            )
        )
    assert all(len(values) == 1 for values in both.values())


# ---- scores ----


def test_bleu_equals_nltk_and_takes_several_references():
    texts = ["the cat sat on the mat today", "a dog ran over the hill and home"]
    known = [["the cat sat on a mat", "the cat lay on the mat today"], ["a dog ran over a hill and home"]]
    ours = bleu(texts, known)
    assert ours == pytest.approx(100 * corpus_bleu([[r.split() for r in k] for k in known], [t.split() for t in texts]))
    assert bleu(texts, [[t] for t in texts]) == pytest.approx(100) and chrf(
        texts, [[t] for t in texts]
    ) == pytest.approx(100)
    with pytest.raises(ValueError, match="give each text a list"):
        bleu(texts, ["the cat", "a dog"])


def test_rouge_and_answers_by_hand():
    found = rouge(["the cat sat", "x"], [["cat the", "the cat ran off"], ["x"]])
    # the cat sat: of "the cat ran off" 2 of 3 and 2 of 4 words; of "cat the" 2 of 3 and 2 of 2, in order 1 each
    assert found["rouge1"] == pytest.approx(100 * (0.8 + 1) / 2)
    assert found["rouge2"] == pytest.approx(100 * (0.4 + 0) / 2)  # one bigram of 2 and of 3; "x" has none
    assert found["rougeL"] == pytest.approx(100 * (4 / 7 + 1) / 2)
    assert exact_match(["The King!", "a dog"], [["king"], ["cat", "the dog"]]) == 1
    assert exact_match(["king of it"], [["king"]]) == 0 and answer_f1(["king of it"], [["the king"]]) == pytest.approx(
        1 / 2
    )
    assert answer_f1(["", "x"], [["the"], ["a"]]) == 0.5  # nothing is left of the articles


def test_labels_are_ranked_by_their_log_likelihood():
    model, tokenizer = small_gpt(3, pad_token_id=0, bos_token_id=0, eos_token_id=0), letters()
    prompts, labels = ["a b", "c"], ["d", "e f"]
    found = label_logps(model, tokenizer, prompts, labels, batch_size=3)
    for n, prompt in enumerate(prompts):
        for k, label in enumerate(labels):
            start = tokenizer(prompt)["input_ids"]
            ids = torch.tensor([[*start, *tokenizer(label)["input_ids"], 0]])
            logps = model(ids).logits[0, :-1].log_softmax(-1).detach()
            own = logps[torch.arange(len(ids[0]) - 1), ids[0, 1:]][len(start) - 1 :]
            assert float(found[n, k]) == pytest.approx(float(own.sum()), rel=1e-5)
            per_token = label_logps(model, tokenizer, prompts, labels, length_normalised=True)[n, k]
            assert float(per_token) == pytest.approx(float(own.mean()), rel=1e-5)
    best = [labels[int(k)] for k in found.argmax(1)]
    rows = Dataset.from_dict({"prompt": prompts, "completion": [best[0], next(x for x in labels if x != best[1])]})
    scores = label_scores(model, tokenizer, rows, labels)
    assert scores["accuracy"] == 0.5 and scores["accuracy_low"] < 0.5 < scores["accuracy_high"]
    with pytest.raises(ValueError, match="the label 'g' of the data is not among the candidates"):
        label_scores(model, tokenizer, Dataset.from_dict({"prompt": ["a"], "completion": ["g"]}), labels)


def test_answers_are_greedy_in_any_batch(base):
    model, tokenizer = loaded(base)
    prompts = ["Tom was", "Long ago a brave king", "A fox", "Once"]
    found = answers(model, tokenizer, Dataset.from_dict({"prompt": prompts}), 6, batch_size=3)
    for prompt, text in zip(prompts, found, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)
        expected = tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
        assert text == expected.strip().partition("\n")[0].strip()


@pytest.mark.parametrize("task", list(TASKS))
def test_every_task_is_scored_zero_shot(base, task):
    found = task_scores(*loaded(base), Dataset.from_list(story_task(task, 6)), TASKS[task], max_new_tokens=4)
    wanted = {"accuracy": "accuracy", "answers": "f1", "bleu": "chrf", "rouge": "rougeL"}
    assert {"perplexity", "left_out", *(wanted[score] for score in TASKS[task].scores)} <= set(found)
    assert all(math.isfinite(value) for value in found.values())


def test_evaluate_scores_a_task_from_a_file(base, tmp_path, capsys):
    rows = [{"review": text, "stars": str(n % 2)} for n, text in enumerate(stories.sample(8, 0))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["evaluate", str(base), "--task", "classification", "--data", str(tmp_path / "rows.jsonl")]
    own = ["--prompt_template", "{review}\\nStars:", "--completion_template", " {stars}", "--labels", "0", "1", "2"]
    assert commands.main([*words, *own, "--num_texts", "6"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    task = get_task("classification", "{review}\nStars:", " {stars}")
    expected = task_scores(*loaded(base), Dataset.from_list(rows[:6]), task, labels=["0", "1", "2"])
    assert found == pytest.approx(expected) and found["texts"] == 6
    assert commands.main(words) == 1 and "needs the column `text`" in capsys.readouterr().err


# ---- training ----


def test_training_learns_the_task_and_keeps_the_best(base, tmp_path):
    """A random model learns the four kinds of stories, by completions alone."""
    options = FinetuneArguments(task="classification", num_examples=700, held_out_percent=20, max_length=140)
    quiet = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "learning_rate": 1e-2, "num_train_epochs": 3}
    args = FinetuneConfig(str(tmp_path / "out"), **quiet)
    folder, before, after_ = finetune(options, ModelConfig(model_name_or_path=str(base)), args)
    assert before["accuracy"] < 0.6 and after_["accuracy_low"] > after_["majority"]  # beyond chance at 95%
    assert after_["perplexity"] < before["perplexity"] / 5
    rows = Dataset.from_list(story_task("classification", 700, args.seed)).select(range(630, 700))
    again = task_scores(*loaded(folder), rows, TASKS["classification"], max_length=140)
    assert again["nats_per_token"] == pytest.approx(after_["nats_per_token"], rel=1e-5)
    assert "before_accuracy" in (folder / "README.md").read_text()


def test_it_stops_early_and_ends_with_the_best_checkpoint(base, tmp_path):
    """At a learning rate that ruins the model, the first evaluations are the best."""
    options = FinetuneArguments(task="translation", num_examples=60, held_out_percent=20)
    quiet = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "learning_rate": 3.0, "num_train_epochs": 30}
    quiet |= {"early_stopping_patience": 1}
    _, _, end = finetune(
        options, ModelConfig(model_name_or_path=str(base)), FinetuneConfig(str(tmp_path / "out"), **quiet)
    )
    state = json.loads(next((tmp_path / "out").glob("checkpoint-*/trainer_state.json")).read_text())
    losses = [row["eval_nll_per_token"] for row in state["log_history"] if "eval_nll_per_token" in row]
    assert state["epoch"] < 30 and state["best_metric"] == pytest.approx(min(losses))


def test_the_recipe_trains_an_adapter_on_a_file(base, tmp_path, capsys):
    rows = [{"source": text, "target": text.upper()} for text in ("tom", "anna", "leo", "max") * 6]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "--config",
        str(SCRIPT.with_name("config.yaml")),
        "--model_name_or_path",
        str(base),
        "--task",
        "translation",
    ]
    words += ["--data", str(tmp_path / "rows.jsonl"), "--held_out_percent", "25", "--use_cpu", "true", "--use_peft"]
    words += ["--lora_target_modules", "q_proj", "v_proj", "--num_train_epochs", "1", "--disable_tqdm", "true"]
    runpy.run_path(str(SCRIPT))["main"]([*words, "--output_dir", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "translation" in printed and "chrf" in printed
    assert (tmp_path / "out" / "model" / "adapter_config.json").is_file()
    assert not (tmp_path / "out" / "model" / "model.safetensors").exists()
    with pytest.raises(ValueError, match="too few to train on, to stop by and to score"):
        runpy.run_path(str(SCRIPT))["main"]([*words, "--held_out_percent", "2", "--output_dir", str(tmp_path / "two")])
