"""Bad input to adversarial training, and runs that go wrong: each named, and acted upon."""

import adversaries
import pytest
import tiny
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2ForSequenceClassification

from hf_gdc import Discriminator, GANConfig, GANTrainer, Moment, Pointwise, Target


def test_real_data_must_be_text_that_the_tokenizer_knows(tmp_path):
    unknown = Dataset.from_dict({"text": ["a b"] * 63 + ["c d"]})
    with pytest.raises(ValueError, match="does not know its words"):
        adversaries.gan(tmp_path, texts=unknown, per_device_train_batch_size=64).train()
    ids = Dataset.from_dict({"input_ids": [[1, 2]] * 64})
    with pytest.raises(ValueError, match="the ids that the policy's own tokenizer makes"):
        adversaries.gan(tmp_path, texts=ids)
    with pytest.raises(ValueError, match="need a column `text`, or `prompt` and `completion`; the dataset has `body`"):
        adversaries.gan(tmp_path, texts=Dataset.from_dict({"body": ["a"] * 64}))


def test_a_discriminator_of_another_tokenizer_is_refused(tmp_path):
    adversaries.classifier().save_pretrained(tmp_path / "d")
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["c"])
    tokenizer.save_pretrained(tmp_path / "d")
    with pytest.raises(ValueError, match="made with another tokenizer than the policy: 1 tokens differ, such as 'c'"):
        adversaries.gan(tmp_path / "o", Discriminator(str(tmp_path / "d")))
    small = GPT2ForSequenceClassification(GPT2Config(vocab_size=2, n_embd=4, n_layer=1, n_head=1, num_labels=1))
    with pytest.raises(ValueError, match="embeddings for 2 tokens, and the policy's tokenizer has ids up to 2"):
        adversaries.gan(tmp_path / "o", Discriminator(small))


def test_too_few_texts_are_refused_before_anything_is_written(tmp_path):
    few = Dataset.from_dict({"text": ["a b", "a"]})
    with pytest.raises(ValueError, match="there are 2 real texts, and one set of rollouts takes 32"):
        adversaries.gan(tmp_path / "o", texts=few)
    with pytest.raises(ValueError, match="needs real texts"):
        GANTrainer(tiny.model(0), Discriminator(adversaries.classifier()), args=GANConfig(str(tmp_path / "o")))
    assert not (tmp_path / "o").exists()


def test_two_labels_are_refused(tmp_path):
    two = GPT2ForSequenceClassification(GPT2Config(vocab_size=3, n_embd=4, n_layer=1, n_head=1, num_labels=2))
    with pytest.raises(ValueError, match="has 2 labels, and a logit is one number"):
        Discriminator(two)
    two.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has 2 labels"):
        Discriminator(str(tmp_path))


def test_nan_logits_are_an_error_that_names_them(tmp_path):
    broken = adversaries.classifier()
    broken.score.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"the log of exp\(l_GPT2ForSequenceClassification\(x\)\) is nan"):
        adversaries.gan(tmp_path, Discriminator(broken)).train()
    trainer = adversaries.gan(tmp_path / "later")
    rollouts = trainer.actors.sample_policy([{"prompt": ""}] * 32)
    real = trainer.texts_of([{"prompt": "", "completion": "a"}] * 32, torch.device("cpu"))
    trainer.discriminator.network.model.score.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="or their gradients, are not finite"):
        trainer.learner.step(rollouts, real)


def only(rollouts, *rows):
    """The rollouts with other completions, in turns."""
    rows = [rows[n % len(rows)] for n in range(len(rollouts))]
    rollouts.completion_ids_BT = torch.tensor(rows)
    rollouts.completion_mask_BT = torch.tensor([[True, row[0] > 0, row[0] > 0 and row[1] > 0] for row in rows])
    rollouts.sampler_logps_BT = torch.full((len(rows), 3), -0.7) * rollouts.completion_mask_BT
    rollouts.policy_logp_B = rollouts.sampler_logp_B = rollouts.sampler_logps_BT.sum(1).double()
    return rollouts


def replaced(trainer, *rows):
    """The trainer, whose policy now samples nothing but these ids."""
    plain = trainer.actors.sample_policy
    trainer.actors.sample_policy = lambda inputs: only(plain(inputs), *rows)
    return trainer


@pytest.mark.parametrize("action", ["warn", "pause", "stop"])
def test_separable_sides_are_reported_and_acted_upon(action, tmp_path):
    """Real texts are 'b b b', samples have no b: logits run away, here up to the clip."""
    trainer = replaced(
        adversaries.gan(
            tmp_path,
            Discriminator(adversaries.classifier(), logit_clip=5.0),
            texts=Dataset.from_dict({"text": ["b b b"] * 300}),
            on_collapse=action,
            collapse_patience=3,
            max_steps=8,
            learning_rate=0.0,
            discriminator_learning_rate=3e-2,
            discriminator_steps=4,
            logging_steps=1,
        ),
        [1, 1, 1],
        [1, 1, 0],
    )
    with pytest.warns(UserWarning) as caught:
        trainer.train()
    said = " ".join(str(warning.message) for warning in caught)
    assert "the discriminator tells samples from real texts (AUC 1.000)" in said
    assert ("The run stops" in said, "rests meanwhile" in said) == (action == "stop", action == "pause")
    rows = [row for row in trainer.state.log_history if "discriminator/rests" in row]
    assert (trainer.state.global_step < 8) == (action == "stop")
    assert (sum(row["discriminator/rests"] for row in rows) > 0) == (action == "pause")
    assert all(abs(row["discriminator/logit_sampled"]) < 5 for row in rows)


