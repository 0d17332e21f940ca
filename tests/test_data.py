"""Sources, tokenizers, rows and the order of prompts: properties, and messages for people."""

import json
import os
import subprocess
import sys
from collections import Counter

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from hf_gdc import data, encoding, prompt_order, stories

TEXTS = stories.sample(2_000, seed=0)
TOKENIZER = data.train_tokenizer(TEXTS, vocab_size=768, model_max_length=64)
BOS, EOS = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|eos|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = [{"role": "user", "content": "Tell me of Tom."}]


def plain_ids(text, tokenizer=TOKENIZER):
    """The ids of a text, or of several, without what the tokenizer adds to them."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def variant(bos="<|bos|>", eos="<|eos|>", default="$A", chat_template=None):
    """A tokenizer that differs in its special tokens and in what it adds by default ("<|bos|> $A")."""
    tokenizer = data.train_tokenizer(TEXTS[:50], vocab_size=300)
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template = bos, eos, chat_template
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in data.SPECIAL_TOKENS.values()]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=default, special_tokens=special)
    return tokenizer


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


# ---- sources ----


def test_stories_and_their_slices():
    everything = data.load_text("stories", num_stories=100, seed=5)["text"]
    assert list(everything) == stories.sample(100, 5)
    train = data.load_text("stories", "train[:90%]", num_stories=100, seed=5)["text"]
    held_out = data.load_text("stories", "train[90%:]", num_stories=100, seed=5, streaming=True)
    assert list(train) + [row["text"] for row in held_out] == list(everything)


def test_prompts_of_stories_are_their_first_sentences():
    rows = data.load_prompts("stories", num_stories=20, seed=5)
    assert [row["prompt"] + row["completion"] for row in rows] == stories.sample(20, 5)
    assert all(row["prompt"].endswith(".") and row["completion"].startswith(" ") for row in rows)


def test_a_text_file_is_one_text_sliced_by_characters(tmp_path):
    text = "\ufeffÀ la mer\r\n" * 10
    source = write(tmp_path / "a.txt", text)
    assert data.load_text(source)[0]["text"] == text[1:]  # less the byte order mark
    parts = [data.load_text(source, split)[0]["text"] for split in ("train[:90%]", "train[90%:]", "train[-5:]")]
    assert parts[0] + parts[1] == text[1:] and parts[2] == text[-5:]
    assert [row["text"] for row in data.load_text(source, streaming=True)] == [text[1:]]


def test_a_text_file_by_paragraphs_and_lines(tmp_path):
    source = write(tmp_path / "a.txt", "\n\nOne,\r\nand more.\n \n\n  Two.\n\nThree.\n")
    paragraphs = data.load_text(source, sample_by="paragraph")["text"]
    assert list(paragraphs) == ["One,\r\nand more.", "  Two.", "Three."]
    lines = data.load_text(source, "train[1:]", sample_by="line", streaming=True)
    assert [row["text"] for row in lines] == ["and more.", "  Two.", "Three."]
    with pytest.raises(ValueError, match="'document', 'paragraph' or 'line', but is 'sentence'"):
        data.load_text(source, sample_by="sentence")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "array.json"])
def test_json_rows(tmp_path, name, streaming):
    rows = [{"prompt": "Ä", "completion": "b", "score": 1}, {"prompt": "c", "completion": "d", "score": 2}]
    content = json.dumps(rows, indent=1) if name == "array.json" else "\n\n".join(map(json.dumps, rows)) + "\n"
    source = write(tmp_path / name, content)
    assert list(data.load_text(source, streaming=streaming)) == rows
    assert list(data.load_prompts(source, streaming=streaming)) == rows
    if not streaming:
        assert list(data.load_text(source, "train[1:]")) == rows[1:]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_id_goes_to_load_dataset(tmp_path, monkeypatch, streaming):
    folder = tmp_path / "folder"
    folder.mkdir()
    rows = [{"prompt": CHAT, "completion": [{"role": "assistant", "content": "No."}]}]
    write(folder / "train.jsonl", "\n".join(map(json.dumps, rows)))
    assert list(data.load_prompts(str(folder), streaming=streaming)) == rows
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.Dataset.from_list([{"text": "a"}])

    monkeypatch.setattr(data, "load_dataset", load_dataset)
    data.load_text("owner/name:config", "test", streaming=streaming)
    data.load_text("owner/name", streaming=streaming)
    assert calls == [
        (("owner/name", "config"), {"split": "test", "streaming": streaming}),
        (("owner/name", None), {"split": "train", "streaming": streaming}),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, r"no file '.*missing\.txt' \(looked for /"),
        ("missing.jsonl", None, r"no file '.*missing\.jsonl'"),
        ("empty.txt", "", "is empty"),
        ("blank.txt", " \n", "is empty"),
        ("empty.jsonl", "", "has no rows"),
        ("empty.json", "[]", "has no rows"),
        ("latin.txt", "é".encode("latin-1"), "is not UTF-8 text"),
        ("binary.txt", b"a\0b", "is a binary file"),
        ("latin.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', "line 2: not UTF-8"),
        ("bad.jsonl", '{"text": "a"}\n\n{"text": b}\n', "line 3, column 10: not JSON"),
        ("bad.json", '[{"text": "a"},\n {"text": b}]', "line 2, column 11: not JSON"),
        ("rows.jsonl", '{"text": "a"}\n["b"]', r"line 2: a row must be a JSON object, got \['b'\]"),
        ("columns.jsonl", '{"txt": "a", "n": 1}', "`text`, or `prompt` and `completion`; it has `txt`, `n`"),
        (
            "gaps.jsonl",
            '{"text": "a"}\n{"n": 1}\n{"text": null}',
            "column `text` .* has 2 rows without a value",
        ),
        ("number.jsonl", '{"text": 3}', "column `text` .* must hold text .* not 3"),
        ("table.tsv", "text\na", r"must end in \.txt, \.jsonl, \.json or \.csv"),
    ],
)
def test_errors_of_files(tmp_path, name, content, message):
    source = str(tmp_path / name) if content is None else write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        data.load_text(source)


def test_other_errors_of_sources(tmp_path, monkeypatch):
    lines = write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": b}')
    with pytest.raises(ValueError, match="line 2, column 10"):
        list(data.load_text(lines, streaming=True))
    with pytest.raises(ValueError, match="split 'train' only"):
        data.load_text(lines, "test", streaming=True)
    for split in ("test", "train[:9x%]", "train[:10]+train[20:]"):
        with pytest.raises(ValueError, match=r"Use 'train' or one slice of it, such as 'train\[:90%\]'"):
            data.load_text("stories", split, num_stories=50)
    with pytest.raises(ValueError, match="has no rows"):
        data.load_text("stories", "train[:0]", num_stories=5)
    with pytest.raises(ValueError, match="needs the column `prompt`; it has `text`"):
        data.load_prompts(write(tmp_path / "a.txt", "text"))

    def load_dataset(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'no/such' doesn't exist on the Hub")

    monkeypatch.setattr(data, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="it is not 'stories', there is no /.*no/such, .* doesn't exist on the Hub"):
        data.load_text("no/such")


# ---- tokenizers ----


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_text_comes_back_exactly(text):
    bos, *ids = TOKENIZER(text)["input_ids"]
    assert bos == BOS and ids == plain_ids(text)
    assert TOKENIZER.decode(ids) == text and TOKENIZER.decode([bos, *ids]) == "<|bos|>" + text


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="abc \n.é"))
def test_characters_come_back_exactly(text):
    tokenizer = data.char_tokenizer(["abc", " \n.é"])
    bos, *ids = tokenizer(text)["input_ids"]
    assert bos == tokenizer.bos_token_id and ids == plain_ids(text, tokenizer)
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
    assert plain_ids("ax", tokenizer)[1] == tokenizer.unk_token_id


@pytest.mark.parametrize("tokenizer", [TOKENIZER, data.char_tokenizer(TEXTS)], ids=["bpe", "char"])
def test_a_saved_tokenizer_is_the_same(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(TEXTS[:20])["input_ids"] == tokenizer(TEXTS[:20])["input_ids"]
    assert plain_ids(TEXTS[:20], loaded) == plain_ids(TEXTS[:20], tokenizer)
    assert loaded.decode(plain_ids(TEXTS[0], loaded)) == TEXTS[0]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "model_max_length", "vocab_size"):
        assert getattr(loaded, name) == getattr(tokenizer, name)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, data.char_tokenizer(TEXTS)], ids=["bpe", "char"])
def test_bos_alone_is_added_by_default(tokenizer):
    bos, special = tokenizer.bos_token_id, set(tokenizer.all_special_ids)
    plain = plain_ids(TEXTS, tokenizer)
    assert tokenizer(TEXTS)["input_ids"] == [[bos, *ids] for ids in plain]
    assert not special & {i for ids in plain for i in ids}
    assert tokenizer("Tom", "Ben")["input_ids"] == [bos, *plain_ids("Tom", tokenizer), *plain_ids("Ben", tokenizer)]


def test_words_of_the_stories_are_tokens():
    words = Counter(word for text in TEXTS for word in text.replace(".", "").replace(",", "").split()[1:])
    whole = sum(count for word, count in words.items() if len(plain_ids(" " + word)) == 1)
    assert whole / sum(words.values()) > 0.99
    assert sum(len(ids) for ids in plain_ids(TEXTS)) / len(TEXTS) < 40


@pytest.mark.slow
def test_training_is_deterministic():
    program = (
        "from hf_gdc import data, stories;"
        "print(data.train_tokenizer(stories.sample(300, 0), 400).backend_tokenizer.to_str())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_a_vocabulary_smaller_than_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab_size=258 is too small: .* need 259"):
        data.train_tokenizer(TEXTS, vocab_size=258)


# ---- prompts and completions ----


def test_prompt_and_completion_concatenate_exactly():
    rows = data.load_prompts("stories", num_stories=50)
    starts = encoding.tokenize_prompts(list(rows["prompt"]), TOKENIZER)
    ends = encoding.tokenize_completions(list(rows["prompt"]), list(rows["completion"]), TOKENIZER)
    whole = TOKENIZER([row["prompt"] + row["completion"] for row in rows])["input_ids"]
    assert [start + end for start, end in zip(starts, ends, strict=True)] == [ids + [EOS] for ids in whole]
    assert encoding.tokenize_prompts([], TOKENIZER) == encoding.tokenize_completions([], [], TOKENIZER) == []


@pytest.mark.parametrize(
    ("options", "empty", "before"),
    [
        ({}, "<|bos|>", []),
        ({"default": "<|bos|> $A"}, "<|bos|>", ["<|bos|>"]),
        ({"default": "<|bos|> $A <|eos|>"}, "<|bos|>", ["<|bos|>"]),
        ({"default": "$A <|eos|>"}, "<|bos|>", []),
        ({"bos": None}, "<|eos|>", []),
        ({"bos": "<|eos|>"}, "<|eos|>", []),
        ({"bos": "<|eos|>", "default": "<|eos|> $A"}, "<|eos|>", ["<|eos|>"]),
    ],
)
def test_text_prompts_never_end_in_eos(options, empty, before):
    tokenizer = variant(**options)
    prefix, empty = tokenizer.convert_tokens_to_ids(before), tokenizer.convert_tokens_to_ids([empty])
    text = plain_ids("Tom", tokenizer)
    assert encoding.tokenize_prompts(["Tom", "", "Tom<|eos|>"], tokenizer) == [
        prefix + text,
        empty,
        prefix + text,
    ]
    completions = encoding.tokenize_completions(["", "", ""], ["Tom", "", "Tom<|eos|> and"], tokenizer)
    eos = tokenizer.eos_token_id
    assert completions == [text + [eos], [eos], text + [eos]]


def test_without_bos_and_eos_there_is_no_start_and_no_end():
    tokenizer = variant(bos=None, eos=None)
    assert encoding.tokenize_prompts(["Tom"], tokenizer) == plain_ids(["Tom"], tokenizer)
    with pytest.raises(ValueError, match="set `tokenizer.bos_token`"):
        encoding.tokenize_prompts([""], tokenizer)
    with pytest.raises(ValueError, match="set `tokenizer.eos_token`"):
        encoding.tokenize_completions([""], ["Tom"], tokenizer)


def test_chats():
    tokenizer = variant(chat_template=CHAT_TEMPLATE)
    (start,) = encoding.tokenize_prompts([CHAT], tokenizer)
    assert tokenizer.decode(start) == "<user>Tell me of Tom.<|eos|>\n<assistant>"
    answer = [{"role": "assistant", "content": "He was kind."}]
    (end,) = encoding.tokenize_completions([CHAT], [answer], tokenizer)
    assert tokenizer.decode(end) == "He was kind.<|eos|>"  # without the template's line end after EOS
    named = CHAT_TEMPLATE.replace("<assistant>", "<{{ name }}>")
    (start,) = encoding.tokenize_prompts([CHAT], variant(chat_template=named), {"name": "bot"})
    assert tokenizer.decode(start).endswith("<bot>")
    with pytest.raises(ValueError, match="writes a prompt differently"):
        encoding.tokenize_completions([CHAT], [answer], variant(chat_template=named), {"name": "bot"})


# ---- rows ----


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_text(streaming):
    rows = list(encoding.tokenize_rows(data.load_text("stories", num_stories=30, streaming=streaming), TOKENIZER, 40))
    for row, text in zip(rows, stories.sample(30, 0), strict=True):
        ids = [BOS, *plain_ids(text), EOS]
        assert row == {"input_ids": ids[:40], "labels": [-100, *ids[1:]][:40]}  # cut without EOS
    assert {len(row["input_ids"]) for row in rows} >= {40} and any(EOS in row["labels"] for row in rows)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_prompts_and_completions(tmp_path, streaming):
    source = write(tmp_path / "a.jsonl", '{"prompt": "Tom", "completion": " slept", "n": 1}')
    (row,) = encoding.tokenize_rows(data.load_text(source, streaming=streaming), TOKENIZER, 40)
    start, end = [BOS, *plain_ids("Tom")], [*plain_ids(" slept"), EOS]
    assert row == {"input_ids": start + end, "labels": [-100] * len(start) + end}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("shared", [False, True], ids=["bos", "bos is eos"])
def test_blocks(streaming, shared):
    tokenizer = variant(bos="<|eos|>") if shared else TOKENIZER
    blocks = list(
        encoding.tokenize_blocks(data.load_text("stories", num_stories=30, streaming=streaming), tokenizer, 64)
    )
    start = [] if shared else [BOS]
    stream = [
        i for text in stories.sample(30, 0) for i in [*start, *plain_ids(text, tokenizer), tokenizer.eos_token_id]
    ]
    assert [i for row in blocks for i in row["input_ids"]] == stream[: len(stream) // 64 * 64]
    assert all(len(row["input_ids"]) == 64 and row["labels"] == row["input_ids"] for row in blocks)


def test_blocks_of_a_short_text_are_refused(tmp_path):
    source = write(tmp_path / "a.txt", "Tom was kind.")
    with pytest.raises(ValueError, match="fewer tokens than one block of 64"):
        encoding.tokenize_blocks(data.load_text(source), TOKENIZER, 64)


def test_padding_is_known_by_length_not_by_id():
    rows = [{"input_ids": [5, 6, EOS], "labels": [-100, 6, EOS]}, {"input_ids": [EOS], "labels": [EOS]}]
    batch = encoding.RightPadCollator(pad_token_id=EOS)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, EOS], [EOS, EOS, EOS]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, EOS], [EOS, -100, -100]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


# ---- the order of prompts ----

PATTERN = st.tuples(st.integers(1, 20), st.integers(1, 6), st.integers(1, 4), st.integers(1, 3))


@settings(max_examples=100, deadline=None)
@given(PATTERN, st.booleans(), st.integers(0, 3))
def test_prompt_sampler(pattern, shuffle, epoch):
    num_rows, prompts, repeats, batches = pattern
    if num_rows < prompts:
        with pytest.raises(ValueError, match=f"has {num_rows} prompts, and one batch of rollouts takes {prompts}"):
            prompt_order.PromptSampler(*pattern)
        return
    sampler = prompt_order.PromptSampler(*pattern, shuffle=shuffle, seed=3)
    sampler.set_epoch(epoch)
    indices = list(sampler)
    assert len(indices) == len(sampler) and indices == list(sampler)
    size = prompts * repeats
    seen = []
    for start in range(0, len(indices), size * batches):
        batch = indices[start : start + size]
        assert indices[start : start + size * batches] == batch * batches
        chunk = batch[::repeats]
        assert batch == [i for i in chunk for _ in range(repeats)]
        seen += chunk
    assert len(set(seen)) == len(seen) == num_rows // prompts * prompts
    assert set(seen) <= set(range(num_rows)) and (shuffle or seen == sorted(seen))


def test_each_epoch_has_its_own_order():
    sampler = prompt_order.PromptSampler(50, 5, seed=1)
    first = list(sampler)
    sampler.set_epoch(1)
    assert first != list(sampler)
    sampler.set_epoch(0)
    assert first == list(sampler) != list(prompt_order.PromptSampler(50, 5, seed=2))


def test_prompt_stream_has_the_samplers_pattern():
    rows = datasets.Dataset.from_list([{"prompt": str(i)} for i in range(11)])
    stream = prompt_order.PromptStream(rows.to_iterable_dataset(), 3, 2, 2)
    expected = [rows[i] for i in prompt_order.PromptSampler(11, 3, 2, 2, shuffle=False)]
    assert list(stream) == expected == list(stream)
    batches = list(DataLoader(stream, batch_size=6, collate_fn=list))
    assert [len(batch) for batch in batches] == [6] * 6 and batches[0] == batches[1] != batches[2]
    with pytest.raises(ValueError, match="has 11 prompts, and one batch of rollouts takes 12"):
        list(prompt_order.PromptStream(rows.to_iterable_dataset(), 12))
    shuffled = prompt_order.PromptStream(rows.to_iterable_dataset().shuffle(seed=0, buffer_size=11), 3)
    first = list(shuffled)
    shuffled.set_epoch(1)
    assert list(shuffled) != first


def test_empty_prompts():
    prompts = prompt_order.EmptyPrompts(3)
    assert len(prompts) == 3 and list(prompts) == [{"prompt": ""}] * 3
