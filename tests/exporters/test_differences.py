"""The units that outputs are judged in: what a unit hides, and what it blows up."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from mvmoe_deploy.errors import VerificationError
from mvmoe_deploy.exporters.differences import (
    channel_errors,
    check_comparable,
    check_masks,
    check_probabilities,
    logit_errors,
    logit_scale,
    router_errors,
    sharpness,
)
from mvmoe_deploy.exporters.precision import FP16, FP32
from mvmoe_deploy.exporters.verify import measure, route_flips

Doubles = NDArray[np.float64]


def softmax(scores: Doubles) -> Doubles:
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True))


def router_scores(experts: int, size: float) -> Doubles:
    """Scores ``[16, E]`` in nats; image 0 lies at the border between its two best experts."""
    scores = size * np.random.default_rng(experts).standard_normal((16, experts))
    first, second = np.argsort(-scores[0])[:2]
    scores[0, second] = scores[0, first] - 1e-3
    return scores


def test_what_all_classes_share_is_no_error_of_the_logits() -> None:
    """Softmax does not see it, nor does the order of the classes."""
    logits = np.random.default_rng(0).standard_normal((4, 6))
    scale = logit_scale(logits)
    assert logit_errors(logits + 3, logits, scale).max() == pytest.approx(0, abs=1e-12)
    assert logit_errors(logits + 3 * np.eye(6)[0], logits, scale).max() > 1


def test_only_the_last_bits_of_float32_are_no_error() -> None:
    logits = np.random.default_rng(0).standard_normal((4, 6))
    noise = np.random.default_rng(1).standard_normal(logits.shape)
    for offset, size, seen in ((0, 1e-4, True), (0, 1e-8, False), (1000, 1e-2, True), (1000, 1e-5, False)):
        expected = logits + offset
        errors = logit_errors(expected + size * noise, expected, logit_scale(expected))
        assert bool(errors.max() > FP32.tolerance.logits) is seen, (offset, size)


def test_a_channel_that_hardly_varies_is_judged_by_the_others() -> None:
    tokens = np.random.default_rng(0).standard_normal((2, 5, 8))
    tokens[..., 3] *= 1e-7
    noise = np.random.default_rng(1).standard_normal((2, 5))
    for size, seen in ((1e-6, False), (1e-4, True)):
        found = tokens.copy()
        found[..., 3] += size * noise
        assert bool(channel_errors(found, tokens).max() > FP32.tolerance.channels) is seen


def test_the_channels_of_a_feature_map_come_second() -> None:
    maps = np.random.default_rng(0).standard_normal((3, 4, 5, 6)) * np.array([1, 2, 4, 8])[:, None, None]
    errors = channel_errors(maps + 1, maps)
    per_channel = errors.max(axis=(0, 2, 3))
    np.testing.assert_allclose(per_channel, 1 / maps.std(axis=(0, 2, 3)), rtol=1e-5)


def test_the_least_scale_of_a_channel_is_a_tenth_of_those_that_are_used() -> None:
    """ReLU leaves channels of zeros, however many; they say nothing about what an error in them could do."""
    tokens = np.random.default_rng(0).standard_normal((2, 200, 8))
    tokens -= tokens.mean(axis=(0, 1))
    tokens[..., 3:] = 0
    used = np.median(np.sqrt((tokens[..., :3] ** 2).mean(axis=(0, 1))))
    found = tokens.copy()
    found[0, 0, 5] = 0.02
    assert channel_errors(found, tokens).max() == pytest.approx(0.02 / (0.1 * used), rel=1e-3)


def test_what_becomes_of_an_unlikely_expert_is_no_error() -> None:
    right = np.tile([0.6, 0.4 - 1e-5, 1e-5], (4, 1))
    for other, seen in ((5e-5, False), (1e-7, False), (1e-3, True)):
        wrong = np.tile([0.6, 0.4 - other, other], (4, 1))
        assert bool(router_errors(wrong, right).max() > 0.01) is seen, other


def test_a_router_that_hardly_decides_is_judged_as_if_by_a_tenth_of_a_nat() -> None:
    right = softmax(np.random.default_rng(0).uniform(-1e-3, 1e-3, (8, 4)))
    wrong = softmax(np.log(right) + np.array([0.05, 0, 0, 0]))
    assert router_errors(wrong, right).max() == pytest.approx(0.05 * 0.75 / 0.1, rel=0.1)


def test_outputs_of_another_shape_are_refused() -> None:
    """Even one that numpy would broadcast."""
    with pytest.raises(VerificationError, match=r"tail: has shape \[1, 3\], PyTorch's has \[2, 3\]"):
        check_comparable(np.ones((1, 3)), np.ones((2, 3)), "tail")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["PyTorch's own output", "the bundle's output"])
def test_values_that_are_not_finite_are_refused_on_either_side(value: float, side: str) -> None:
    sides = {"the bundle's output": np.zeros((2, 3)), "PyTorch's own output": np.zeros((2, 3))}
    check_comparable(*sides.values(), "here")
    sides[side][1, 2] = value
    with pytest.raises(VerificationError, match=f"here: 1 of 6 values of {side} are NaN or infinite"):
        check_comparable(*sides.values(), "here")


def far(nats: float) -> Doubles:
    """Logits of 4 images and 6 classes, the last of which never comes nearer to the best than this."""
    logits = np.random.default_rng(0).uniform(-1, 1, (4, 6))
    logits[:, 5] = logits.max(axis=1) - nats
    return logits


def test_a_class_that_no_image_can_reach_is_left_out_and_any_other_is_not() -> None:
    assert logit_scale(far(15)).reachable.tolist() == [True] * 6
    assert logit_scale(far(25)).reachable.tolist() == [True] * 5 + [False]
    assert logit_scale(25 * far(2)).reachable.tolist() == [True] * 6  # 50 nats, but few spreads
    alone = np.tile([0.0, -100.0, -200.0], (4, 1))
    assert logit_scale(alone).reachable.all()  # else nothing would be left to compare


def test_an_image_whose_logits_hardly_differ_is_judged_by_the_median_image() -> None:
    logits = np.random.default_rng(0).standard_normal((5, 6))
    logits[2] *= 1e-3
    scale = logit_scale(logits)
    assert scale.spread[2] == np.median(logits.std(axis=1)) > 100 * logits[2].std()
    assert scale.spread[0] >= logits[0].std()


@pytest.mark.parametrize(
    ("reference", "bundle", "wrong"),
    [(1, 19, ""), (1, 39, ""), (1, 41, "cannot be reached in the bundle but can"), (60, 41, ""), (60, 11, ""),
     (60, 9, "can be reached in the bundle but not")],
)  # fmt: skip
def test_a_class_masked_on_one_side_is_named_and_one_at_the_limit_is_not(
    reference: float, bundle: float, wrong: str
) -> None:
    scale = logit_scale(far(reference))
    assert scale.limit == 20
    if not wrong:
        check_masks(far(bundle), scale, "here")
        return
    with pytest.raises(VerificationError, match=f"here: class 5 {wrong}"):
        check_masks(far(bundle), scale, "here")


def test_one_sharp_image_does_not_widen_what_the_others_are_allowed() -> None:
    logits = np.random.default_rng(0).standard_normal((5, 6))
    assert sharpness(logit_scale(logits)) == 1
    logits[3] *= 20
    assert sharpness(logit_scale(logits)) == 1
    assert sharpness(logit_scale(20 * logits)) > 5


def test_what_probabilities_are() -> None:
    check_probabilities(np.array([[0.5, 0.503], [1.0, 0.0]]), "router", "PyTorch's")
    for wrong in ([[0.5, 0.5], [1.05, -0.05]], [[0.5, 0.5], [0.5, 0.4]], [[0.5, 0.5], [1.0, 1.0]]):
        with pytest.raises(
            VerificationError, match=r"does not return probabilities .PyTorch's: (one|those of image 1)"
        ):
            check_probabilities(np.array(wrong), "router", "PyTorch's")


def test_a_class_s_probability_counts_beside_the_logits() -> None:
    """In spreads of the logits, a nat is little for two classes far above a hundred others."""
    logits = np.array([[100.0, 100.0, *np.linspace(0, 99, 100)]])
    found = logits + np.array([1.0, *[0.0] * 101])
    of_logits, of_probabilities = measure("logits", found, logits, FP16.tolerance)
    assert of_logits.error < 0.05
    assert of_probabilities.error == pytest.approx(abs(softmax(found) - softmax(logits)).max(), rel=1e-4)
    assert of_probabilities.error > 0.2 and of_probabilities.tolerances > 2


@pytest.mark.parametrize("experts", [2, 3, 10])
@pytest.mark.parametrize("size", [0.03, 0.3, 2.0, 20.0])
def test_what_half_precision_does_to_a_router_passes_and_exchanged_experts_do_not(experts: int, size: float) -> None:
    """Each score is off by half a percent of what scores vary by, whatever the images' margins are."""
    scores = router_scores(experts, size)
    off = np.where(np.random.default_rng(0).random(scores.shape) < 0.5, -0.005, 0.005) * size
    found = softmax(scores + off).astype(np.float16).astype(np.float32)
    assert router_errors(found, softmax(scores)).max() <= FP16.tolerance.channels
    exchanged = softmax(scores)[:, [1, 0, *range(2, experts)]]
    assert router_errors(exchanged, softmax(scores)).max() > 2 * FP16.tolerance.channels


