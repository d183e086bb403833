"""The verdict on routing: each reason from predictions made to show it."""

import pytest
import torch

from mvmoe_deploy.models.study.comparison import paired_difference
from mvmoe_deploy.models.study.verdict import times_seen, traces, verdict

N, CLASSES = 20_000, 20
GROUPS = torch.arange(CLASSES) // 10  # two super-classes


def predictions(dense=0.7, right=0.75, wrong=0.75, router=0.9, forced=None, seed=0):
    """Answers of two models with these accuracies, the routed one's given where an image was sent."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (N,), generator=generator)
    sent_right = torch.rand(N, generator=generator) < router
    sent = torch.where(sent_right, GROUPS[labels], 1 - GROUPS[labels])
    luck = torch.rand(N, generator=generator)  # the same images are easy for both

    def answer(accuracy):
        other = (labels + 1) // 10 * 10 + (labels + 1) % 10  # the next class
        return torch.where(luck < accuracy, labels, other % CLASSES)

    answers = torch.where(sent_right, answer(right), answer(wrong))
    dense_answers = answer(dense)
    difference = paired_difference(answers == labels, dense_answers == labels)
    interval = (difference.low, difference.high)
    forced_answers = None if forced is None else answer(forced)
    return traces(labels, answers, dense_answers, sent, GROUPS, interval, forced_answers)


def test_traces_are_what_they_say():
    found = predictions(dense=0.7, right=0.8, wrong=0.6, router=0.9, forced=0.8)
    assert found.images == N and found.router == pytest.approx(0.9, abs=0.01)
    assert found.points == pytest.approx(0.9 * 10 - 0.1 * 10, abs=0.5) and found.low < found.points < found.high
    assert found.points_sent_right == pytest.approx(10, abs=0.7)
    assert found.points_sent_wrong == pytest.approx(-10, abs=1.5)
    assert found.points_forced == pytest.approx(2, abs=0.5)
    assert found.dense_knows > 0.9


def test_it_pays():
    said = verdict(predictions(right=0.75, wrong=0.75))
    assert len(said) == 1 and said[0].startswith("Routing pays: +") and "seeds" in said[0]


def test_ahead_by_less_than_seeds_differ():
    said = verdict(predictions(right=0.71, wrong=0.71))
    assert said[0].startswith("Routing is ahead, but by less than another seed may change")


def test_no_difference_and_dense_better():
    assert verdict(predictions(right=0.7, wrong=0.7))[0].startswith("No difference")
    assert verdict(predictions(right=0.68, wrong=0.68))[0].startswith("Dense is better: -")


def test_the_router_costs_most():
    said = verdict(predictions(right=0.75, wrong=0.6, router=0.7))
    assert said[1].startswith("The router costs most: ") and "--router-weight 1" in said[1]


def test_sending_all_right_counts_for_more_than_who_gains():
    said = verdict(predictions(right=0.71, wrong=0.66, router=0.7, forced=0.70))
    assert said[1].startswith("The experts hardly differ: ") and "and all sent right" in said[1]
    said = verdict(predictions(right=0.71, wrong=0.66, router=0.7, forced=0.73))
    assert said[1].startswith("The router costs most: ")


def test_the_experts_hardly_differ():
    said = verdict(predictions(right=0.701, wrong=0.7, router=0.9, forced=0.702))
    assert "The experts hardly differ" in said[1] and "as wide as all experts" in said[1]


def test_the_router_knows_less_than_the_model():
    said = verdict(predictions(right=0.7, wrong=0.7, router=0.6))
    assert any(sentence.startswith("The router knows less than the model: ") for sentence in said)


def test_images_shown_often():
    training = {"epochs_done": 40, "training_images": 95_000}
    assert times_seen(training) == 40 and times_seen({**training, "endless": True}) is None and times_seen({}) is None
    said = verdict(predictions(right=0.7, wrong=0.7), times_seen(training))
    assert any("showed each image 40 times" in sentence for sentence in said)


def test_empty_groups_of_images_are_no_error():
    found = predictions(right=0.7, wrong=0.7, router=1.1)
    assert found.points_sent_wrong is None and verdict(found)
