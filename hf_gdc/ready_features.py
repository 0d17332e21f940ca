"""Ready features of a completion's text and length; each makes a function with TRL's reward signature.

Left out: scorers that are models (`scorers`), and how features are spelt and called (`features`).
"""

import re
from collections.abc import Callable


def text_of(completion) -> str:
    """The completion's text, whether it is a string or chat messages."""
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)


def contains(word: str) -> Callable:
    """1.0 where the completion has this word or phrase as whole words, in any case."""
    return regex(rf"(?i)(?<!\w){re.escape(word)}(?!\w)")


def regex(pattern: str) -> Callable:
    """1.0 where the regular expression is found in the completion."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"feature {'regex:' + pattern!r}: not a regular expression ({error}).") from error
    return lambda completions, **_: [float(compiled.search(text_of(c)) is not None) for c in completions]


def count(word: str) -> Callable:
    """How often the word or phrase occurs as whole words, in any case."""
    compiled = re.compile(rf"(?i)(?<!\w){re.escape(word)}(?!\w)")
    return lambda completions, **_: [float(len(compiled.findall(text_of(c)))) for c in completions]


def starts_with(text: str) -> Callable:
    """1.0 where the completion begins with this text (leading spaces aside)."""
    return lambda completions, **_: [float(text_of(c).lstrip().startswith(text)) for c in completions]


def max_words(limit: str) -> Callable:
    """1.0 where the completion has at most this many words."""
    if not limit.isdigit():
        raise ValueError(f"max_words:{limit} is unknown; say a number of words, such as max_words:20.")
    return lambda completions, **_: [float(len(text_of(c).split()) <= int(limit)) for c in completions]


def length(unit: str = "tokens") -> Callable:
    """The completion's length in `tokens` (EOS included), `words` or `characters`."""
    if unit == "tokens":
        return lambda completion_ids, **_: [float(len(ids)) for ids in completion_ids]
    if unit not in ("words", "characters"):
        raise ValueError(f"length:{unit} is unknown; say length:tokens, length:words or length:characters.")
    measure = (lambda text: len(text.split())) if unit == "words" else len
    return lambda completions, **_: [float(measure(text_of(c))) for c in completions]


def cut(eos_ids: str) -> Callable:
    """1.0 where the completion does not end with one of these token ids, `cut:0` or `cut:0,2`: it has no EOS."""
    if not re.fullmatch(r"\d+(,\d+)*", eos_ids):
        raise ValueError(f"cut:{eos_ids} is unknown; say the ids of EOS tokens, such as cut:0 or cut:0,2.")
    ends = {int(number) for number in eos_ids.split(",")}
    return lambda completion_ids, **_: [float(not ids or ids[-1] not in ends) for ids in completion_ids]
