"""Programs that tests of images run in processes of their own: `python image_worker.py JOB ...`, under torchrun or alone."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from test_image_gan import dataset, gan, is_label_1, weights
from worker import killer

from hf_gdc import Moment, Policy


def training(output_dir: str, resume: str, kill_at: str) -> None:
    """Train with everything that has a state; die by SIGKILL right after step `kill_at` (0: never); save the end."""
    trainer = gan(
        output_dir,
        target=Policy() * Moment(is_label_1, 0.5),
        shape={"generator_norm": "batch"},
        max_steps=12,
        save_strategy="steps",
        save_steps=5,
        spectral_norm=True,
        r1_gamma=0.1,
        penalty_interval=3,
        augmentation=["translate", "brightness"],
        discriminator_steps=2,
        lr_scheduler_type="linear",
        sample_steps=4,
    )
    trainer.add_callback(killer(kill_at))
    trainer.train(resume_from_checkpoint=True if resume == "resume" else None)
    state = weights(trainer) | {"average": trainer.average.state_dict(), "random": torch.rand(3)}
    state |= {"lambda": trainer.target.moments[0].lam, "updates": trainer.adversary.updates}
    torch.save(state, Path(output_dir) / "end.pt")


def same_batch(folder: str, processes: str) -> None:
    """Three steps on the same real images and latents, this process's share of each; save what came out."""
    trainer = gan(
        f"{folder}/run{processes}",
        dataset(48),
        target=Policy() * Moment(is_label_1, 0.5),
        max_steps=3,
        per_device_train_batch_size=16 // int(processes),
        r1_gamma=0.1,
        r2_gamma=0.1,
        discriminator_loss="relativistic",
        divergence="js",
        optim="sgd",
    )
    assert trainer.args.world_size == int(processes), trainer.args.world_size
    trainer.adversary.optimizer = torch.optim.SGD(trainer.adversary.model.parameters(), 5e-2)
    if trainer.is_world_process_zero() and processes == "1":
        torch.save(
            {player: {k: v.clone() for k, v in state.items()} for player, state in weights(trainer).items()},
            f"{folder}/start.pt",
        )
    queue = list(torch.randn(6, 16, 4, generator=torch.Generator().manual_seed(1)))
    rank = trainer.args.process_index

    def draw(count: int) -> torch.Tensor:
        return queue.pop(0)[rank * count : (rank + 1) * count]

    trainer.draw_latents = draw
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save(weights(trainer), f"{folder}/end{processes}.pt")


if __name__ == "__main__":
    {"training": training, "same_batch": same_batch}[sys.argv[1]](*sys.argv[2:])
    PartialState().destroy_process_group()  # or a process may abort while the other exits
