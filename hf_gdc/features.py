"""Features: functions over completions that constraints, moments and rewards are made of.

A feature has TRL's reward-function signature, `f(prompts, completions, completion_ids, **columns) -> list[float]`, and is
called once per batch; so every TRL reward function is a feature. In YAML, on the command line and as the first argument of
a factor it may be spelt as text:

    contains:dragon          a ready feature with its argument
    my_features.py:is_happy  a function in a file
    my_package.rewards:f     a function in an importable module

Left out: classifiers and embedding scorers.
"""

import asyncio
import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .rollouts import Rollouts


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


READY: dict[str, Callable] = {f.__name__: f for f in (contains, regex, count, starts_with, max_words, length)}


class Feature:
    """A named function over completions.

    Args:
        source: a function with TRL's reward signature (plain or async) or a text as in this module's docstring.
        name: how it is called in logs; default: the text, or the function's name.

    Raises:
        ValueError: an unknown spelling, file or function.
    """

    def __init__(self, source: "str | Callable | Feature", name: str | None = None):
        if isinstance(source, Feature):
            self.function, self.spec, self.name = source.function, source.spec, name or source.name
        elif isinstance(source, str):
            self.function, self.spec, self.name = _load(source), source, name or source
        elif callable(source):
            self.function, self.spec, self.name = source, _importable_spec(source), name or source.__name__
        else:
            raise ValueError(f"a feature is a function or a text such as 'contains:dragon', not {source!r}.")
        parameters = inspect.signature(self.function).parameters.values()
        takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        self._accepted = None if takes_all else {p.name for p in parameters}

    def __call__(self, rollouts: Rollouts, allow_none: bool = False) -> Tensor:
        """(B,) values in float64, computed once per batch and kept in `rollouts.scores`; NaN for an allowed None.

        Raises:
            ValueError: the wrong number of values, a NaN, or a None where it is not allowed; the feature is named.
        """
        if self.name not in rollouts.scores:
            rollouts.scores[self.name] = self._values(rollouts)
        values = rollouts.scores[self.name]
        if not allow_none and bool(values.isnan().any()):
            raise ValueError(
                f"feature {self.name!r} returned None for sample {int(values.isnan().nonzero()[0])}. None means 'not "
                "applicable' and is allowed in a Reward only; return a number."
            )
        return values

    def _values(self, rollouts: Rollouts) -> Tensor:
        arguments = {
            **rollouts.columns,
            "prompts": rollouts.prompts,
            "completions": rollouts.completions,
            "completion_ids": rollouts.completion_ids(),
        }
        if self._accepted is not None:
            arguments = {key: value for key, value in arguments.items() if key in self._accepted}
        values = self.function(**arguments)
        if inspect.isawaitable(values):
            values = asyncio.run(_wait(values))
        values = values.tolist() if isinstance(values, Tensor) else list(values)
        if len(values) != len(rollouts):
            raise ValueError(
                f"feature {self.name!r} returned {len(values)} values for {len(rollouts)} completions; "
                "return exactly one number for each."
            )
        missing = torch.tensor([value is None for value in values], dtype=torch.bool)
        numbers = [float("nan") if value is None else float(value) for value in values]
        result = torch.tensor(numbers, dtype=torch.float64)
        bad = ~torch.isfinite(result) & ~missing
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"feature {self.name!r} returned {values[row]} for sample {row}: "
                f"{text_of(rollouts.completions[row])[:80]!r}. Return a finite number."
            )
        return result

    def __repr__(self) -> str:
        return self.name


async def _wait(awaitable):
    return await awaitable


def _importable_spec(function: Callable) -> str | None:
    """module:name where the function can be found again by it, else None (lambdas, closures, scripts)."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if module in (None, "__main__") or not name.isidentifier():
        return None
    return f"{module}:{name}"


def _load(spec: str) -> Callable:
    source, _, argument = spec.partition(":")
    if source in READY:
        if not argument and source != "length":
            raise ValueError(
                f"feature {spec!r} needs an argument, such as {source}:{'20' if source == 'max_words' else 'dragon'}."
            )
        return READY[source](argument) if argument else READY[source]()
    path, colon, name = spec.rpartition(":")
    if not colon:
        raise ValueError(
            f"unknown feature {spec!r}. Ready ones: {', '.join(f'{ready}:...' for ready in READY)}; your own: "
            "my_file.py:function or my_module:function."
        )
    if path.endswith(".py"):
        if not Path(path).is_file():
            raise ValueError(f"feature {spec!r}: there is no file {path!r} (looked in {Path.cwd()}).")
        module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(path)
        except ImportError as error:
            raise ValueError(
                f"feature {spec!r}: {path!r} is neither a ready feature nor a module ({error})."
            ) from error
    function = getattr(module, name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ValueError(f"feature {spec!r}: {path} has no function {name!r}; it has {', '.join(functions) or 'none'}.")
    return function
