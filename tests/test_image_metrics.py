"""Metrics of images against closed forms and brute force; the classifier that they rest on; features of images."""

import math

import pytest
import torch

from hf_gdc import Moment, Policy, load_metric
from hf_gdc.classifier_training import train_classifier
from hf_gdc.features import Feature
from hf_gdc.images.batches import ImageBatch
from hf_gdc.images.classifier import Judged, LeNet, judge
from hf_gdc.images.data import ImageDataset
from hf_gdc.images.features import class_probability
from hf_gdc.metrics.images import (
    class_shares,
    frechet_distance,
    image_metrics,
    inception_score,
    kernel_distance,
    precision_recall,
)


def normal(count, size, seed, shift=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return shift + scale * torch.randn(count, size, dtype=torch.float64, generator=generator)


def test_frechet_distance_is_that_of_the_two_gaussians():
    """By the samples' own moments, in the closed form for a square root by eigenvalues of a symmetric product."""
    a, b = normal(500, 4, 0) @ normal(4, 4, 1), normal(500, 4, 2, shift=0.5)
    (m1, c1), (m2, c2) = ((x.mean(0), x.T.cov()) for x in (a, b))
    values, vectors = torch.linalg.eigh(c1)
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ c2 @ root).clamp_min(0).sqrt().sum()
    exact = (m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(float(exact), rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-5)


def test_kernel_distance_is_the_unbiased_mmd():
    a, b = normal(60, 3, 0), normal(60, 3, 1, shift=0.4)

    def kernel(x, y):
        return (x @ y.T / 3 + 1) ** 3

    within = sum((kernel(x, x).sum() - kernel(x, x).diagonal().sum()) / (60 * 59) for x in (a, b))
    exact = within - 2 * kernel(a, b).mean()
    assert kernel_distance(a, b, subsets=2) == pytest.approx(float(exact), rel=1e-4)  # a subset is all of them
    state = torch.random.get_rng_state()
    kernel_distance(a, b)
    assert torch.equal(state, torch.random.get_rng_state())


def test_inception_score_of_known_probabilities():
    sure = torch.eye(4, dtype=torch.float64).repeat(5, 1).clamp_min(1e-12).log()
    assert inception_score(sure) == pytest.approx(4.0, rel=1e-4)
    assert inception_score(torch.full((20, 4), math.log(0.25), dtype=torch.float64)) == pytest.approx(1.0, rel=1e-6)
    probs = torch.tensor([[0.7, 0.3], [0.2, 0.8], [0.5, 0.5]], dtype=torch.float64)
    marginal = probs.mean(0)
    exact = (probs * (probs / marginal).log()).sum(1).mean().exp()
    assert inception_score(probs.log()) == pytest.approx(float(exact), rel=1e-5)


def test_precision_and_recall_by_brute_force():
    real, generated = normal(80, 2, 0), torch.cat([normal(40, 2, 1), normal(40, 2, 2, shift=8.0)])

    def share(points, manifold, k=3):
        inside = 0
        for point in points.tolist():
            for centre in manifold.tolist():
                distances = sorted(math.dist(centre, other) for other in manifold.tolist())
                if math.dist(point, centre) <= distances[k]:  # distances[0] is its own, 0
                    inside += 1
                    break
        return inside / len(points)

    precision, recall = precision_recall(generated, real)
    assert precision == pytest.approx(share(generated, real)) and recall == pytest.approx(share(real, generated))
    assert 0.3 < precision < 0.6 < recall  # half of them are far away, and what is near covers the data


def test_all_together_and_sizes_must_agree():
    def judged(seed, count=60):
        return Judged(normal(count, 3, seed).log_softmax(1), normal(count, 4, seed + 10))

    ours, real = judged(0), judged(1)
    metrics = image_metrics(ours, real)
    assert metrics["fid"] == frechet_distance(ours.features_BF, real.features_BF)
    assert metrics["confident"] == float((ours.logps_BK.exp().amax(1) >= 0.9).double().mean())
    ratio = class_shares(ours) / class_shares(real)
    assert (metrics["least_class"], metrics["most_class"]) == (float(ratio.min()), float(ratio.max()))
    with pytest.raises(ValueError, match="50 generated against 60 real ones can't be compared"):
        image_metrics(judged(0, 50), real)


# ---- through evaluate ----


@pytest.mark.parametrize("name", ["fid_lenet", "kid_lenet", "inception_score", "precision_recall"])
def test_load_metric_judges_images_with_their_floor(name, tmp_path):
    torch.manual_seed(0)
    classifier = LeNet(8, 1, 4)
    classifier.save_pretrained(tmp_path / "classifier")
    ours, test, train = torch.rand(3, 40, 1, 8, 8) * torch.tensor([0.5, 1.0, 1.0])[:, None, None, None, None]

    def pure(images):
        one, other = judge(classifier, images), judge(classifier, test)
        precision, recall = precision_recall(one.features_BF, other.features_BF)
        every = {
            "fid_lenet": frechet_distance(one.features_BF, other.features_BF),
            "kid_lenet": kernel_distance(one.features_BF, other.features_BF),
            "inception_score": inception_score(one.logps_BK),
        }
        return {name: every[name]} if name in every else {"precision": precision, "recall": recall}

    expected = pure(ours) | {f"{key}_floor": value for key, value in pure(train).items()}
    expected |= {"images": 40, "classifier": classifier.fingerprint()}
    references = {} if name == "inception_score" else {"references": test}
    metric = load_metric(name)
    place = str(tmp_path / "classifier")
    assert metric.compute(predictions=ours, **references, classifier=place, floor=train) == expected
    for part in (slice(15), slice(15, None)):
        metric.add_batch(predictions=ours[part], **{key: images[part] for key, images in references.items()})
    assert metric.compute(classifier=classifier, floor=train) == expected


def test_load_metric_refuses_what_does_not_compare():
    metric, images = load_metric("fid_lenet"), torch.zeros(6, 1, 8, 8)

    def fails(message, predictions=images, classifier=None, **options):
        with pytest.raises(ValueError, match=message):
            metric.compute(
                predictions=predictions, references=images, classifier=classifier or LeNet(8, 1, 4), **options
            )

    fails("Mismatch in the number of predictions .4. and references .6.", images[:4])
    fails("4 generated against 6 real ones can't be compared", images, floor=images[:4])
    fails(r"pixel_values must lie in \[-1, 1\], but one is 255", images + 255)
    fails("there is no classifier '/no/classifier/here'", classifier="/no/classifier/here")
    fails(r"takes images \(B, 1, 16, 16\)", classifier=LeNet(16))


# ---- the classifier ----


def stripes(count=300, seed=0, labels=True) -> ImageDataset:
    """Two classes: horizontal and vertical stripes, in noise."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(2, (count,), generator=generator)
    lines = (torch.arange(8) % 4 < 2).float()
    pattern = torch.where(label[:, None, None] == 1, lines[None, :, None], lines[None, None, :]).expand(count, 8, 8)
    noisy = (200 * pattern + 55 * torch.rand(count, 8, 8, generator=generator)).to(torch.uint8)
    return ImageDataset(noisy[:, None], label if labels else None)


def test_the_classifier_learns_is_saved_and_known_by_its_hash(tmp_path):
    classifier, accuracy = train_classifier(stripes(), stripes(100, seed=1), epochs=4)
    assert accuracy > 0.95
    again, _ = train_classifier(stripes(), stripes(100, seed=1), epochs=4)
    assert again.fingerprint() == classifier.fingerprint()  # by seed
    other, _ = train_classifier(stripes(), stripes(100, seed=1), epochs=4, seed=1)
    assert other.fingerprint() != classifier.fingerprint()
    classifier.save_pretrained(tmp_path)
    loaded = LeNet.from_pretrained(tmp_path)
    assert loaded.fingerprint() == classifier.fingerprint() and (loaded.image_size, loaded.num_classes) == (8, 2)
    images = stripes(30, seed=2).pixel_values
    ours, theirs = judge(classifier, images), judge(loaded, images, batch_size=7)
    torch.testing.assert_close(ours.logps_BK, theirs.logps_BK, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.features_BF, theirs.features_BF, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="needs labels"):
        train_classifier(stripes(labels=False), stripes())
    with pytest.raises(ValueError, match=r"takes images \(B, 1, 8, 8\), not \(2, 1, 16, 16\)"):
        classifier(torch.zeros(2, 1, 16, 16))


@pytest.mark.parametrize("size", [8, 14, 28, 56, 64])
def test_the_classifier_takes_every_size(size):
    assert LeNet(size, 3, 5)(torch.zeros(2, 3, size, size))["logits"].shape == (2, 5)


# ---- features of images ----


def test_features_see_images_from_zero_to_one_and_keep_their_graph(tmp_path):
    torch.manual_seed(0)
    LeNet(8, 1, 4).save_pretrained(tmp_path / "classifier")
    pixel_values = (torch.rand(6, 1, 8, 8) * 2 - 1).requires_grad_()
    batch = ImageBatch(pixel_values)
    bright = Feature("brightness")(batch)
    torch.testing.assert_close(bright.float(), ((pixel_values + 1) / 2).flatten(1).mean(1))
    (gradient,) = torch.autograd.grad(bright.sum(), pixel_values)
    torch.testing.assert_close(gradient, torch.full_like(gradient, 1 / 128))
    spelt = Feature(f"image_class:{tmp_path}/classifier=2")(batch)
    classifier = LeNet.from_pretrained(tmp_path / "classifier")
    exact = classifier(pixel_values)["logits"].softmax(1)[:, 2]
    torch.testing.assert_close(spelt.float(), exact)
    torch.testing.assert_close(
        torch.autograd.grad(spelt.sum(), pixel_values), torch.autograd.grad(exact.sum(), pixel_values)
    )
    hard = Feature(f"image_class:{tmp_path}/classifier=2>0.25")(batch)
    assert hard.tolist() == (exact > 0.25).double().tolist() and not hard.requires_grad
    detached = Feature("brightness")(ImageBatch(pixel_values.detach()))
    assert not detached.requires_grad
    torch.testing.assert_close(detached, bright.detach())


def test_columns_are_features_of_real_images():
    batch = ImageBatch(torch.zeros(3, 1, 8, 8), {"labels": [1, 3, 3]})
    assert Feature("column:labels=3")(batch).tolist() == [0.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="needs the column 'label'"):
        Feature("column:label=3")(batch)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("image_class:somewhere", "is not spelt image_class:path/to/classifier=3"),
        ("image_class:/no/classifier/here=3", "there is no classifier '/no/classifier/here'"),
        ("image_class:", "needs an argument, such as image_class:path/to/classifier=3"),
    ],
)
def test_bad_spellings_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        Feature(spec)


def test_a_class_that_is_not_there_is_refused_and_targets_print():
    with pytest.raises(ValueError, match="knows classes 0 to 9, not 10"):
        class_probability(LeNet(8), 10)
    target = Policy() * Moment(class_probability(LeNet(8), 3, 0.5), 0.5)
    assert str(target).startswith("P(x) = q(x) * exp(0 * class_3>0.5)")
