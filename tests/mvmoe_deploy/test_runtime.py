"""The runtime: routing, grouping, residency on real sessions, threads, and input of every kind."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tiny
import torch
from exported import Exported
from PIL import Image
from threads import TIMEOUT, together

import mvmoe_deploy
from mvmoe_deploy import models
from mvmoe_deploy.backends import LoadedPiece, open_backend
from mvmoe_deploy.backends.onnxruntime import bare_run
from mvmoe_deploy.bundle import Bundle, Piece, open_bundle
from mvmoe_deploy.errors import BackendError, BudgetError, ImageError
from mvmoe_deploy.runtime import Runtime, top_k


class CountingBackend:
    """The real backend; counts what it loads."""

    name = "counting"

    def __init__(self, bundle: Bundle, unloads: bool = True) -> None:
        self.real = open_backend(bundle)
        self.unloads = unloads
        self.loads: list[str] = []

    def load(self, piece: Piece) -> LoadedPiece:
        self.loads.append(piece.name)
        return self.real.load(piece)


@pytest.fixture
def expected(moe_model: models.ViT) -> np.ndarray:
    """PyTorch's logits of the test images."""
    with torch.no_grad():
        return moe_model(tiny.inputs()).numpy()


def close(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


# right answers


def test_predict_says_what_pytorch_says(bundle_path: Path, moe_model: models.ViT) -> None:
    assert isinstance(moe_model, models.MobileVMoE)
    with torch.no_grad():
        routed = moe_model.routed(tiny.inputs())
    probabilities = routed.logits.softmax(-1)
    with mvmoe_deploy.load(bundle_path) as runtime:
        for index, image in enumerate(tiny.images()):
            prediction = runtime.predict(image, top=3)
            best = probabilities[index].argsort(descending=True)[:3].tolist()
            assert [score.class_id for score in prediction.top] == [f"n{c:04d}" for c in best]
            assert prediction.label == f"thing {best[0]}"
            assert prediction.probability == pytest.approx(float(probabilities[index].max()), abs=1e-5)
            expert = int(routed.chosen[index, 0])
            assert (prediction.expert, prediction.expert_name) == (expert, f"group {expert}")
            assert prediction.gate == pytest.approx(float(routed.gates[index, 0]), abs=1e-5)
            assert (prediction.experts, prediction.gates) == ([prediction.expert], [prediction.gate])
            assert set(prediction.timings) == {"preprocess", "trunk", "load", "tail"}
            assert all(ms >= 0 for ms in prediction.timings.values())


def test_a_path_an_image_and_an_array_give_the_same(bundle_path: Path, tmp_path: Path) -> None:
    array = tiny.images(1)[0]
    file = tmp_path / "photo.png"
    Image.fromarray(array).save(file)
    with mvmoe_deploy.load(bundle_path) as runtime:
        first = runtime.predict(array)
        for source in (file, str(file), file.read_bytes(), Image.fromarray(array)):
            assert runtime.predict(source).top == first.top


def test_a_relative_path_still_leads_to_the_experts_after_a_change_of_directory(
    bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bundle_path.parent)
    with mvmoe_deploy.load(bundle_path.name) as runtime:
        monkeypatch.chdir(tmp_path)
        assert runtime.predict(tiny.images(1)[0]).expert is not None
        assert runtime.bundle.path == bundle_path


def test_threads_that_would_only_wait_for_each_other_are_refused(bundle_path: Path) -> None:
    with pytest.raises(BackendError, match=r"threads=99999: must be at most \d+, 4 for each CPU here"):
        mvmoe_deploy.load(bundle_path, threads=99999)


def test_an_image_without_a_path_is_called_by_its_name(bundle_path: Path) -> None:
    with mvmoe_deploy.load(bundle_path) as runtime, pytest.raises(ImageError, match=r"^upload 7: not an image"):
        runtime.predict(b"no image", name="upload 7")


def test_top_is_bounded_by_the_number_of_classes(bundle_path: Path) -> None:
    with mvmoe_deploy.load(bundle_path) as runtime:
        image = tiny.images(1)[0]
        assert [len(runtime.predict(image, top=top).top) for top in (0, 1, 5, 100)] == [1, 1, 5, 6]
        assert sum(score.probability for score in runtime.predict(image, 100).top) == pytest.approx(1)


def test_a_batch_is_grouped_by_expert(bundle_path: Path, expected: np.ndarray) -> None:
    """A batch gives the same results as its images one by one, and each expert runs once."""
    batch = tiny.inputs().numpy()
    with mvmoe_deploy.load(bundle_path) as runtime:
        logits, routed = runtime.run(batch)
        close(logits, expected)
        stats = runtime.stats()
        assert (stats.misses, stats.hits) == (4, 0)
        one_by_one = np.concatenate([runtime.run(image[None])[0] for image in batch])
    close(logits, one_by_one)
    assert routed is not None
    np.testing.assert_array_equal(routed.experts, top_k(routed.probabilities, 1))
    np.testing.assert_allclose(routed.probabilities.sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize("expert", range(4))
def test_forced_experts(bundle_path: Path, moe_model: models.ViT, expert: int) -> None:
    assert isinstance(moe_model, models.MobileVMoE)
    forced = np.full((8, 1), expert)
    with torch.no_grad():
        reference = moe_model.routed(tiny.inputs(8), torch.from_numpy(forced))
    with mvmoe_deploy.load(bundle_path) as runtime:
        logits, routed = runtime.run(tiny.inputs(8).numpy(), forced)
    assert routed is not None
    close(logits, reference.logits.numpy())
    close(routed.gates, reference.gates.numpy())


def test_the_dense_baseline(dense_path: Path, dense_model: models.ViT) -> None:
    with mvmoe_deploy.load(dense_path, memory_budget="1kB") as runtime, torch.no_grad():
        logits, routed = runtime.run(tiny.inputs().numpy())
        close(logits, dense_model(tiny.inputs()).numpy())
        assert routed is None
        prediction = runtime.predict(tiny.images(1)[0])
        assert (prediction.expert, prediction.gate, prediction.experts) == (None, None, [])
        assert set(prediction.timings) == {"preprocess", "model"}
        stats = runtime.stats()
        assert (stats.hits, stats.misses, stats.resident_bytes) == (0, 0, 0)
        assert stats.fixed_bytes == 4 * dense_model.config.parameters()


def test_k_2_over_two_layers(k2: Exported) -> None:
    assert isinstance(k2.model, models.MobileVMoE)
    batch = tiny.inputs()
    with torch.no_grad():
        reference = k2.model.routed(batch)
    with mvmoe_deploy.load(k2.path, max_resident=1) as runtime:
        logits, routed = runtime.run(batch.numpy())
        close(logits, reference.logits.numpy())
        assert routed is not None
        np.testing.assert_array_equal(routed.experts, reference.chosen.numpy())
        prediction = runtime.predict(tiny.images()[0])
        assert prediction.experts == reference.chosen[0].tolist()
        assert prediction.gates == pytest.approx(reference.gates[0].tolist(), abs=1e-5)
        assert prediction.expert == prediction.experts[0]
        assert len(runtime.stats().resident) == 1


def test_ties_go_to_the_lower_index() -> None:
    probabilities = np.array([[0.25] * 4, [0.1, 0.4, 0.1, 0.4]], np.float32)
    assert top_k(probabilities, 1).tolist() == [[0], [1]]
    assert top_k(probabilities, 3).tolist() == [[0, 1, 2], [1, 3, 0]]


# residency on a real bundle


def test_nothing_is_loaded_before_it_is_needed(bundle_path: Path) -> None:
    bundle = open_bundle(bundle_path)
    backend = CountingBackend(bundle)
    with Runtime(bundle, backend, max_resident=1) as runtime:
        assert backend.loads == ["trunk"]
        for expert in (2, 2, 0, 2):
            runtime.run(tiny.inputs(1).numpy(), [[expert]])
        assert backend.loads == ["trunk", "expert_02", "expert_00", "expert_02"]
        stats = runtime.stats()
        assert (stats.hits, stats.misses, stats.evictions, stats.resident) == (1, 3, 2, [2])
        tail = bundle.piece("tail", 2).weight_bytes
        assert (stats.resident_bytes, stats.fixed_bytes) == (tail, bundle.piece("trunk").weight_bytes)
        assert stats.unfreed_bytes == 0


def test_a_byte_budget_holds_as_many_tails_as_fit(bundle_path: Path) -> None:
    tail = open_bundle(bundle_path).piece("tail", 0).weight_bytes
    with mvmoe_deploy.load(bundle_path, memory_budget=2 * tail + 1) as runtime:
        for expert in (0, 1, 2, 3):
            runtime.run(tiny.inputs(1).numpy(), [[expert]])
        assert runtime.stats().resident == [2, 3]
        assert runtime.stats().resident_bytes == 2 * tail


def test_a_batch_takes_resident_experts_first(bundle_path: Path) -> None:
    """Otherwise loading expert 0 would evict expert 3, which would be loaded again for the same batch."""
    with mvmoe_deploy.load(bundle_path, max_resident=1) as runtime:
        runtime.run(tiny.inputs(1).numpy(), [[3]])
        runtime.run(tiny.inputs(2).numpy(), [[0], [3]])
        stats = runtime.stats()
        assert (stats.misses, stats.hits) == (2, 1)


def test_preload_and_pin(bundle_path: Path) -> None:
    with mvmoe_deploy.load(bundle_path, preload="all") as runtime:
        assert runtime.stats().resident == [0, 1, 2, 3]
    with mvmoe_deploy.load(bundle_path, preload=[3, 1]) as runtime:
        assert runtime.stats().resident == [3, 1]
    with mvmoe_deploy.load(bundle_path, pin=[2], max_resident=2) as runtime:
        assert runtime.stats().resident == [2]
        for expert in (0, 1, 3):
            runtime.run(tiny.inputs(1).numpy(), [[expert]])
        assert runtime.stats().resident == [2, 3]


@pytest.mark.parametrize("wrong", [4, -1, 99])
@pytest.mark.parametrize("how", ["preload", "pin", "pin beside all"])
def test_an_expert_that_does_not_exist(bundle_path: Path, how: str, wrong: int) -> None:
    options: dict[str, Any] = {"preload": {"preload": [wrong]}, "pin": {"pin": [wrong]}}.get(
        how, {"preload": "all", "pin": [wrong]}
    )
    with pytest.raises(BudgetError, match=rf"expert {wrong}: .* has 4 experts, 0 to 3"):
        mvmoe_deploy.load(bundle_path, **options)


@pytest.mark.parametrize("options", [{"memory_budget": "1kB"}, {"memory_budget": 5}, {"max_resident": 0}])
def test_a_budget_smaller_than_one_tail_is_refused(bundle_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(BudgetError, match=r"cannot hold .*: needs at least \d"):
        mvmoe_deploy.load(bundle_path, **options)


def test_bytes_that_a_backend_cannot_give_back_are_reported(bundle_path: Path) -> None:
    bundle = open_bundle(bundle_path)
    with Runtime(bundle, CountingBackend(bundle, unloads=False), max_resident=1) as runtime:
        for expert in (0, 1, 2, 0):
            runtime.run(tiny.inputs(1).numpy(), [[expert]])
        assert runtime.stats().unfreed_bytes == 2 * bundle.piece("tail", 0).weight_bytes


def test_a_load_that_fails_leaves_the_runtime_usable(bundle_path: Path) -> None:
    bundle = open_bundle(bundle_path)

    class Failing(CountingBackend):
        broken = True

        def load(self, piece: Piece) -> LoadedPiece:
            if piece.expert == 1 and self.broken:
                raise BackendError("expert_01.onnx: cannot load it")
            return super().load(piece)

    backend = Failing(bundle)
    with Runtime(bundle, backend, max_resident=1) as runtime:
        one = tiny.inputs(1).numpy()
        before, _ = runtime.run(one, [[0]])
        with pytest.raises(BackendError, match="expert_01"):
            runtime.run(one, [[1]])
        close(runtime.run(one, [[0]])[0], before)
        backend.broken = False
        runtime.run(one, [[1]])
        assert runtime.stats().resident == [1]


# threads


def test_sixteen_threads_load_a_tail_once(bundle_path: Path) -> None:
    bundle = open_bundle(bundle_path)
    backend = CountingBackend(bundle)
    with Runtime(bundle, backend) as runtime:
        together(16, lambda _: runtime.run(tiny.inputs(1).numpy(), [[2]]))
        assert backend.loads == ["trunk", "expert_02"]
        assert (runtime.stats().hits, runtime.stats().misses) == (15, 1)


@pytest.mark.parametrize("max_resident", [1, 2, None])
def test_several_threads_get_right_answers(bundle_path: Path, expected: np.ndarray, max_resident: int | None) -> None:
    batch = tiny.inputs().numpy()
    with mvmoe_deploy.load(bundle_path, max_resident=max_resident) as runtime:

        def work(index: int) -> list[np.ndarray]:
            rows = np.random.default_rng(index).permutation(len(batch))
            return [(row, runtime.run(batch[row : row + 1])[0][0]) for row in rows]

        for results in together(8, work):
            for row, logits in results:
                close(logits, expected[row])


def test_several_threads_on_k_2(k2: Exported) -> None:
    batch = tiny.inputs().numpy()
    with torch.no_grad():
        expected = k2.model(tiny.inputs()).numpy()
    with mvmoe_deploy.load(k2.path, max_resident=1) as runtime:
        for logits in together(4, lambda _: runtime.run(batch)[0]):
            close(logits, expected)


# input of every kind


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (np.zeros((3, 32, 32), np.float32), r"expected shape \[B, 3, 32, 32\], got \[3, 32, 32\]"),
        (np.zeros((1, 32, 32, 3), np.float32), r"got \[1, 32, 32, 3\]"),
        (np.zeros((1, 3, 16, 32), np.float32), r"got \[1, 3, 16, 32\]"),
        (np.zeros((1, 1, 32, 32), np.float32), r"got \[1, 1, 32, 32\]"),
        (np.float32(1), "got float32"),
        (np.zeros((1, 3, 32, 32)), "expected a float32 array, got float64"),
        (np.zeros((1, 3, 32, 32), np.uint8), "got uint8"),
        (np.zeros((1, 3, 32, 32), np.float16), "got float16"),
        (np.zeros((1, 3, 32, 32), ">f4"), "got >f4"),
        ([[0.0]], "got list"),
        (torch.zeros(1, 3, 32, 32), "got Tensor"),
        (None, "got NoneType"),
    ],
)
def test_a_batch_of_another_shape_or_dtype(bundle_path: Path, batch: Any, message: str) -> None:
    with mvmoe_deploy.load(bundle_path) as runtime, pytest.raises(ImageError, match=f"batch: .*{message}"):
        runtime.run(batch)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_name_the_image(bundle_path: Path, value: float) -> None:
    batch = tiny.inputs(4).numpy().copy()
    batch[2, 1, 5, 5] = value
    with mvmoe_deploy.load(bundle_path) as runtime:
        with pytest.raises(ImageError, match="image 2 has values that are NaN or infinite"):
            runtime.run(batch)
        assert runtime.stats().misses == 0


def test_an_empty_batch(bundle_path: Path, dense_path: Path) -> None:
    empty = np.zeros((0, 3, 32, 32), np.float32)
    with mvmoe_deploy.load(bundle_path) as runtime:
        logits, routed = runtime.run(empty)
        assert routed is not None
        assert (logits.shape, routed.probabilities.shape, routed.experts.shape, routed.gates.shape) == (
            (0, 6), (0, 4), (0, 1), (0, 1)
        )  # fmt: skip
        assert runtime.run(empty, np.zeros((0, 1), int))[0].shape == (0, 6)
    with mvmoe_deploy.load(dense_path) as runtime:
        logits, routed = runtime.run(empty)
        assert (logits.shape, routed) == ((0, 6), None)


def test_a_batch_that_is_not_contiguous(bundle_path: Path, expected: np.ndarray) -> None:
    batch = tiny.inputs().numpy()
    with mvmoe_deploy.load(bundle_path) as runtime:
        close(runtime.run(np.asfortranarray(batch))[0], expected)
        close(runtime.run(batch[::-1])[0], expected[::-1])
        wide = np.repeat(batch, 2, axis=3)
        close(runtime.run(wide[..., ::2])[0], expected)


def test_a_batch_is_not_changed(k2: Exported) -> None:
    batch = tiny.inputs(4).numpy()
    before = batch.copy()
    with mvmoe_deploy.load(k2.path) as runtime:
        runtime.run(batch)
    np.testing.assert_array_equal(batch, before)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ([[4], [0]], "expected values 0 to 3"),
        ([[-1], [0]], "expected values 0 to 3"),
        ([[0]], r"expected integers \[2, 1\], got \[1, 1\]"),
        ([0, 1], r"expected integers \[2, 1\], got \[2\]"),
        ([[0, 1], [0, 1]], r"expected integers \[2, 1\], got \[2, 2\]"),
        ([[0.0], [1.0]], "expected integers"),
    ],
)
def test_forced_experts_that_do_not_fit(bundle_path: Path, experts: Any, message: str) -> None:
    with mvmoe_deploy.load(bundle_path) as runtime, pytest.raises(ImageError, match=message):
        runtime.run(tiny.inputs(2).numpy(), np.array(experts))


