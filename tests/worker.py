"""Programs that tests run in processes of their own: `python worker.py JOB ARGUMENTS`, under torchrun or alone."""

import os
import signal
import sys
from pathlib import Path

import tiny
import torch
from accelerate import PartialState
from transformers import TrainerCallback

from hf_gdc import Rollouts


def killer(kill_at: str) -> TrainerCallback:
    """Dies by SIGKILL right after step `kill_at` (0: never)."""

    class Killer(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == int(kill_at):
                os.kill(os.getpid(), signal.SIGKILL)

    return Killer()


def training(output_dir: str, resume: str, kill_at: str, *options: str) -> None:
    """Train; die by SIGKILL right after step `kill_at` (0: never); save the end's weights, log Z and lambda."""
    settings = {"max_steps": 12, "per_device_train_batch_size": 16, "learning_rate": 1e-2, "save_steps": 5}
    settings |= {"save_strategy": "steps", "num_iterations": 2, "steps_per_generation": 2, "num_generations": 16}
    settings |= {name: int(value) for name, _, value in (option.partition("=") for option in options)}
    lm = tiny.model(0, 0.5, torch.float32)
    trainer = tiny.trainer(tiny.HARD["pointwise and moment"](), output_dir, lm, ["a", "b", "b a"], **settings)
    trainer.add_callback(killer(kill_at))
    trainer.train(resume_from_checkpoint=True if resume == "resume" else None)
    if trainer.is_world_process_zero():
        state = {"weights": trainer.model.state_dict(), "partition": trainer.partition.state_dict()}
        state |= {"lambda": [m.lam for m in trainer.target.moments], "random": torch.rand(3)}
        torch.save(state, Path(output_dir) / "end.pt")


def ppo(output_dir: str, resume: str, kill_at: str) -> None:
    """PPO, as `training`: save the end's weights, the critic's among them, and the KL coefficient of each process."""
    from test_ppo import ppo as ppo_trainer

    settings = {"max_steps": 8, "per_device_train_batch_size": 16, "num_iterations": 2, "steps_per_generation": 2}
    settings |= {"save_strategy": "steps", "save_steps": 3, "kl_target": 0.5, "critic_learning_rate": 3e-2}
    trainer = ppo_trainer(output_dir, prompts=["a", "b", "b a", "a b"], callbacks=[killer(kill_at)], **settings)
    trainer.train(resume_from_checkpoint=True if resume == "resume" else None)
    state = {"weights": trainer.model.state_dict(), "kl_coef": trainer.kl_coef, "random": torch.rand(3)}
    state |= {"texts": trainer._last_rollouts.texts, "tokens": trainer._tokens_per_sample}
    torch.save(state, Path(output_dir) / f"end{trainer.args.process_index}.pt")


def same_rollouts(folder: str, processes: str, replayed: str) -> None:
    """Two optimizer steps on given rollouts, this process's share of each; save what came out.

    Each process has the rollouts of one prompt; resampling for the replay uses no random numbers.
    """
    torch.rand = lambda *size, dtype=None: torch.full(size, 0.5, dtype=dtype)
    trainer = tiny.trainer(
        tiny.HARD["pointwise and moment"](),
        f"{folder}/run{processes}",
        tiny.model(0, 0.5),
        ["a", "b"],
        max_steps=2,
        per_device_train_batch_size=32 // int(processes),
        num_generations=16,
        learning_rate=1e-2,
        replay_samples=int(replayed) // int(processes),
        replay_window=1000 if int(replayed) else 0,
    )
    assert trainer.args.world_size == int(processes), trainer.args.world_size
    given = torch.load(f"{folder}/rollouts.pt", weights_only=True)
    seen = []

    def draw(kind: str) -> Rollouts:
        rollouts = Rollouts(**given[kind])
        share = len(rollouts) // trainer.args.world_size
        rank = trainer.args.process_index
        return rollouts.select(torch.arange(rank * share, (rank + 1) * share))

    trainer.actors.draw = lambda rows, from_reference, salt=0: draw("pool")
    trainer.actors.sample_policy = lambda rows: draw(f"step {trainer.state.global_step}")
    plain = trainer.weigh

    def weigh(rollouts):
        result = plain(rollouts)
        names = ("log_z_B", "baseline_B", "sampler_logp_B")
        seen.append({name: trainer.actors.gather(getattr(rollouts, name)).sort().values for name in names})
        return result

    trainer.weigh = weigh
    trainer.train()
    if trainer.is_world_process_zero():
        state = {"seen": seen, "weights": trainer.model.state_dict(), "lambda": [m.lam for m in trainer.target.moments]}
        torch.save(state, f"{folder}/end{processes}.pt")


def gan(output_dir: str, resume: str, kill_at: str, players: str) -> None:
    """A game, as `training`: save the end's weights of both players, the samples to replay, and what was sampled last."""
    import adversaries
    from peft import LoraConfig

    from hf_gdc import Discriminator

    settings = {"max_steps": 9, "per_device_train_batch_size": 16, "num_iterations": 2, "steps_per_generation": 2}
    settings |= {"gradient_accumulation_steps": 2, "mle_steps": 2, "discriminator_warmup_steps": 2}
    settings |= {"save_strategy": "steps", "save_steps": 3, "callbacks": [killer(kill_at)]}
    if players == "unified":
        trainer = adversaries.unified(output_dir, reference_negatives=32, **settings)
    else:
        settings |= {"discriminator_replay_samples": 8, "discriminator_replay_window": 64}
        if players == "adapters":
            discriminator = Discriminator(dense=True)
            settings["peft_config"] = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
        else:
            network = adversaries.classifier(dense=True)
            network.dropout.p = 0.3  # random numbers that must go on where they were
            discriminator = Discriminator(network, dense=True)
        trainer = adversaries.gan(output_dir, discriminator, **settings)
    trainer.train(resume_from_checkpoint=True if resume == "resume" else None)
    learner = trainer.learner
    state = {"policy": trainer.model.state_dict(), "discriminator": learner.state_dict(), "random": torch.rand(3)}
    window = learner.process_state()["window"] or []
    state |= {"window": dict(enumerate(window[:1])), "texts": trainer._last_rollouts.texts}
    torch.save(state, Path(output_dir) / "end.pt")


def gan_same_rollouts(folder: str, processes: str) -> None:
    """Two steps of both players on given samples and real texts, this process's share of each; save what moved."""
    for kind in ("gan", "dense", "unified"):
        _same_game(folder, processes, kind)


def _same_game(folder: str, processes: str, kind: str) -> None:
    import adversaries

    from hf_gdc import Discriminator

    options = {"lm": tiny.model(0, 0.5), "max_steps": 2, "discriminator_steps": 2}
    options |= {"per_device_train_batch_size": 32 // int(processes), "overwrite": True}
    dense = kind == "dense"
    network = Discriminator(adversaries.classifier(dense=dense, scale=0.3, dtype=torch.float64), dense=dense)
    make = adversaries.unified if kind == "unified" else adversaries.gan
    trainer = make(f"{folder}/{kind}{processes}", network, **options)
    assert trainer.args.world_size == int(processes), trainer.args.world_size
    given = torch.load(f"{folder}/given.pt", weights_only=True)

    def share(side: str) -> Rollouts:
        rollouts = Rollouts(**given[f"{side} {trainer.state.global_step}"])
        size, rank = len(rollouts) // trainer.args.world_size, trainer.args.process_index
        return rollouts.select(torch.arange(rank * size, (rank + 1) * size))

    def flat() -> dict[str, torch.Tensor]:
        players = {"policy": trainer.model, "discriminator": network.network}
        return {
            name: torch.cat([p.detach().flatten().double() for p in player.parameters()])
            for name, player in players.items()
        }

    start = {f"{name} start": values for name, values in flat().items()}
    trainer.actors.sample_policy = lambda rows: share("fake")
    trainer.texts_of = lambda rows, device: share("real")
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save(start | flat(), f"{folder}/{kind}{processes}.pt")


def plain_run(output_dir: str) -> None:
    """Two processes that sample for themselves must not draw the same rollouts."""
    trainer = tiny.trainer(
        tiny.HARD["pointwise"](),
        output_dir,
        tiny.model(0, 0.5, torch.float32),
        max_steps=2,
        replay_samples=16,
        per_device_train_batch_size=64,
    )
    assert trainer.args.world_size == 2
    trainer.train()
    trainer.evaluate()
    own = trainer._last_rollouts
    Path(output_dir, f"texts{trainer.args.process_index}").write_text("\n".join(own.texts))
    digest = sum(p.double().sum().item() for p in trainer.model.parameters())
    Path(output_dir, f"digest{trainer.args.process_index}").write_text(f"{digest:.12f}")


if __name__ == "__main__":
    jobs = (training, ppo, same_rollouts, gan, gan_same_rollouts, plain_run)
    {job.__name__: job for job in jobs}[sys.argv[1]](*sys.argv[2:])
    PartialState().destroy_process_group()  # or a process may abort while the other exits
