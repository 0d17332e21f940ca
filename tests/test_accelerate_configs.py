"""What `accelerate launch --config_file` gets: every config parses, and two CPU processes are really two."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

FOLDER = Path(__file__).parents[1] / "recipes" / "accelerate"
WORLDS = {  # distributed_type, use_cpu, mixed_precision
    "cpu": ("NO", True, None),
    "cpu_two_processes": ("MULTI_GPU", True, None),
    "one_gpu": ("NO", False, "bf16"),
    "multi_gpu": ("MULTI_GPU", False, "bf16"),
    "fsdp2": ("FSDP", False, "bf16"),
    "deepspeed_zero2": ("DEEPSPEED", False, "bf16"),
    "deepspeed_zero3": ("DEEPSPEED", False, "bf16"),
}
PROCESSES = {"cpu": 1, "one_gpu": 1, "cpu_two_processes": 2}  # the others leave it to the machine, but have several
# Every process adds 10^rank: 11 means ranks 0 and 1, each once.
SCRIPT = """
import sys
import torch
from transformers import TrainingArguments
from hf_gdc.cli import parse_options

(args,) = parse_options(TrainingArguments, argv=sys.argv[1:])
assert args.device.type == "cpu" and args.world_size == 2, (args.device, args.world_size)
ranks = torch.tensor([10.0**args.process_index])
torch.distributed.all_reduce(ranks)
assert ranks.item() == 11, ranks
open(f"rank_{args.process_index}_of_{args.world_size}", "w").close()  # printed lines of two processes may mingle
torch.distributed.destroy_process_group()
"""


def load(name):
    return load_config_from_file(str(FOLDER / f"{name}.yaml"))  # raises on unknown keys


def test_every_config_is_listed_here():
    assert {path.stem for path in FOLDER.iterdir()} == WORLDS.keys()


@pytest.mark.parametrize("name", WORLDS)
def test_worlds(name):
    config = load(name)
    assert (config.distributed_type.value, config.use_cpu, config.mixed_precision) == WORLDS[name]
    assert config.num_machines == 1
    assert config.num_processes == PROCESSES.get(name, 8)
    assert (FOLDER / f"{name}.yaml").read_text().startswith("# ")  # when to use it


def test_sharding():
    assert load("fsdp2").fsdp_config["fsdp_version"] == 2
    assert load("fsdp2").fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"  # so that saving gives one model
    assert [load(f"deepspeed_zero{stage}").deepspeed_config["zero_stage"] for stage in (2, 3)] == [2, 3]
    assert load("deepspeed_zero3").deepspeed_config["zero3_save_16bit_model"] is True


def launch_two(folder, *options):
    script = folder / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    return subprocess.run(
        [*command, "--config_file", str(FOLDER / "cpu_two_processes.yaml"), str(script), *options],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_two_cpu_processes_are_two(tmp_path):
    run = launch_two(tmp_path, "--use_cpu")
    assert run.returncode == 0, run.stderr
    assert sorted(path.name for path in tmp_path.glob("rank_*")) == ["rank_0_of_2", "rank_1_of_2"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="with GPUs there is nothing to refuse")
@pytest.mark.slow
def test_two_strangers_are_refused(tmp_path):
    run = launch_two(tmp_path)
    assert run.returncode != 0
    assert "2 processes were launched, but each sees a world of 1. Without GPUs, add `--use_cpu`" in run.stderr