def test_an_expert_forced_twice_is_refused(k2: Exported) -> None:
    """The expert's output could be added once or twice; neither is what a caller can mean."""
    with mvmoe_deploy.load(k2.path) as runtime, pytest.raises(ImageError, match="image 1 names an expert twice"):
        runtime.run(tiny.inputs(2).numpy(), np.array([[0, 1], [2, 2]]))


def test_a_dense_model_has_no_experts_to_force(dense_path: Path) -> None:
    with mvmoe_deploy.load(dense_path) as runtime, pytest.raises(ImageError, match="a dense model has no experts"):
        runtime.run(tiny.inputs(1).numpy(), np.array([[0]]))


def test_a_closed_runtime_says_so(bundle_path: Path) -> None:
    with mvmoe_deploy.load(bundle_path, preload="all") as runtime:
        pass
    for use in (lambda: runtime.predict(tiny.images(1)[0]), lambda: runtime.run(tiny.inputs(1).numpy())):
        with pytest.raises(BackendError, match=r"moe\.mvmoe: this runtime was closed"):
            use()
    assert runtime.stats().resident == []
    runtime.close()


def test_closing_while_others_predict(bundle_path: Path, expected: np.ndarray) -> None:
    """Each prediction ends with the right answer or says that the runtime was closed; nothing stays loaded."""
    batch = tiny.inputs().numpy()
    runtime = mvmoe_deploy.load(bundle_path, max_resident=2)
    begun = threading.Barrier(5)

    def work(index: int) -> int:
        if index == 4:
            begun.wait(TIMEOUT)
            runtime.close()
            return 0
        for done in range(10_000):
            if done == 3:
                begun.wait(TIMEOUT)
            row = (done + index) % len(batch)
            try:
                close(runtime.run(batch[row : row + 1])[0][0], expected[row])
            except BackendError as error:
                assert "this runtime was closed" in str(error)
                return done
        raise AssertionError("never closed")

    assert all(done >= 3 for done in together(5, work)[:4])
    assert (runtime.stats().resident, runtime.stats().resident_bytes) == ([], 0)