def test_copies_are_a_collapse(tmp_path):
    trainer = replaced(adversaries.gan(tmp_path, collapse_patience=2, max_steps=3), [1, 2, 1])
    real = [[1, 0, 0], [2, 0, 0], [1, 1, 0], [1, 2, 0], [2, 1, 0], [2, 2, 0], [1, 1, 1], [2, 2, 2]]
    texts_of = trainer.texts_of
    trainer.texts_of = lambda rows, device: only(texts_of(rows, device), *real, *[[0, 0, 0]] * 2, *[[1, 1, 2]] * 2)
    with pytest.warns(UserWarning, match="97% of the samples are copies of others"):
        trainer.train()


def test_the_discriminator_rests_above_its_target_accuracy(tmp_path):
    options = {"discriminator_target_accuracy": 0.6, "discriminator_learning_rate": 3e-2, "discriminator_steps": 8}
    texts = Dataset.from_dict({"text": ["b b b"] * 300})
    trainer = replaced(adversaries.gan(tmp_path, texts=texts, max_steps=4, logging_steps=1, **options), [1, 1, 1])
    torch.nn.init.zeros_(trainer.discriminator.network.model.score.weight)  # it knows nothing yet: half right
    with pytest.warns(UserWarning):
        trainer.train()
    rows = [row for row in trainer.state.log_history if "discriminator/rests" in row]
    assert [row["discriminator/rests"] for row in rows] == [0.0, 1.0, 1.0, 1.0]
    assert rows[0]["discriminator/accuracy"] < 0.6 < rows[1]["discriminator/accuracy"]
    assert len({row["discriminator/logit_sampled"] for row in rows[1:]}) == 1


def test_shortcuts_are_named(tmp_path):
    """Real texts that end at once against samples that never do: length and EOS, not tokenisation."""
    texts = Dataset.from_dict({"text": ["a"] * 100})
    trainer = adversaries.gan(tmp_path, texts=texts, max_steps=3, discriminator_learning_rate=3e-2)
    with pytest.warns(UserWarning) as caught:
        replaced(trainer, [1, 1, 1], [1, 2, 1]).train()
    said = [str(warning.message) for warning in caught]
    assert any("nothing but length (AUC 1.00): sampled completions are longer" in text for text in said)
    assert any("nothing but EOS (AUC 1.00): 0% of the samples and 100% of the real texts" in text for text in said)
    assert not any("nothing but tokenisation" in text for text in said)


def test_a_tokenisation_that_differs_is_named(tmp_path):
    trainer = adversaries.gan(tmp_path)
    rows = [{"prompt": "", "completion": "a b"}] * 32
    first, second = (trainer.texts_of(rows, torch.device("cpu")) for _ in range(2))
    second.texts = ["b a"] * 32  # which the tokenizer would write in other ids
    logits = torch.ones(32, dtype=torch.float64)
    with pytest.warns(UserWarning, match="nothing but tokenisation"):
        trainer.game.observe(first, second, logits, -logits)


def test_what_does_not_go_together_is_refused(tmp_path):
    dense = Discriminator(adversaries.classifier(dense=True), dense=True)
    for message, arguments in [
        ("a discriminator moves it", {"target": Target([Moment(tiny.count_a, 1.0)])}),
        ("give a peft_config", {"discriminator": Discriminator()}),
        ("the bound of tv has no gradient", {"divergence": "tv", "discriminator_loss": "bound"}),
        ("bradley_terry compares whole texts", {"discriminator": dense, "discriminator_loss": "bradley_terry"}),
        ("use token_credit=False", {"discriminator": dense, "demonstrations": 4}),
        ("it needs sampling without temperature", {"cliprange": 0.2, "temperature": 0.7}),
        ("need sampling without temperature", {"demonstrations": 4, "top_k": 2}),
        ("ask for no more", {"demonstrations": 33}),
        ("discriminator_loss must be 'bce'", {"discriminator_loss": "wgan"}),
        ("label_smoothing is for bce", {"discriminator_loss": "bound", "discriminator_label_smoothing": 0.1}),
        ("GANConfig has no option `discriminator_lr`", {"discriminator_lr": 0.1}),
    ]:
        with pytest.raises(ValueError, match=message):
            adversaries.gan(tmp_path, **arguments)
    for message, arguments in [
        ("an energy is a number for a whole text", {"discriminator": dense}),
        ("goes with data_term='critic'", {"data_term": "critic"}),
        ("set reference_negatives", {"target": Target([Pointwise(tiny.has_b)])}),
        ("must be a multiple of the 32 real texts", {"reference_negatives": 5}),
    ]:
        with pytest.raises(ValueError, match=message):
            adversaries.unified(tmp_path, **arguments)
    with pytest.raises(ValueError, match="gives no causal logit for each token"):
        Discriminator(adversaries.classifier(), dense=True)
    assert not any(tmp_path.iterdir())
