"""Nearest neighbours against scikit-learn's, linear heads against torch.optim, least squares."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsClassifier

from models.errors import UserError
from utils import probes
from utils.probes import draw_shots, least_squares, linear_heads, nearest_neighbours, validate
from utils.seeds import permutation

NAMES = ("cat", "eel", "dog", "emu")


def clouds(n, deviation=1.5, width=8):
    """Features (n, D) around a centre for each of three classes, and labels."""
    generator = torch.Generator().manual_seed(n)
    centres = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(n) % 3
    return 2 + centres[labels] + deviation * torch.randn(n, width, generator=generator), labels


def test_nearest_neighbours_vote_like_a_loop_and_like_scikit_learn(monkeypatch):
    (rows, labels), (queries, _) = clouds(90), clouds(40)
    monkeypatch.setattr(probes, "SIMILARITIES", 1000)
    sizes, topk = [], torch.Tensor.topk
    spy = lambda x, *args, **how: sizes.append(x.numel()) or topk(x, *args, **how)  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "topk", spy)
    found = nearest_neighbours(rows, labels, queries, [1, 7, 200])
    assert sizes == [270] * 13 + [90]  # three queries at a time, for votes of 90 images
    unit = (rows / rows.norm(dim=1, keepdim=True)).double().numpy()
    for k, predicted in found.items():
        for query, label in zip(queries.double().numpy(), predicted.tolist(), strict=True):
            cosine = unit @ query / np.linalg.norm(query)
            votes = np.zeros(3)
            for i in np.argsort(-cosine)[:k]:
                votes[labels[i]] += np.exp(cosine[i] / 0.07)
            assert label == votes.argmax()
    weigh = lambda distance: np.exp((1 - distance) / 0.07)  # noqa: E731
    peer = KNeighborsClassifier(7, weights=weigh, metric="cosine").fit(rows, labels)
    assert found[7].tolist() == peer.predict(queries).tolist()
    unweighted = KNeighborsClassifier(7, metric="cosine").fit(rows, labels).predict(queries)
    assert found[7].tolist() != unweighted.tolist() and found[1].tolist() != found[7].tolist()


def test_a_head_of_the_grid_trains_as_alone_in_torch_optim(monkeypatch):
    (rows, labels), (queries, wanted) = clouds(90), clouds(40)
    monkeypatch.setattr(probes, "BATCH", 32)
    pairs = [(0.1, 0.0), (0.03, 0.05), (0.5, 0.01)]
    score = linear_heads(rows, labels, 3, pairs, 25)
    mean, deviation = rows.mean(0), rows.std(0, correction=0) + 1e-5
    for i, (lr, l2) in enumerate(pairs):
        head = torch.nn.Linear(8, 3)
        torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)
        optimizer = torch.optim.SGD(head.parameters(), lr, momentum=0.9, weight_decay=l2)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 25)
        for step in range(25):  # two whole batches in each epoch
            chosen = permutation(90, 0, "linear", step // 2)[step % 2 * 32 :][:32]
            optimizer.zero_grad()
            logits = head((rows[chosen] - mean) / deviation)
            F.cross_entropy(logits, labels[chosen]).backward()
            optimizer.step()
            scheduler.step()
        with torch.no_grad():
            logits = head((queries - mean) / deviation)
        assert (score(queries)[:, i] - logits).abs().max() < 1e-5
        accuracies, losses = validate(score, queries, wanted)
        assert accuracies[i] == (logits.argmax(1) == wanted).double().mean()
        assert losses[i] == pytest.approx(F.cross_entropy(logits, wanted).item(), abs=1e-5)


@pytest.mark.parametrize("n", [6, 40], ids=["fewer images than features", "more"])
def test_least_squares_is_ridge_regression(n):
    torch.manual_seed(0)
    rows, labels = 3 + 2 * torch.randn(n, 9).double(), torch.arange(n) % 3
    standard = (rows - rows.mean(0)) / (rows.std(0, correction=0) + 1e-5)
    design = torch.cat([standard, torch.ones(n, 1).double()], dim=1)
    peer = Ridge(alpha=2.5, fit_intercept=False).fit(design, 2 * torch.eye(3)[labels] - 1)
    scores = least_squares(rows, labels, 3, 2.5)(rows)
    assert (scores - torch.from_numpy(peer.predict(design))).abs().max() < 1e-9


def test_draws_are_balanced_nested_and_seeded():
    labels = torch.randint(0, 4, (200,), generator=torch.Generator().manual_seed(0))
    five, ten = (draw_shots(labels, shots, 1, NAMES) for shots in (5, 10))
    assert labels[five].bincount().tolist() == [5] * 4 and len(ten.unique()) == 40
    assert set(five.tolist()) < set(ten.tolist())
    assert set(five.tolist()) != set(draw_shots(labels, 5, 2, NAMES).tolist())
    # Pinned, so that published numbers can be repeated.
    assert draw_shots(torch.arange(40) % 2, 3, 0, NAMES).tolist() == [18, 8, 28, 21, 9, 7]
    with pytest.raises(UserError, match="class 'eel' has 1 image, not 2"):
        draw_shots(torch.tensor([0, 0, 1]), 2, 1, NAMES)