def test_what_is_in_use_when_a_runtime_closes_goes_afterwards(bundle_path: Path, expected: np.ndarray) -> None:
    bundle = open_bundle(bundle_path)

    class ClosesFirst(CountingBackend):
        closers: tuple[str, ...] = ()

        def load(self, piece: Piece) -> LoadedPiece:
            run = super().load(piece)

            def closing(*inputs: np.ndarray) -> list[np.ndarray]:
                runtime.close()
                return run(*inputs)

            return closing if piece.name in self.closers else run

    one = tiny.inputs().numpy()[:1]
    for closers in (("trunk",), ("expert_00", "expert_01", "expert_02", "expert_03")):
        backend = ClosesFirst(bundle)
        backend.closers = closers
        runtime = Runtime(bundle, backend)
        close(runtime.run(one)[0], expected[:1])
        assert runtime.stats().resident == []
        with pytest.raises(BackendError, match="this runtime was closed"):
            runtime.run(one)


def test_classes_are_ranked_alike_by_the_graph_and_in_numpy(bundle_path: Path) -> None:
    """The graph ranks up to five classes; the runtime ranks more than that."""
    with mvmoe_deploy.load(bundle_path) as runtime:
        for image in tiny.images(4):
            five, six = runtime.predict(image, top=5).top, runtime.predict(image, top=6).top
            assert [score.class_id for score in five] == [score.class_id for score in six[:5]]
            assert [s.probability for s in five] == pytest.approx([s.probability for s in six[:5]], abs=1e-6)


