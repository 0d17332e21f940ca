"""Features: functions over completions that constraints, moments and rewards are made of.

A feature has TRL's reward-function signature, `f(prompts, completions, completion_ids, **columns) -> list[float]`, and is
called once per batch; so every TRL reward function is a feature. In YAML, on the command line and as the first argument of
a factor it may be spelt as text:

    contains:dragon                         a ready feature with its argument (`ready_features`)
    vader:compound                          a sentiment score (`scorers`)
    classifier:org/model=positive           a Hub classifier's probability of a label, or
    classifier:path/to/model=positive>0.5   whether that is above a threshold (`scorers`)
    reward_model:org/model                  a Hub reward model's number for prompt and completion (`reward_models`)
    similarity:org/encoder=texts.txt        cosine to the nearest text of a file, by any encoder (`scorers`)
    image_class:path/to/classifier=3        of images: the probability of a class; also brightness (`images/features`)
    my_features.py:is_happy                 a function in a file
    my_package.rewards:f                    a function in an importable module

Left out: features of pairs of completions.
"""

import asyncio
import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from transformers import TrainerState

from .rollouts import Rollouts

# name -> module:function, imported when it is used: an exported sampler carries only what its features need
READY = {
    name: f"ready_features:{name}"
    for name in ("contains", "regex", "count", "starts_with", "max_words", "length", "cut")
}
READY |= {"vader": "scorers:vader", "classifier": "scorers:spelt_classifier", "similarity": "scorers:spelt_similarity"}
READY |= {"reward_model": "reward_models:reward_model"}
READY |= {name: f"images.features:{name}" for name in ("brightness", "image_class", "column")}
ALONE = ("length", "brightness")  # need no argument
# of arguments, for messages
EXAMPLES = {"max_words": "20", "cut": "0", "vader": "compound", "classifier": "org/model=positive"}
EXAMPLES |= {"reward_model": "org/model", "similarity": "org/encoder=texts.txt"}
EXAMPLES |= {"image_class": "path/to/classifier=3", "column": "label=3"}


def map_file(spec: str, change: Callable[[Path], str]) -> str:
    """The spelling with the file in it, if there is one, replaced by what `change` says."""
    if spec.startswith("similarity:"):
        model, _, file = spec.rpartition("=")
        return f"{model}={change(Path(file))}"
    source, _, name = spec.rpartition(":")
    return f"{change(Path(source))}:{name}" if source.endswith(".py") else spec


def no_extras() -> dict:
    """What TRL's trainers give every reward function beside the columns, where no trainer gives it.

    A target stands still while the policy is trained, so a feature must not depend on `trainer_state`: at its start it is.
    """
    return {"trainer_state": TrainerState(), "log_extra": _ignore, "log_metric": _ignore}


def _ignore(name: str, value) -> None:
    pass


class Feature:
    """A named function over completions.

    Args:
        source: a function or callable object with TRL's reward signature (plain or async) or a text as in this module's
            docstring. An object may have an attribute `spec`: the text that makes it again.
        name: how it is called in logs; default: the text, or the function's name.

    `extras` holds what the function gets as TRL's `trainer_state`, `log_extra` and `log_metric`.

    Raises:
        ValueError: an unknown spelling, file or function.
    """

    def __init__(self, source: "str | Callable | Feature", name: str | None = None):
        if isinstance(source, Feature):
            self.function, self.spec, self.name = source.function, source.spec, name or source.name
        elif isinstance(source, str):
            self.function, self.spec, self.name = _load(source), source, name or source
        elif callable(source):
            self.function, self.spec = source, getattr(source, "spec", None) or _importable_spec(source)
            self.name = name or _name_of(source)
        else:
            raise ValueError(f"a feature is a function or a text such as 'contains:dragon', not {source!r}.")
        parameters = inspect.signature(self.function).parameters.values()
        takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        self._accepted = None if takes_all else {p.name for p in parameters}
        self.extras = no_extras()

    def same_as(self, other: "Feature") -> bool:
        """Whether both are known to be one function, whatever they are called."""
        return self.function is other.function or (self.spec is not None and self.spec == other.spec)

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
        arguments = {**rollouts.columns, **self.extras, **rollouts.feature_arguments()}
        if self._accepted is not None:
            arguments = {key: value for key, value in arguments.items() if key in self._accepted}
        values = self.function(**arguments)
        if inspect.isawaitable(values):
            values = _result_of(values)
        values = values if isinstance(values, Tensor) else list(values)
        if len(values) != len(rollouts):
            raise ValueError(
                f"feature {self.name!r} returned {len(values)} values for {len(rollouts)} samples; "
                "return exactly one number for each."
            )
        if isinstance(values, Tensor) and rollouts.differentiable:
            result, missing = values.reshape(len(rollouts)).cpu().double(), torch.zeros(len(rollouts), dtype=torch.bool)
        else:
            values = values.tolist() if isinstance(values, Tensor) else values
            missing = torch.tensor([value is None for value in values], dtype=torch.bool)
            numbers = [float("nan") if value is None else float(value) for value in values]
            result = torch.tensor(numbers, dtype=torch.float64)
        bad = ~torch.isfinite(result) & ~missing
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"feature {self.name!r} returned {float(values[row])} for {rollouts.describe(row)}. Return a finite number."
            )
        return result

    def __repr__(self) -> str:
        return self.name


def _result_of(awaitable):
    """What it gives in the end; in a thread of its own where an event loop is already running (a notebook)."""

    async def wait():
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, wait()).result()


def _name_of(function: Callable) -> str:
    """The function's name; of a partial, with its arguments; of another object, its class's."""
    if isinstance(function, functools.partial):
        given = [_short(value) for value in function.args]
        given += [f"{name}={_short(value)}" for name, value in function.keywords.items()]
        return f"{_name_of(function.func)}({', '.join(given)})"
    return getattr(function, "__name__", type(function).__name__)


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 24 else f"{text[:20]}..."


def _importable_spec(function: Callable) -> str | None:
    """module:name where this function is found again by it, else None (lambdas, closures, objects, scripts)."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if module in (None, "__main__") or not name.isidentifier():
        return None
    return f"{module}:{name}" if getattr(sys.modules.get(module), name, None) is function else None


def _load(spec: str) -> Callable:
    source, _, argument = spec.partition(":")
    if source in READY:
        if not argument and source not in ALONE:
            raise ValueError(f"feature {spec!r} needs an argument, such as {source}:{EXAMPLES.get(source, 'dragon')}.")
        module, _, name = READY[source].partition(":")
        make = getattr(importlib.import_module(f".{module}", __package__), name)
        return make(argument) if argument else make()
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
