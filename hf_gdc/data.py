"""Where text and prompts come from, and tokenizers trained on them.

Left out: ids and rows (`encoding`), the order of prompts (`prompt_order`), and filtering or mixing (`datasets` itself).
"""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from datasets import Dataset, IterableDataset, ReadInstruction, load_dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from . import preferences, stories

Rows = Dataset | IterableDataset
Messages = list[dict]  # chat: [{"role": "user", "content": "Hi"}, ...]
SPECIAL_TOKENS = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
ROW_ENDS = {"paragraph": r"\r?\n\s*\n", "line": r"\r?\n"}  # of a .txt file


# ---- sources ----


def load_text(
    source: str,
    split: str = "train",
    streaming: bool = False,
    num_stories: int = 10_000,
    seed: int = 0,
    sample_by: str = "document",
) -> Rows:
    """Real data: rows with a column `text`, or with `prompt` and `completion`.

    Args:
        source: "stories" (the embedded corpus), a `.txt` file (see `sample_by`), a `.jsonl` or `.json` file
            (one row per object), a local folder that `datasets.load_dataset` reads, or a Hub dataset, `id` or
            `id:config`.
        split: a split or a slice of one, such as "train[:90%]". Files and the stories have only "train"; a
            slice of a `.txt` file that is one row counts characters, every other one counts rows.
        streaming: give an `IterableDataset`.
        num_stories, seed: how many stories to sample, and which; other sources ignore both.
        sample_by: what is a row of a `.txt` file, as `datasets` calls it: the "document", a "paragraph" (between
            blank lines) or a "line"; blank ones are left out. Other sources ignore it.

    Raises:
        ValueError: for a source that is missing, empty, not text, not JSON, or without the columns.
    """
    rows = [{"text": text} for text in stories.sample(num_stories, seed)] if source == "stories" else None
    if sample_by not in ("document", *ROW_ENDS):
        raise ValueError(f"sample_by must be 'document', 'paragraph' or 'line', but is {sample_by!r}.")
    dataset = _load(source, split, streaming, rows, sample_by)
    return _checked(dataset, source, ("text",), ("prompt", "completion"))


def load_prompts(
    source: str, split: str = "train", streaming: bool = False, num_stories: int = 10_000, seed: int = 0
) -> Rows:
    """Rows with a column `prompt`: plain text, or chat messages; see `load_text`.

    The prompt of a story is its first sentence, and the rest is its `completion`.
    """
    rows = None
    if source == "stories":
        parts = [text.partition(".") for text in stories.sample(num_stories, seed)]
        rows = [{"prompt": first + stop, "completion": rest} for first, stop, rest in parts]
    return _checked(_load(source, split, streaming, rows), source, ("prompt",))


def load_preferences(
    source: str, split: str = "train", num_pairs: int = 4000, temperature: float = 1.0, seed: int = 0
) -> Rows:
    """Rows with `chosen` and `rejected`, completions of a `prompt` if there is that column, else whole texts or chats.

    Args:
        source: "stories", which is `preferences.story_preferences`, or what `load_text` takes.
        num_pairs, temperature, seed: of the stories' preferences; other sources ignore them.
    """
    rows = preferences.story_preferences(num_pairs, temperature, seed) if source == "stories" else None
    return _checked(_load(source, split, False, rows), source, ("prompt", "chosen", "rejected"), ("chosen", "rejected"))


def load_rows(source: str, split: str = "train") -> Dataset:
    """Rows with whatever columns they have, from a `.csv`, `.jsonl` or `.json` file, a folder or the Hub; see `load_text`."""
    dataset = _load(source, split, False, None)
    if not len(dataset):
        raise ValueError(f"{source!r} has no rows in the split or slice that was asked for")
    return dataset


def _checked(dataset: Rows, source: str, *alternatives: tuple[str, ...]) -> Rows:
    """The dataset, if it has all columns of one alternative, as text or as chat messages."""
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"{source!r} has no rows in the split or slice that was asked for")
    wanted = next((names for names in alternatives if first.keys() >= set(names)), None)
    if wanted is None:
        needs = ", or ".join(" and ".join(f"`{name}`" for name in names) for names in alternatives)
        have = ", ".join(f"`{name}`" for name in first)
        raise ValueError(f"{source!r} needs the column {needs}; it has {have}: use `dataset.rename_column`")
    for name in wanted:
        if not isinstance(first[name], str) and not _is_chat(first[name]):
            raise ValueError(
                f"column `{name}` of {source!r} must hold text or lists of messages with `role` and"
                f" `content`, not {first[name]!r}"
            )
        missing = dataset.data.column(name).null_count if isinstance(dataset, Dataset) else 0
        if missing:
            raise ValueError(f"column `{name}` of {source!r} has {missing} rows without a value: remove them")
    return dataset


def _is_chat(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value)