def test_an_image_that_cannot_be_read_changes_nothing(bundle_path: Path, tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"no image")
    with mvmoe_deploy.load(bundle_path) as runtime:
        with pytest.raises(ImageError, match=r"x\.jpg"):
            runtime.predict(tmp_path / "x.jpg")
        assert runtime.stats().misses == 0
        runtime.predict(tiny.images(1)[0])


# backends


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tensorrt"}, "backend 'tensorrt' does not run onnx bundles: expected onnxruntime"),
        ({"threads": 0}, "threads=0: must be at least 1"),
        ({"threads": -2}, "threads=-2"),
    ],
)
def test_a_backend_that_does_not_exist(bundle_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        mvmoe_deploy.load(bundle_path, **options)


def test_a_bundle_for_another_backend(bundle_copy: Path) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        manifest["target"] = "executorch"

    tiny.edit_manifest(bundle_copy, edit)
    with pytest.raises(
        BackendError, match="backend 'onnxruntime' does not run executorch bundles: expected executorch"
    ):
        mvmoe_deploy.load(bundle_copy, backend="onnxruntime")


def test_a_graph_with_other_inputs_than_the_manifest_says(bundle_copy: Path) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        manifest["pieces"][0]["inputs"][0]["name"] = "pixels"

    tiny.edit_manifest(bundle_copy, edit)
    with pytest.raises(BackendError, match=r"takes inputs \['images'\], manifest.json says \['pixels'\]"):
        mvmoe_deploy.load(bundle_copy)


def test_a_graph_that_is_none(bundle_copy: Path) -> None:
    (bundle_copy / "trunk.onnx").write_bytes(b"nothing of the kind")
    tiny.rehash(bundle_copy)
    with pytest.raises(BackendError, match=r"trunk\.onnx: refused, not an ONNX file, or damaged"):
        mvmoe_deploy.load(bundle_copy)
    with pytest.raises(BackendError, match=r"trunk\.onnx: onnxruntime .* cannot load it"):
        mvmoe_deploy.load(bundle_copy, trust=True)


# what a piece may return that is no answer

TOKENS, ROUTES = np.zeros((1, 17, 32), np.float32), np.full((1, 4), 0.25, np.float32)
LOGITS = np.zeros((1, 6), np.float32)
BEST, CLASSES = np.full((1, 5), 0.2, np.float32), np.arange(5)[None]


class Fake:
    """A backend whose pieces return what a test says, whatever they are given."""

    name, unloads = "fake", True

    def __init__(self, **outputs: list[np.ndarray]) -> None:
        self.outputs = {"trunk": [TOKENS, ROUTES], "tail": [LOGITS, BEST, CLASSES], **outputs}

    def load(self, piece: Piece) -> LoadedPiece:
        return lambda *inputs: self.outputs[piece.role]


def nan_at(array: np.ndarray, place: int, value: float = np.nan) -> np.ndarray:
    changed = array.copy()
    changed[0, place] = value
    return changed


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"trunk": [TOKENS, nan_at(ROUTES, 1)]}, r"trunk\.onnx: trunk does not return probabilities"),
        ({"trunk": [TOKENS, nan_at(ROUTES, 0, np.inf)]}, "trunk does not return probabilities"),
        ({"trunk": [TOKENS, ROUTES * 4]}, r"they are 1 to 1 and sum to 4"),
        ({"trunk": [TOKENS, np.array([[1.5, -0.5, 0, 0]], np.float32)]}, r"they are -0\.5 to 1\.5 and sum to 1"),
        ({"trunk": [TOKENS, ROUTES * 0]}, "sum to 0"),
        ({"tail": [LOGITS, BEST, nan_at(CLASSES, 0, -1)]}, r"expert_00\.onnx: expert_00 returned logits or classes"),
        ({"tail": [LOGITS, BEST, nan_at(CLASSES, 4, 6)]}, "expert_00 returned logits or classes"),
        ({"tail": [LOGITS, nan_at(BEST, 2), CLASSES]}, "expert_00 returned logits or classes"),
        ({"tail": [LOGITS, nan_at(BEST, 0, 7.0), CLASSES]}, "expert_00 returned logits or classes"),
        ({"tail": [LOGITS, nan_at(BEST, 4, 0.3), CLASSES]}, "expert_00 returned logits or classes"),  # not descending
        ({"tail": [nan_at(LOGITS, 3)]}, "expert_00 returned logits or classes"),
        ({"tail": [nan_at(LOGITS, 3, np.inf)]}, "expert_00 returned logits or classes"),
        ({"tail": [LOGITS - np.inf]}, "expert_00 returned logits or classes"),
    ],
)
def test_what_cannot_be_an_answer_is_refused_by_name(
    bundle_path: Path, outputs: dict[str, list[np.ndarray]], message: str
) -> None:
    with pytest.raises(BackendError, match=message):
        Runtime(open_bundle(bundle_path), Fake(**outputs)).predict(tiny.images(1)[0])


