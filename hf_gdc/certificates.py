"""A `custom_generate` folder: certified sampling that works where hf_gdc can't be imported.

transformers copies `custom_generate/generate.py` with its relative siblings into a cache of its own and runs it there, so
everything that the sampler needs is a Python file: the settings as a literal, the features as imports of copied files.

Left out: which beta and which estimates (`quasi_rejection`); what happens at sampling time (`custom_generate`).
"""

import importlib
import json
import pprint
import re
import shutil
from importlib.resources import files
from pathlib import Path
from string import Template

from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

from .actors import split_rows
from .features import READY, Feature
from .proposals import Proposal

GENERATE = '''"""Certified sampling: model.generate(..., custom_generate=THIS_FOLDER, trust_remote_code=True)."""

from .certified_sampling import generate as certified_generate
from .rollouts import Rollouts
from .settings import FEATURES, SETTINGS


def generate(*positional, model, **options):
    """See `generate` in certified_sampling.py."""
    return certified_generate(SETTINGS, FEATURES, Rollouts, positional, model, **options)
'''
KNOWN = ("Reference", "Policy", "Pointwise", "Moment", "Reward")  # the factors that custom_generate.py can score


def factor_rows(target, reference: dict | None) -> list[dict]:
    """What `custom_generate.CertifiedSampler` needs of each factor; `reference` says where Reference() is.

    Raises:
        ValueError: a factor that can't travel.
    """
    rows = []
    for factor, power in target.terms:
        kind, arguments = type(factor).__name__, factor.to_dict()
        if kind not in KNOWN:
            raise ValueError(
                f"a target with {factor.formula()} ({kind}) can't be exported: the folder has {', '.join(KNOWN)} only. Sample "
                "with QuasiRejectionSampler itself."
            )
        row = {"type": kind, "power": power, "features": [feature.name for feature in factor.features]}
        if kind == "Reference":
            own = arguments.get("model")
            row["reference"] = reference if own is None else model_row(own, factor.model)
        elif kind == "Moment":
            row |= {"lam": factor.lam, "per": factor.per}
        elif kind == "Reward":
            row |= {"beta": arguments["beta"], "weights": arguments["reward_weights"]}
        rows.append(row)
    return rows


def model_row(name: str, model, subfolder: str = "") -> dict:
    """Where a model's weights are: a Hub id, or a path made absolute."""
    name = str(Path(name).resolve()) if Path(name).is_dir() else name
    return {"kind": "model", "name": name, "subfolder": subfolder, "dtype": str(model.dtype).removeprefix("torch.")}


def reference_row(proposal: Proposal, path: Path, save: bool, repo_id: str | None) -> dict | None:
    """Where the saved sampler finds the weights that Reference() stands for.

    Raises:
        ValueError: a reference without a name that is not saved either.
    """
    kind = proposal.reference_kind
    if kind != "model":
        return None if kind is None else {"kind": kind}
    if save:
        name = str(path.resolve()) if repo_id is None else repo_id
        return model_row(name, proposal.reference, "reference") | {"name": name}
    name = proposal.reference.config._name_or_path
    if not name:
        raise ValueError(
            "the reference was not loaded from anywhere, so the saved sampler could not find it: pass save_reference=True."
        )
    return model_row(name, proposal.reference)


def prompt_row(proposal: Proposal, prompt, log_beta: float | None) -> dict:
    """A certified prompt, known again by its token ids."""
    (text,), columns = split_rows([prompt])
    ids_BP, mask_BP, _ = proposal.sampler.encode([text])
    row = {"prompt": text, "prompt_ids": ids_BP[mask_BP].tolist(), "log_beta": log_beta}
    return row | {"columns": {name: values[0] for name, values in columns.items()}}


def sampling_settings(proposal: Proposal, row: dict) -> dict:
    """How the policy is sampled, and a completion with its log-prob, by which the saved sampler knows the policy again."""
    rollouts, sampler = proposal.draw([{"prompt": row["prompt"], **row["columns"]}]), proposal.sampler
    logp = float(proposal.policy_logp(rollouts)[0])
    return {
        "max_completion_length": sampler.max_completion_length,
        "temperature": proposal.temperature,
        "eos_ids": sampler.eos_ids,
        "pad_id": sampler.tokenizer.pad_token_id,
        "probe": {"prompt_ids": row["prompt_ids"], "completion_ids": rollouts.completion_ids()[0], "logp": logp},
    }