def _load(source: str, split: str, streaming: bool, rows: list[dict] | None, sample_by: str = "document") -> Rows:
    path = Path(source)
    if rows is not None:
        start, stop = _slice(split, len(rows), source)
        dataset = Dataset.from_list(rows[start:stop])
    elif path.suffix == ".txt":
        dataset = Dataset.from_dict({"text": _text_rows(path, split, sample_by)})
    elif path.suffix in (".jsonl", ".json"):
        _existing(path)
        if streaming:
            if split != "train":
                raise ValueError(f"a streamed file has the split 'train' only, not {split!r}: use streaming=False")
            return IterableDataset.from_generator(_read_json, gen_kwargs={"path": path})
        rows = list(_read_json(path))
        start, stop = _slice(split, len(rows), source)
        dataset = Dataset.from_list(rows[start:stop])
    elif path.suffix == ".csv":
        rows = list(csv.DictReader(io.StringIO(_read_text(path), newline="")))
        start, stop = _slice(split, len(rows), source)
        dataset = Dataset.from_list(rows[start:stop])
    elif path.is_file():
        raise ValueError(f"{source!r}: a file must end in .txt, .jsonl, .json or .csv; load others with `datasets`")
    else:
        name, _, config = (source, "", "") if path.is_dir() else source.partition(":")
        try:
            return load_dataset(name, config or None, split=split, streaming=streaming)
        except (FileNotFoundError, ConnectionError) as error:
            raise ValueError(
                f"found no data {source!r}: it is not 'stories', there is no {path.resolve()}, and as a"
                f" dataset of the Hub: {error}"
            ) from error
    return dataset.to_iterable_dataset() if streaming else dataset


def _slice(split: str, size: int, source: str) -> tuple[int, int]:
    """Where the slice of "train" that `split` spells starts and stops, by `datasets`' own rules."""
    try:
        (part,) = ReadInstruction.from_spec(split).to_absolute({"train": size})
    except ValueError as error:
        raise ValueError(
            f"split={split!r} of {source!r}: {error} Use 'train' or one slice of it, such as 'train[:90%]'."
        ) from error
    return part.from_ or 0, size if part.to is None else part.to


def _existing(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r} (looked for {path.resolve()})")


def _text_rows(path: Path, split: str, sample_by: str) -> list[str]:
    """The slice of a file as one text, or as its paragraphs or lines."""
    text = _read_text(path)
    if sample_by == "document":
        start, stop = _slice(split, len(text), str(path))
        return [text[start:stop]] if start < stop else []
    texts = [part.strip("\r\n") for part in re.split(ROW_ENDS[sample_by], text) if part.strip()]
    start, stop = _slice(split, len(texts), str(path))
    return texts[start:stop]


def _read_text(path: Path) -> str:
    _existing(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8 text ({error}): convert it first") from error
    if "\0" in text:
        raise ValueError(f"{str(path)!r} is a binary file (it has a zero byte): give a text file")
    if not text.strip():
        raise ValueError(f"the file {str(path)!r} is empty")
    return text


def _read_json(path: Path) -> Iterator[dict]:
    """The objects of a file: one a line, or one array of them."""
    with path.open("rb") as file:
        is_array = file.read(64).lstrip().startswith(b"[")
        file.seek(0)
        for number, line in enumerate([file.read()] if is_array else file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{str(path)!r}, line {number}: not UTF-8 text: {error}") from error
            except json.JSONDecodeError as error:
                place = f"line {number - 1 + error.lineno}, column {error.colno}"
                raise ValueError(f"{str(path)!r}, {place}: not JSON: {error.msg}") from error
            for row in value if is_array else [value]:
                if not isinstance(row, dict):
                    raise ValueError(f"{str(path)!r}, line {number}: a row must be a JSON object, got {row!r}")
                yield row


# ---- tokenizers ----


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = 768, model_max_length: int | None = None
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`: deterministic, and any text comes back exactly.

    It puts `<|bos|>` before a text, as pretraining does, unless called with `add_special_tokens=False`. As with every
    tokenizer of transformers, a text that spells a special token becomes it.

    Args:
        vocab_size: at least 259 (256 bytes and 3 special tokens); fewer tokens come out where texts are few.
            At the default all words of the stories are single tokens.
        model_max_length: the context length in tokens; None for no limit.
    """
    bytes_ = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(bytes_) + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size={vocab_size} is too small: bytes and special tokens alone need {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=bytes_,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _finished(tokenizer, model_max_length, SPECIAL_TOKENS)


def char_tokenizer(texts: Iterable[str], model_max_length: int | None = None) -> PreTrainedTokenizerFast:
    """One token for each character of `texts`, as in character-level benchmarks; others become `<|unk|>`."""
    return _closed_vocabulary(texts, r"[\s\S]", model_max_length)


def word_tokenizer(texts: Iterable[str], model_max_length: int | None = None) -> PreTrainedTokenizerFast:
    """One token for each word of `texts` (with the space before it) and each other character; others are `<|unk|>`.

    The smallest and fastest choice for a closed vocabulary such as the stories'; use `train_tokenizer` for open text.
    """
    return _closed_vocabulary(texts, r" ?\w+|[^\w]", model_max_length)


def _closed_vocabulary(texts: Iterable[str], pattern: str, model_max_length: int | None) -> PreTrainedTokenizerFast:
    special = SPECIAL_TOKENS | {"unk_token": "<|unk|>"}
    splitter = pre_tokenizers.Split(Regex(pattern), "isolated")
    pieces = sorted({piece for text in texts for piece, _ in splitter.pre_tokenize_str(text)})
    tokens = [*special.values(), *pieces]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Fuse()
    return _finished(tokenizer, model_max_length, special)


def _finished(tokenizer: Tokenizer, model_max_length: int | None, special: dict) -> PreTrainedTokenizerFast:
    bos = special["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=model_max_length, **special)