def test_a_fake_that_answers_is_believed(bundle_path: Path) -> None:
    """The cases above are refused for their stated reason: a class that is masked with minus infinity is accepted."""
    bundle = open_bundle(bundle_path)
    assert Runtime(bundle, Fake()).predict(tiny.images(1)[0]).label == "thing 0"
    masked = Runtime(bundle, Fake(tail=[nan_at(LOGITS, 0, -np.inf)])).predict(tiny.images(1)[0], top=6)
    assert (masked.label, masked.top[5].label, masked.top[5].probability) == ("thing 1", "thing 0", 0)


def test_a_batch_is_looked_at_image_by_image(bundle_path: Path) -> None:
    bundle, batch = open_bundle(bundle_path), tiny.inputs(2).numpy()
    twice = [np.concatenate([TOKENS] * 2), np.concatenate([ROUTES, ROUTES * 2])]
    with pytest.raises(BackendError, match=r"they are 0\.5 to 0\.5 and sum to 2"):
        Runtime(bundle, Fake(trunk=twice)).run(batch)
    twice[1] = np.concatenate([ROUTES, np.array([[1.5, -0.5, 0, 0]], np.float32)])
    with pytest.raises(BackendError, match=r"they are -0\.5 to 1\.5 and sum to 1"):
        Runtime(bundle, Fake(trunk=twice)).run(batch)
    twice[1] = np.concatenate([ROUTES, np.array([[0, 0, 1, 0]], np.float32)])
    with pytest.raises(BackendError, match=r"expert_00 returned logits"):
        Runtime(bundle, Fake(trunk=twice, tail=[nan_at(LOGITS, 0)])).run(batch)
    with pytest.raises(BackendError, match=r"expert_00 returned logits"):
        Runtime(bundle, Fake(tail=[nan_at(LOGITS, 0)])).run(batch[:1])


