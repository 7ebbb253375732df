"""What ``examples/ptuning.py`` compares with: the data's split and the trained head."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def ptuning():
    examples = Path(__file__).parents[1] / "examples"
    spec = importlib.util.spec_from_file_location("ptuning_example", examples / "ptuning.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(examples))  # it imports its neighbour
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(examples))
    return module


def test_sentences_are_rated_of_some_length_and_not_repeated(ptuning, tmp_path):
    rows = ["1\t2.0\tA fine and moving film.", "2\t-0.5\tIt was rather dull.", "3\t0.4\tIt was neither good nor bad."]
    rows += ["4\t3.0\tToo short.", f"5\t3.0\t{'Too long. ' * 9}", "6\t2.5\tA fine and moving film."]
    (tmp_path / ptuning.RATINGS).write_text("\n".join(rows))
    sentences = ptuning.load_sentences(tmp_path)
    assert sorted(sentences) == [("A fine and moving film.", 1), ("It was rather dull.", 0)]


def test_the_test_is_disjoint_from_what_settings_are_chosen_on(ptuning):
    sentences = [(f"sentence {i}", i % 2) for i in range(100)]
    training, validation, test = ptuning.split(sentences, 60, 20)
    assert [len(part) for part in (training, validation, test)] == [60, 20, 20]
    assert sorted(training + validation + test) == sorted(sentences)
    assert ptuning.split(sentences, 10, 20)[1:] == (validation, test)


def test_the_head_minimises_its_objective(ptuning):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=generator)
    y = (x[:, 0] + torch.randn(200, generator=generator) > 0).long()
    head = ptuning.fit_head(x, y, 0.1)
    loss = torch.nn.functional.cross_entropy(head(x), y) + 0.05 * head.weight.square().sum()
    gradients = torch.autograd.grad(loss, list(head.parameters()))
    assert max(g.abs().max().item() for g in gradients) < 1e-4
    assert head.weight.abs().sum() > 0.1


def test_the_heads_penalty_comes_from_the_training_sentences(ptuning, monkeypatch):
    """As many columns as sentences, four of which tell: without a penalty the head learns the others."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1100, 100, generator=generator)
    y = (x[:, :4].sum(1) + torch.randn(1100, generator=generator) > 0).long()
    training, test = (x[:100], y[:100]), (x[100:], y[100:])
    right, parameters = ptuning.head_right(training, test)
    assert parameters == 101 * 2
    accuracies = {}
    for penalty in ptuning.PENALTIES:
        monkeypatch.setattr(ptuning, "PENALTIES", [penalty])
        accuracies[penalty] = ptuning.head_right(training, test)[0].double().mean().item()
    assert right.double().mean() > accuracies[min(accuracies)]


def test_error_is_two_standard_errors_in_percent(ptuning):
    mean, error = ptuning.mean_and_error(torch.tensor([1.0, 0.0, 1.0, 1.0]))
    assert mean == 75.0
    assert error == pytest.approx(2 * 100 * 0.5 / 2)  # the deviation is 0.5, of four values