def write_custom_generate(folder: Path, target, settings: dict) -> None:
    """Write folder/custom_generate and folder/target.json.

    Raises:
        ValueError: a feature that is a lambda or belongs to a script, or whose file imports its neighbours.
    """
    features = {feature.name: feature for factor, _ in target.terms for feature in factor.features}
    sources = {name: _source(feature) for name, feature in features.items()}
    target.save_pretrained(folder)
    code = folder / "custom_generate"
    code.mkdir(exist_ok=True)
    package = Path(__file__).parent
    _copy_with_siblings(package / "features.py", code)
    shutil.copy(package / "custom_generate.py", code / "certified_sampling.py")
    (code / "generate.py").write_text(GENERATE)
    imports, entries = ["from .features import Feature"], []
    for n, (name, source) in enumerate(sources.items()):
        if source is None:
            ready, _, argument = features[name].spec.partition(":")
            module, _, function = READY[ready].rpartition(":")
            _copy_with_siblings(package / f"{module.replace('.', '/')}.py", code)
            imports.append(f"from .{module.rpartition('.')[2]} import {function} as function_{n}")
            entries.append(f"    {name!r}: Feature(function_{n}({repr(argument) if argument else ''}), {name!r}),")
            continue
        module = f"features_{n}_{re.sub(r'[^A-Za-z0-9_]', '_', source.stem)}"
        shutil.copy(source, code / f"{module}.py")
        imports.append(f"from .{module} import {features[name].spec.rpartition(':')[2]} as function_{n}")
        entries.append(f"    {name!r}: Feature(function_{n}, {name!r}),")
    literal = pprint.pformat(settings, width=120, sort_dicts=False)
    text = ['"""What this sampler is certified for; written by QuasiRejectionSampler.save_pretrained."""', "", *imports]
    text += ["", "FEATURES = {", *entries, "}", f"SETTINGS = {literal}", ""]
    (code / "settings.py").write_text("\n".join(text))


def _copy_with_siblings(file: Path, code: Path) -> None:
    for source in {file, *map(Path, get_relative_import_files(file))}:
        shutil.copy(source, code)


def write_card(folder: Path, formula: str, how: str, rows: list[dict], reference: dict | None) -> None:
    """Write certificate.json and README.md, from one row of estimates for each prompt."""
    needs = {
        None: "nothing.",
        "policy": "nothing; the model is its own reference a(x).",
        "adapter_off": "its adapter, loaded with PEFT; the reference a(x) is the model without it.",
        "model": "the weights of the reference a(x), ",
    }[None if reference is None else reference["kind"]]
    if reference is not None and reference["kind"] == "model":
        needs += f"`{reference['name']}`" + (f", folder `{reference['subfolder']}`." if reference["subfolder"] else ".")
    content = {"format": 1, "formula": formula, "acceptance": how, "prompts": rows}
    (folder / "certificate.json").write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    lines = []
    for row in rows[:20]:
        prompt = json.dumps(row["prompt"])[:40].replace("|", "\\|")
        beta = "0" if row["log_beta"] is None else f"{row['beta_over_z']:.4g}"
        lines.append(
            f"| {prompt} | {beta} | {row['acceptance_rate']:.4g} (>= {row['acceptance_rate_lower']:.4g}) | {row['tv']:.3g} "
            f"(<= {row['tv_upper']:.3g}) | {row['kl']:.3g} +- {row['kl_stderr']:.2g} | {row['kl_target_policy']:.3g} +- "
            f"{row['kl_target_policy_stderr']:.2g} | {row['num_samples']} ({row['ess']:.0f}) |"
        )
    if len(rows) > 20:
        lines.append(f"| and {len(rows) - 20} more in certificate.json | | | | | | |")
    template = Template(files("hf_gdc").joinpath("templates/certified_sampling.md").read_text())
    text = template.substitute(
        formula=formula, how=how, rows="\n".join(lines), needs=needs, confidence=f"{rows[0]['confidence']:g}"
    )
    (folder / "README.md").write_text(text)


def _source(feature: Feature) -> Path | None:
    """The file of a feature's function; None for a ready feature."""
    if feature.spec is None:
        raise ValueError(
            f"feature {feature.name!r} can't be exported: it is a lambda or belongs to a script. Put it into a file and give "
            "it as 'my_features.py:function'."
        )
    source, _, _ = feature.spec.rpartition(":")
    if feature.spec.partition(":")[0] in READY:
        return None
    path = Path(source if source.endswith(".py") else importlib.import_module(source).__file__)
    if get_relative_imports(path):
        raise ValueError(
            f"feature {feature.name!r} can't be exported: {path} imports its neighbours, and only this one file travels. "
            "Put the function into a file that needs no other."
        )
    return path