def test_an_image_at_the_border_is_judged_like_any_other() -> None:
    """Of two experts at 0.51 to 0.49 the usual margin is 2 nats, so that 0.02 nats are a hundredth."""
    scores = np.array([[0.04, 0.0], *([2.0, 0.0], [0.0, 2.0]) * 4])
    found = scores + np.array([0.02, 0.0])
    errors = router_errors(softmax(found), softmax(scores))
    assert errors[0] == pytest.approx([0.0049, 0.0051], abs=1e-4)


@pytest.mark.parametrize("experts", [10, 200, 1000])
def test_a_router_is_judged_alike_however_many_experts_it_has(experts: int) -> None:
    """The two best of a thousand scores are five times as close as those of ten, but rounding is the same."""
    scores = np.random.default_rng(experts).standard_normal((64, experts))
    rounding = 1e-5 * np.sign(np.random.default_rng(0).standard_normal(scores.shape))
    assert router_errors(softmax(scores + rounding), softmax(scores)).max() <= FP32.tolerance.channels
    assert router_errors(softmax(scores + 10 * rounding), softmax(scores)).max() > FP32.tolerance.channels


def test_an_expert_that_is_never_chosen_hides_no_exchange_of_the_others() -> None:
    scores = np.array([[0.1, 0.0, -9.0], [0.0, 0.1, -9.0]] * 4)
    errors = router_errors(softmax(scores[:, [1, 0, 2]]), softmax(scores))
    assert errors.max() == pytest.approx(1.0, rel=0.01)


