"""Two real processes equal one, given the same rollouts; left to themselves they sample different ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

WORKER = Path(__file__).parent / "worker.py"


def launch(processes: int, *arguments: str) -> None:
    program = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    program += [] if processes == 1 else [f"--nproc_per_node={processes}"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*program, str(WORKER), *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("replayed", [pytest.param(0, marks=pytest.mark.slow), 32])
def test_two_processes_equal_one_on_the_same_rollouts(replayed, tmp_path):
    trainer = tiny.trainer(tiny.HARD["pointwise"](), tmp_path / "maker", tiny.model(0, 0.5, torch.float32), ["a", "b"])
    rows = [{"prompt": prompt} for prompt in "ab"]
    pool = trainer.actors.draw([row for row in rows for _ in range(64)], from_reference=True)
    steps = [trainer.actors.draw([row for row in rows for _ in range(16)], False, salt) for salt in (1, 2)]
    given = {"pool": pool.state_dict()} | {f"step {n}": step.state_dict() for n, step in enumerate(steps)}
    torch.save(given, tmp_path / "rollouts.pt")
    for processes in (1, 2):
        launch(processes, "same_rollouts", str(tmp_path), str(processes), str(replayed))
    one, two = (torch.load(tmp_path / f"end{processes}.pt") for processes in (1, 2))
    assert [len(step["log_z_B"]) for step in one["seen"]] == [32 + replayed] * 2
    for first, second in zip(one["seen"], two["seen"], strict=True):
        for name in first:
            torch.testing.assert_close(first[name], second[name], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(torch.tensor(one["lambda"]), torch.tensor(two["lambda"]), rtol=1e-6, atol=0)
    start = tiny.model(0, 0.5).state_dict()
    update, other = (
        torch.cat([(end["weights"][name] - start[name]).flatten() for name in start]) for end in (one, two)
    )
    assert update.norm() > 0.1
    assert (update - other).norm() / update.norm() < 1e-6


def test_two_processes_sample_different_rollouts_and_stay_in_step(tmp_path):
    launch(2, "plain_run", str(tmp_path))
    texts = [(tmp_path / f"texts{rank}").read_text() for rank in (0, 1)]
    digests = [(tmp_path / f"digest{rank}").read_text() for rank in (0, 1)]
    assert texts[0] != texts[1]
    assert digests[0] == digests[1]