def graph_returning(bundle: Path, edit: Callable[[Any], None]) -> None:
    """Changes the graph of the first tail, and its hash with it."""
    import onnx

    proto = onnx.load(bundle / "expert_00.onnx", load_external_data=False)
    edit(proto.graph)
    onnx.save(proto, bundle / "expert_00.onnx")
    tiny.rehash(bundle)


def logits_of_two_images(graph: Any) -> None:
    """Logits twice as many as images."""
    from onnx import helper

    graph.node.append(helper.make_node("Concat", ["one", "one"], ["logits"], axis=0))
    for node in graph.node[:-1]:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                if name == "logits":
                    names[place] = "one"


def of_another_shape(graph: Any) -> None:
    """A reshape to what the tokens do not fill."""
    from onnx import helper, numpy_helper

    graph.initializer.append(numpy_helper.from_array(np.array([7, 7]), "seven"))
    graph.node.insert(0, helper.make_node("Reshape", ["tokens", "seven"], ["unused"]))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            logits_of_two_images,
            r"expert_00\.onnx: expert_00 returned \[2, 6\] of float32, .*, manifest\.json says \[1, 6\]",
        ),
        (of_another_shape, r"expert_00\.onnx: expert_00 failed in onnxruntime \("),
    ],
)
def test_a_trusted_graph_that_fails_while_it_runs(bundle_copy: Path, edit: Any, message: str) -> None:
    graph_returning(bundle_copy, edit)
    with mvmoe_deploy.load(bundle_copy, trust=True) as runtime, pytest.raises(BackendError, match=message) as caught:
        runtime.run(tiny.inputs(1).numpy(), np.array([[0]]))
    assert "\n" not in str(caught.value)