def test_which_of_two_unlikely_experts_comes_next_is_a_tie() -> None:
    """Half precision turns both into 0."""
    probabilities = np.array([[1.0, 1e-9, 1e-12]])
    (flip,) = route_flips(probabilities, np.array([[0, 1]]), np.array([[0, 2]]), FP16.tolerance)
    assert flip.tie
    (flip,) = route_flips(probabilities, np.array([[0]]), np.array([[1]]), FP16.tolerance)
    assert not flip.tie


@pytest.mark.parametrize("spread", [0.5, 2.3, 6.6, 15.0])
def test_probabilities_are_judged_alike_however_sharp_a_model_is(spread: float) -> None:
    """Logits that are 0.6 % of their spread apart pass. A class that is off by a fifth of the spread fails."""
    rng = np.random.default_rng(1)
    logits = spread * rng.standard_normal((200, 10))
    off = logits + spread * np.where(rng.random(logits.shape) < 0.5, -0.003, 0.003)
    assert [each.tolerances <= 1 for each in measure("logits", off, logits, FP16.tolerance)] == [True, True]
    wrong = logits.copy()
    wrong[np.arange(200), logits.argmax(axis=1)] -= 0.2 * spread
    assert [each.tolerances > 1 for each in measure("logits", wrong, logits, FP16.tolerance)] == [True, True]


@pytest.mark.parametrize("spread", [0.1, 2.2])
def test_up_to_the_usual_spread_the_tolerance_of_probabilities_is_as_it_is_stated(spread: float) -> None:
    logits = spread * np.random.default_rng(1).standard_normal((9, 40))
    assert measure("logits", logits, logits, FP16.tolerance)[1].allowed == FP16.tolerance.probabilities
