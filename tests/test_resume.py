"""A run that was killed and resumed ends bit-equal with one that was not; in real processes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).parent / "worker.py"


def run(output_dir, resume: str, kill_at: int, *options: str) -> int:
    command = [sys.executable, str(WORKER), "training", str(output_dir), resume, str(kill_at), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300).returncode


def assert_equal(first, second) -> None:
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    else:
        assert first == second


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder, "fresh", 0) == 0
    return torch.load(folder / "end.pt")


# Rollouts last for 2 * 2 = 4 micro-steps: the checkpoint at step 5 lies inside a set of rollouts, as does step 10.
@pytest.mark.parametrize(
    "kill_at",
    [
        pytest.param(7, id="between checkpoints"),
        pytest.param(10, id="right after a checkpoint", marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_is_bit_equal(kill_at, uninterrupted, tmp_path):
    assert run(tmp_path, "fresh", kill_at) == -9
    assert not (tmp_path / "end.pt").exists()
    assert run(tmp_path, "resume", 0) == 0
    assert_equal(torch.load(tmp_path / "end.pt"), uninterrupted)


def test_resume_with_replay_is_bit_equal(tmp_path):
    options = ["replay_samples=12", "replay_window=64", "fit_samples=64", "fit_support=60"]
    assert run(tmp_path / "whole", "fresh", 0, *options) == 0
    assert run(tmp_path / "cut", "fresh", 7, *options) == -9
    assert run(tmp_path / "cut", "resume", 0, *options) == 0
    assert_equal(torch.load(tmp_path / "cut" / "end.pt"), torch.load(tmp_path / "whole" / "end.pt"))


def test_a_finished_run_is_not_trained_further(uninterrupted, tmp_path):
    assert run(tmp_path, "fresh", 0, "save_steps=12") == 0
    assert run(tmp_path, "resume", 0, "save_steps=12") == 0
    end = torch.load(tmp_path / "end.pt")
    assert_equal(end["weights"], uninterrupted["weights"])
    assert_equal(end["partition"], uninterrupted["partition"])


def test_a_second_fresh_run_is_refused(tmp_path):
    assert run(tmp_path, "fresh", 0) == 0
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert run(tmp_path, "fresh", 0) == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == files