def images_side_by_side(graph: Any) -> None:
    """Logits ``[1, B · C]``, which is right for one image."""
    from onnx import helper, numpy_helper

    logits_of_two_images(graph)
    graph.initializer.append(numpy_helper.from_array(np.array([1, -1]), "row"))
    graph.node[-1].CopyFrom(helper.make_node("Reshape", ["one", "row"], ["logits"]))


def test_a_graph_that_is_right_for_one_image_alone(bundle_copy: Path) -> None:
    """The check of graphs follows one image, so batches are compared when they have run."""
    graph_returning(bundle_copy, images_side_by_side)
    with mvmoe_deploy.load(bundle_copy) as runtime:
        runtime.run(tiny.inputs(1).numpy(), np.array([[0]]))
        with pytest.raises(
            BackendError, match=r"expert_00 returned \[1, 12\] of float32, .*manifest\.json says \[2, 6\]"
        ):
            runtime.run(tiny.inputs(2).numpy(), np.array([[0], [0]]))


def inputs_by_other_names(graph: Any) -> None:
    graph.input[1].name = "weight"
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name == "gate":
                node.input[place] = "weight"


def test_a_trusted_graph_with_other_inputs_is_refused_when_it_is_loaded(bundle_copy: Path) -> None:
    graph_returning(bundle_copy, inputs_by_other_names)
    message = r"expert_00\.onnx: takes inputs \['tokens', 'weight'\], manifest\.json says \['tokens', 'gate'\]"
    with pytest.raises(BackendError, match=message):
        mvmoe_deploy.load(bundle_copy, trust=True, preload=[0])


