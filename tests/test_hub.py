"""Model cards, and pushes to a Hub on the loopback that are loaded back where hf_gdc can't be imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from builders import small_gpt
from huggingface_hub import ModelCard
from loopback_hub import TOKEN, LoopbackHub

from hf_gdc.hub import push_folder, read_card, write_model_card

TESTS = Path(__file__).parent


def front_matter(folder, base_model) -> dict:
    write_model_card(folder, "T", "P(x) = a(x)", "command", {"kl": 0.5}, "data", base_model)
    return yaml.safe_load((folder / "README.md").read_text().split("---")[1])


def test_a_card_names_the_base_model_if_it_is_on_the_hub(tmp_path):
    assert front_matter(tmp_path, "org/model")["base_model"] == "org/model"
    for folder_or_none in (str(tmp_path), None):
        assert "base_model" not in front_matter(tmp_path, folder_or_none)
    assert front_matter(tmp_path, None)["library_name"] == "transformers"


def test_a_card_has_intervals_and_results_for_machines(tmp_path):
    results = {"kl": 0.5, "kl_stderr": 0.1, "in support": 0.25}
    write_model_card(tmp_path, "T", "P(x) = a(x)", "command", results, "stories", divergence="js")
    text = (tmp_path / "README.md").read_text()
    assert "| kl | 0.5 | 0.304 to 0.696 |" in text and "| in support | 0.25 |  |" in text
    assert "f being js" in text
    found = {r.metric_name: r.metric_value for r in ModelCard.load(tmp_path / "README.md").data.eval_results}
    assert found == results
    shown = read_card(tmp_path)
    assert "0.304 to 0.696" in shown and "model-index" not in shown and "```" not in shown


def test_an_adapters_card_says_so(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert front_matter(tmp_path, "org/model")["library_name"] == "peft"


# --- a Hub on the loopback

PUSH = """
import sys, torch
from pathlib import Path
from peft import LoraConfig, get_peft_model
import tiny
from hf_gdc import Moment, Pointwise, Reference, SmallGPTConfig, SmallGPTForSequenceClassification, Target
from hf_gdc.commands import main
from hf_gdc.critics import attach_critic, save_critic

folder = Path(sys.argv[1])
def push(name, repo, *options):
    assert main(["push", str(folder / name), repo, *options]) == 0

# a model, its tokenizer, code and target
model = tiny.model(1)
model.save_pretrained(folder / "policy")
tiny.tokenizer().save_pretrained(folder / "policy")
target = Reference() * Pointwise("contains:b") * Moment("contains:a", 0.5)
target.save_pretrained(folder / "policy")
(folder / "policy" / "checkpoint-1").mkdir()
(folder / "policy" / "checkpoint-1" / "optimizer.pt").write_text("large")
push("policy", "me/policy")
first = model.lm_head.weight.clone()
push("policy", "me/secret", "--private")
# another revision on a branch
model.lm_head.weight.data.mul_(2)
model.save_pretrained(folder / "policy")
push("policy", "me/policy", "--revision", "doubled", "--message", "twice as sure")
# a target alone, with a feature of its own
(folder / "my_features.py").write_text("def short(completions, **_):\\n    return [float(len(c) < 9) for c in completions]\\n")
(Reference() * Pointwise(f"{folder}/my_features.py:short")).save_pretrained(folder / "target")
push("target", "me/target")
assert "contains:b" in Target.from_pretrained("me/policy").formula()
try:
    Target.from_pretrained("me/target")
except ValueError:
    pass
else:
    raise SystemExit("ran code of the Hub without leave")
