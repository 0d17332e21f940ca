"""Tasks as prompts and completions: a template for each, over the named columns of a dataset.

A task says how a row is written and which scores fit it. A column of the completion may hold a list: several right answers,
of which the first is learned and any counts. A dialogue has `messages`; each of the assistant's turns is a completion, and what
was said before it the prompt: in the tokenizer's chat template where it has one, else as lines `role: text`.

Left out: loading (`data`), scores (`task_scores`), training (`trainers/finetuning`).
"""

from dataclasses import dataclass
from string import Formatter

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .arguments import check_options
from .encoding import tokenize_completions, tokenize_prompts


@dataclass(frozen=True)
class Task:
    """How a row is written, and the scores of what a model makes of it: `accuracy`, `answers`, `bleu`, `rouge`."""

    prompt: str
    completion: str
    scores: tuple[str, ...]


TASKS = {
    "classification": Task("{text}\nLabel:", " {label}", ("accuracy",)),
    "summarisation": Task("{text}\nSummary:", " {summary}", ("rouge",)),
    "question_answering": Task("{context}\nQuestion: {question}\nAnswer:", " {answer}", ("answers",)),
    "translation": Task("{source}\nTranslation:", " {target}", ("bleu",)),
    "dialogue": Task("{dialogue}\nassistant:", " {reply}", ("rouge", "answers")),
}


def get_task(name: str, prompt_template: str | None = None, completion_template: str | None = None) -> Task:
    """A task by its name, with templates of one's own; a backslash and n in them is a new line.

    Raises:
        ValueError: an unknown name.
    """
    check_options([name], list(TASKS), "the list of tasks")
    task, own = TASKS[name], (prompt_template, completion_template)
    prompt, completion = (text if text is None else text.replace("\\n", "\n") for text in own)
    return Task(prompt or task.prompt, completion or task.completion, task.scores)


def task_rows(dataset: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Rows with `prompt`, `completion` and `references`, the texts that count as right.

    Raises:
        ValueError: a template names a column that the dataset lacks, or a row has no value there.
    """
    chat = tokenizer.chat_template is not None
    found = []
    for row in dataset:
        for turn in _turns(row["messages"]) if "messages" in row else [row]:
            if chat and "messages" in row:
                references = [turn["reply"]]
                pair = {"prompt": turn["before"], "completion": [{"role": "assistant", "content": turn["reply"]}]}
            else:
                prompt, texts = _fill(task.prompt, turn)[0], _fill(task.completion, turn)
                references = [text.strip() for text in texts]
                pair = {"prompt": prompt, "completion": texts[0]}
            found.append(pair | {"references": references})
    if not found:
        raise ValueError(
            "no row has a turn of the assistant: a dialogue's `messages` need one with the role 'assistant'."
        )
    return Dataset.from_list(found)


def _turns(messages: list[dict]) -> list[dict]:
    """Each of the assistant's turns, with what was said before."""
    lines = [f"{message['role']}: {message['content']}" for message in messages]
    return [
        {"dialogue": "\n".join(lines[:n]), "reply": message["content"], "before": messages[:n]}
        for n, message in enumerate(messages)
        if message["role"] == "assistant" and n > 0
    ]


def _fill(template: str, row: dict) -> list[str]:
    """The template with the row's values: one text for each value of a column that holds a list."""
    names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    for name in names:
        if row.get(name) in (None, []):
            have = ", ".join(f"`{column}`" for column, value in row.items() if value is not None)
            raise ValueError(
                f"the template {template!r} needs the column `{name}`, and a row has {have}: name your own columns in "
                "prompt_template and completion_template."
            )
    several = next((name for name in names if isinstance(row[name], list)), None)
    values = [row] if several is None else [row | {several: value} for value in row[several]]
    return [template.format(**value) for value in values]


def fitting_rows(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, max_new_tokens: int = 0
) -> Dataset:
    """The rows whose prompt leaves room for the completion, and for as many new tokens: cut, they would be another task.

    Raises:
        ValueError: none does.
    """
    prompts, completions = list(rows["prompt"]), list(rows["completion"])
    starts = tokenize_prompts(prompts, tokenizer)
    ends = tokenize_completions(prompts, completions, tokenizer)
    lengths = [len(start) + max(len(end), max_new_tokens) for start, end in zip(starts, ends, strict=True)]
    if min(lengths) > max_length:
        raise ValueError(
            f"no row fits into max_length={max_length} tokens (the shortest needs {min(lengths)}, with {max_new_tokens} new "
            "tokens or its completion): raise max_length, as far as the model's context goes, or lower max_new_tokens."
        )
    return rows.select([n for n, length in enumerate(lengths) if length <= max_length])