THREADS = """
import sys, numpy as np, mvmoe_deploy
batch = np.load(sys.argv[2])
mvmoe_deploy.load(sys.argv[1], threads=1).close()
with mvmoe_deploy.load(sys.argv[1], threads=2) as a, mvmoe_deploy.load(sys.argv[1], threads=2) as b:
    assert np.allclose(a.run(batch)[0], b.run(batch)[0])
    np.save(sys.argv[3], a.run(batch)[0])
bundle = mvmoe_deploy.bundle.open_bundle(sys.argv[1])  # what verification asks for: any number
mvmoe_deploy.Runtime(bundle, mvmoe_deploy.backends.open_backend(bundle, threads=None)).close()
for threads in (3, 1):
    try:
        mvmoe_deploy.load(sys.argv[1], threads=threads)
    except mvmoe_deploy.MvmoeError as error:
        print(error)
"""


def test_two_threads_share_one_pool(bundle_path: Path, expected: np.ndarray, tmp_path: Path) -> None:
    """In a process of its own: the pool's size cannot be changed afterwards."""
    np.save(tmp_path / "in.npy", tiny.inputs().numpy())
    done = subprocess.run(
        [sys.executable, "-c", THREADS, str(bundle_path), str(tmp_path / "in.npy"), str(tmp_path / "out.npy")],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for threads in (3, 1):
        assert f"threads={threads}: this process already runs onnxruntime with 2 threads" in done.stdout
    close(np.load(tmp_path / "out.npy"), expected)


def test_onnxruntime_still_has_the_session_that_runs_without_checks(bundle_path: Path) -> None:
    """If a release drops the private attribute, predictions still work, each 15 µs slower, and this test fails."""
    session = onnxruntime.InferenceSession(str(bundle_path / "trunk.onnx"), providers=["CPUExecutionProvider"])
    assert bare_run(session) != session.run
    inputs = {"images": tiny.inputs(2).numpy()}
    names = [output.name for output in session.get_outputs()]
    for bare, checked in zip(bare_run(session)(names, inputs, None), session.run(names, inputs), strict=True):
        np.testing.assert_array_equal(bare, checked)


def test_without_it_a_session_runs_as_usual() -> None:
    class Session:
        def run(self) -> None: ...

    session = Session()
    assert bare_run(session) == session.run  # type: ignore[arg-type]


# paths


def test_a_path_that_python_could_not_decode_still_leads_to_the_pieces(bundle_path: Path, tmp_path: Path) -> None:
    """In a locale without UTF-8, an ü in a path becomes two surrogates, which onnxruntime takes for no string."""
    folder = tmp_path / "tü"
    folder.mkdir()
    copy = Path(str(tiny.copy_of(bundle_path, folder)).replace("ü", "\udcc3\udcbc"))
    with mvmoe_deploy.load(copy) as runtime, mvmoe_deploy.load(bundle_path) as usual:
        image = tiny.images(1)[0]
        assert runtime.predict(image).top == usual.predict(image).top


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no such file names")
def test_a_path_that_is_no_text_is_named(bundle_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "\udcfc"
    folder.mkdir()
    with pytest.raises(BackendError) as raised:
        mvmoe_deploy.load(tiny.copy_of(bundle_path, folder))
    assert str(raised.value).endswith(
        r"\xfc/moe.mvmoe/trunk.onnx: not UTF-8, as its reader needs; rename the file or folder"
    )