short = Target.from_pretrained("me/target", trust_remote_code=True).terms[1][0]
assert short.feature.function(completions=["a", "a" * 20]) == [1.0, 0.0]
# an adapter, whose base is a model of the Hub
lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
adapted = get_peft_model(type(model).from_pretrained("me/policy"), lora)
adapted.save_pretrained(folder / "adapter")
push("adapter", "me/adapter")
torch.save(adapted(torch.tensor([[1, 2]])).logits.detach(), folder / "adapter.pt")
# a discriminator or reward model, and a critic
torch.manual_seed(0)
judge = SmallGPTForSequenceClassification(SmallGPTConfig(vocab_size=7, hidden_size=16, num_hidden_layers=1, num_labels=1))
judge.save_pretrained(folder / "judge")
push("judge", "me/judge")
torch.save(judge.eval()(torch.tensor([[1, 2]])).logits.detach(), folder / "judge.pt")
attach_critic(model, "shared")
model.critic.head.weight.data.normal_()
save_critic(model, folder / "policy")
push("policy/critic", "me/critic")
other = tiny.model(2)
attach_critic(other, "shared", "me/critic")
assert torch.equal(other.critic.head.weight, model.critic.head.weight)
# from a trainer, by transformers' own push
options = {"hub_model_id": "me/run", "push_to_hub": True}
trainer = tiny.trainer(Reference() * Pointwise(tiny.has_b), folder / "run", tiny.model(3, scale=0.1), **options)
trainer.train()
trainer.push_to_hub()
torch.save((first.detach(), trainer.model.lm_head.weight.detach()), folder / "weights.pt")
"""

PULL = """
import os, sys, torch
sys.modules["hf_gdc"] = None  # even where it is installed, importing it fails
from huggingface_hub.errors import RepositoryNotFoundError
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
folder, trust = sys.argv[1], {"trust_remote_code": True}
first, trained = torch.load(f"{folder}/weights.pt")
model = AutoModelForCausalLM.from_pretrained("me/policy", **trust)
assert torch.equal(model.lm_head.weight, first)
tokenizer = AutoTokenizer.from_pretrained("me/policy", **trust)
assert tokenizer("a b")["input_ids"] == [1, 2]
doubled = AutoModelForCausalLM.from_pretrained("me/policy", revision="doubled", **trust)
assert torch.equal(doubled.lm_head.weight, 2 * first)
judge = AutoModelForSequenceClassification.from_pretrained("me/judge", **trust)
ids = torch.tensor([[1, 2]])
torch.testing.assert_close(judge(ids).logits, torch.load(f"{folder}/judge.pt"))
adapted = AutoModelForCausalLM.from_pretrained("me/adapter", **trust)
torch.testing.assert_close(adapted(ids).logits, torch.load(f"{folder}/adapter.pt"))
assert torch.equal(AutoModelForCausalLM.from_pretrained("me/run", **trust).lm_head.weight, trained)
try:
    AutoModelForCausalLM.from_pretrained("me/secret", **trust)
except OSError as error:
    assert "me/secret" in str(error)
else:
    raise SystemExit("a private repository was read without a token")
secret = AutoModelForCausalLM.from_pretrained("me/secret", token=os.environ["THE_TOKEN"], **trust)
assert torch.equal(secret.lm_head.weight, first)
"""

FAIL = """
import sys, time
time.sleep = lambda seconds: None  # between attempts
from hf_gdc.commands import main
sys.exit(main(["push", *sys.argv[1:]]))
"""


def run(code, hub_url, home, *arguments, token=TOKEN):
    """The code in a process of its own, because the client reads its settings when it is imported."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub_url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "THE_TOKEN": TOKEN}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"HF_TOKEN": token} if token else {}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, cwd=home)


def test_every_kind_of_artifact_goes_to_the_hub_and_comes_back(tmp_path):
    (tmp_path / "theirs").mkdir()
    with LoopbackHub() as hub:
        pushed = run(PUSH, hub.url, tmp_path, tmp_path)
        assert pushed.returncode == 0, pushed.stderr[-4000:]
        assert "checkpoint-1/optimizer.pt" not in hub.repos["me/policy"].files("main")[1]
        assert hub.repos["me/secret"].private and not hub.repos["me/policy"].private
        pulled = run(PULL, hub.url, tmp_path / "theirs", tmp_path, token=None)
        assert pulled.returncode == 0, pulled.stderr[-4000:]


def test_a_failed_push_changes_nothing_and_says_what_to_do(tmp_path):
    folder = tmp_path / "model"
    small_gpt(vocab_size=300).save_pretrained(folder)
    with LoopbackHub() as hub:
        good = run(FAIL, hub.url, tmp_path, folder, "me/model")
        assert good.returncode == 0, good.stderr[-3000:]
        revision, files = hub.repos["me/model"].files("main")
        assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()

        small_gpt(seed=1, vocab_size=300).save_pretrained(folder)
        ours = {path.name: path.read_bytes() for path in folder.iterdir()}
        for cut in ("PUT /store", "POST .*/commit/"):  # in the middle of the weights; after them, before the commit
            hub.cut = cut
            failed = run(FAIL, hub.url, tmp_path, folder, "me/model")
            assert failed.returncode == 1
            assert (
                "3 times" in failed.stderr and "Nothing is lost" in failed.stderr and "Traceback" not in failed.stderr
            )
            assert hub.repos["me/model"].files("main") == (revision, files)
            assert {path.name: path.read_bytes() for path in folder.iterdir()} == ours
        hub.cut = None
        again = run(FAIL, hub.url, tmp_path, folder, "me/model")
        assert again.returncode == 0, again.stderr[-3000:]
        assert hub.repos["me/model"].files("main")[1]["model.safetensors"] == ours["model.safetensors"]

        alone = run(FAIL, hub.url, tmp_path, folder, "me/model", token=None)
        assert alone.returncode == 1 and "hf auth login" in alone.stderr and "Traceback" not in alone.stderr
        wrong = run(FAIL, hub.url, tmp_path, folder, "me/model", token="hf_other")
        assert wrong.returncode == 1 and "hf auth login" in wrong.stderr
    down = run(FAIL, hub.url, tmp_path, folder, "me/model")  # the Hub is gone
    assert down.returncode == 1 and "could not be reached" in down.stderr and "Traceback" not in down.stderr


def test_a_folder_without_a_model_is_not_pushed(tmp_path):
    with pytest.raises(ValueError, match="holds none of config.json"):
        push_folder(tmp_path, "me/model")
