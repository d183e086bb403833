"""What is measured of configurations, each part against known-bad or faked conditions, and a whole run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import tiny
from exported import Exported

from mvmoe_deploy.bench.candidates.configuration import Configuration, expert_turn, open_configuration
from mvmoe_deploy.bench.candidates.prepare import of_bundle, of_checkpoint, prepare
from mvmoe_deploy.bench.candidates.suite import choose_scales, paper_scales
from mvmoe_deploy.bench.measure import energy, memory, noise, run
from mvmoe_deploy.bench.measure.accuracy import Labelled, labels_for, measure_accuracy
from mvmoe_deploy.bench.measure.coldstart import measure_cold_start
from mvmoe_deploy.bench.measure.images import Images
from mvmoe_deploy.bench.measure.latency import Timed
from mvmoe_deploy.bench.measure.memory import measure_memory
from mvmoe_deploy.bench.measure.residency import MEAN_BURST, measure_residency, mix_sequence
from mvmoe_deploy.bench.measure.run import Plan, measure, measure_suite
from mvmoe_deploy.bench.results import read_json, write_json
from mvmoe_deploy.errors import BackendError, ConfigError, DataError
from mvmoe_deploy.models import config_from_name
from mvmoe_deploy.runtime import RoutedBatch

QUICK = Plan(rounds=3, min_seconds=0, cold_starts=1)


@pytest.fixture
def moe(bundle_path: Path) -> Configuration:
    return of_bundle(bundle_path)


@pytest.fixture
def pixels(tmp_path: Path) -> Path:
    np.save(tmp_path / "pixels.npy", tiny.images(8))
    return tmp_path / "pixels.npy"


def test_a_bundle_is_described(bundle_path: Path, moe: Configuration) -> None:
    config = tiny.moe_config()
    assert (moe.kind, moe.backend, moe.layout, moe.experts, moe.k) == ("mobile-vmoe", "onnxruntime", "separate", 4, 1)
    assert (moe.flops, moe.parameters) == (config.flops(), config.parameters())
    sizes = {file.name: file.stat().st_size for file in bundle_path.iterdir() if file.stem != "manifest"}
    expert = [sizes[f"expert_0{e}.onnx"] + sizes[f"expert_0{e}.bin"] for e in range(4)]
    assert moe.bytes_per_expert == expert
    assert moe.bytes_on_disk == sum(sizes.values())
    selftest = sum(size for name, size in sizes.items() if name.startswith("selftest"))
    assert selftest and moe.bytes_first_image == moe.bytes_on_disk - sum(expert[1:]) - selftest
    assert moe.class_experts == [c % 4 for c in range(tiny.CLASSES)]


def test_experts_take_turns(moe: Configuration, k2: Exported) -> None:
    assert [int(expert_turn(moe, n)[0, 0]) for n in range(5)] == [0, 1, 2, 3, 0]  # type: ignore[index]
    three = of_bundle(k2.path)
    assert expert_turn(three, 1).tolist() == [[2, 0]]  # type: ignore[union-attr]
    assert expert_turn(msgspec.structs.replace(moe, experts=0), 1) is None


@pytest.mark.skipif(not memory.ROLLUP.exists(), reason="proportional set sizes are Linux's")
def test_memory_is_measured_in_fresh_processes(moe: Configuration) -> None:
    found = measure_memory(moe)
    assert found is not None
    assert [point.resident for point in found.by_resident] == [1, 2, 3, 4]
    assert (found.loaded.resident, found.used.resident) == (0, 1)
    ledgers = [point.ledger or 0 for point in found.by_resident]
    assert ledgers == sorted(set(ledgers))  # each expert adds its own weights
    assert found.used.total > 1e5
    assert found.peak >= 1e5
    assert found.by_resident[-1].total > found.loaded.total


def test_a_process_that_fails_says_why(moe: Configuration, pixels: Path) -> None:
    gone = msgspec.structs.replace(moe, path="none.mvmoe")
    with pytest.raises(BackendError, match=r"moe: measuring memory failed: .*none\.mvmoe: no such bundle"):
        measure_memory(gone)
    with pytest.raises(BackendError, match=r"moe: measuring the cold start failed: .*no such bundle"):
        measure_cold_start([gone], pixels, repeats=1)


def test_cold_starts_have_parts_that_add_up(moe: Configuration, pixels: Path) -> None:
    found = measure_cold_start([moe], pixels, repeats=2)["moe"]
    parts = [found.interpreter, found.imports, found.load, found.first_run]
    assert all(len(part) == 2 and min(part) > 0 for part in parts)
    assert found.total.value == pytest.approx(np.median(np.sum(parts, axis=0)))
    assert min(found.imports) > min(found.first_run)  # a tiny model, a large engine


def test_cold_starts_keep_compiled_files(moe: Configuration, pixels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installers compile a package's files. Where the environment forbids to keep them, compiling would be measured."""
    environments = []

    def run(command: list[str], env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        environments.append(env)
        return subprocess.CompletedProcess(command, 0, "1.0 2.0 3.0 4.0\n", "")

    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setattr("mvmoe_deploy.bench.measure.coldstart.subprocess.run", run)
    measure_cold_start([moe], pixels, repeats=1)
    assert len(environments) == 2 and not any("PYTHONDONTWRITEBYTECODE" in each for each in environments)
    assert environments[0].keys() == os.environ.keys() - {"PYTHONDONTWRITEBYTECODE"}


def test_mixes_are_what_they_say() -> None:
    uniform, skewed, bursts = (mix_sequence(mix, 5, 20_000) for mix in ("uniform", "skewed", "bursts"))
    assert all(abs(count - 4000) < 300 for count in Counter(uniform.tolist()).values())
    harmonic = sum(1 / i for i in range(1, 6))
    expected = [20_000 / i / harmonic for i in range(1, 6)]
    assert sorted(Counter(skewed.tolist()).values(), reverse=True) == pytest.approx(expected, rel=0.1)
    changes = 1 + int((np.diff(bursts) != 0).sum())
    # one burst in five is followed by another of the same group
    assert 20_000 / changes == pytest.approx(MEAN_BURST * 5 / 4, rel=0.15)
    assert (np.diff(uniform) != 0).mean() == pytest.approx(0.8, abs=0.02)
    np.testing.assert_array_equal(mix_sequence("skewed", 5, 100), mix_sequence("skewed", 5, 100))


def test_more_resident_experts_are_hit_more_often(moe: Configuration, pixels: Path) -> None:
    few = msgspec.structs.replace(moe, experts=3)
    points = measure_residency(few, pixels, None, predictions=40)
    assert [(p.mix, p.resident) for p in points] == [(m, r) for m in ("uniform", "skewed", "bursts") for r in (1, 2, 3)]
    for mix in ("uniform", "skewed", "bursts"):
        rates = [p.hit_rate for p in points if p.mix == mix]
        assert rates == sorted(rates)
    sequence = mix_sequence("uniform", 3, 40)
    hits = [p.hit_rate for p in points if p.mix == "uniform"]
    assert hits[0] == np.mean([False, *(sequence[1:] == sequence[:-1])])
    assert hits[-1] == 1 - len(set(sequence.tolist())) / 40
    assert all(p.p99 >= p.p50 > 0 and p.bytes != 0 for p in points)


class Router:
    """Sends image i of a batch to expert ``experts[i]`` and is sure of class ``best[i]``."""

    def __init__(self, experts: list[int], best: list[int]) -> None:
        self.experts, self.best = np.array(experts), np.array(best)

    def run(self, batch: np.ndarray, experts: Any = None) -> tuple[np.ndarray, RoutedBatch]:
        logits = -np.abs(np.arange(tiny.CLASSES)[None] - self.best[:, None]).astype(np.float32)
        return logits, RoutedBatch(
            np.zeros((len(batch), 4), np.float32), self.experts[:, None], np.ones((len(batch), 1))
        )


def test_accuracy_counts_classes_and_routes(moe: Configuration) -> None:
    labels = np.array([0, 1, 2, 5])
    model: Any = Router(
        [0, 1, 3, 1], [0, 1, 3, 0]
    )  # classes: right, right, near, last; experts: right, right, wrong, right
    found = measure_accuracy(moe, model, tiny.images(4), labels)
    assert (found.images, found.top1, found.top5, found.router) == (4, 0.5, 0.75, 0.75)
    heat = np.array(found.heat_map)
    assert heat.shape == (tiny.CLASSES, 4)
    assert heat[2].tolist() == [0, 0, 0, 1]
    assert heat.sum() == 4


def test_labels_are_matched_by_class_and_not_by_place(moe: Configuration) -> None:
    ids = [moe.class_ids[2], moe.class_ids[0]]
    assert labels_for(moe, Labelled(tiny.images(3), np.array([0, 1, 0]), ids)).tolist() == [2, 0, 2]
    with pytest.raises(DataError, match="knows no class 'cat'"):
        labels_for(moe, Labelled(tiny.images(1), np.array([0]), ["cat"]))


def test_energy_comes_from_counters_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, part = tmp_path / "intel-rapl:0", tmp_path / "intel-rapl:0:0"
    for folder in (package, part):
        folder.mkdir()
        (folder / "energy_uj").write_text("900\n")
        (folder / "max_energy_range_uj").write_text("1000\n")
    readings = iter([900, 400] * 3)
    meter = energy.Rapl.open(tmp_path)
    assert meter is not None and meter.counters == [package]  # a part's energy is in its package's
    monkeypatch.setattr(meter, "_read", lambda c, name: 1000 if name == "max_energy_range_uj" else next(readings))
    found = energy.measure_energy({"a": lambda number: None}, meter, chunks=3, chunk_seconds=0)
    assert found is not None
    assert found["a"].value == 0.5  # millijoules: from 900 over the counter's end at 1000 to 400
    (package / "energy_uj").write_text("no")
    assert energy.Rapl.open(tmp_path) is None
    assert energy.Rapl.open(tmp_path / "none") is None
    assert energy.measure_energy({"a": lambda number: None}, None) is None


POWERMETRICS = """\
#!{python}
import plistlib, sys, time
assert sys.argv[1:] == ["--samplers", "cpu_power", "--format", "plist", "--buffer-size", "0", "--sample-rate", "50"]
if {refuse}:
    sys.exit("powermetrics must be invoked as the superuser")
last, number = time.monotonic(), 0
while True:
    time.sleep(0.05)
    now = time.monotonic()
    used = 2000 * (now - last)  # two watts in all
    processor = {{"cpu_energy": 0.5 * used, "gpu_energy": 0.3 * used, "ane_energy": 0.2 * used, "clusters": []}}
    text = plistlib.dumps({{"elapsed_ns": round(1e9 * (now - last)), "processor": processor}})
    sys.stdout.buffer.write((b"\\0" if number else b"") + text)
    sys.stdout.flush()
    last, number = now, number + 1
"""


def test_energy_from_powermetrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "powermetrics"
    command.write_text(POWERMETRICS.format(python=sys.executable, refuse=False))
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(os, "geteuid", lambda: 0)  # else it would ask sudo
    meter = energy.Powermetrics.open()
    assert meter is not None
    taken: dict[str, list[float]] = {"short": [], "long": []}
    started = 0.0

    def sleeping(name: str, seconds: float) -> Callable[[int], None]:
        def sleep(number: int) -> None:
            """Sleeps, and notes what one call has taken since the turn began; other programs may run in between."""
            nonlocal started
            if number == 0:
                started = time.monotonic()
                taken[name].append(0)
            time.sleep(seconds)
            taken[name][-1] = (time.monotonic() - started) / (number + 1)

        return sleep

    candidates = {"short": sleeping("short", 0.02), "long": sleeping("long", 0.06)}
    found = energy.measure_energy(candidates, meter, chunks=3, chunk_seconds=0.3)
    assert found is not None
    for name, seconds in taken.items():
        assert found[name].value == pytest.approx(2000 * np.median(seconds), rel=0.2), name  # two watts
    assert meter._process.poll() is not None
    command.write_text(POWERMETRICS.format(python=sys.executable, refuse=True))
    assert energy.Powermetrics.open() is None
    command.unlink()
    assert energy.Powermetrics.open() is None


def test_a_whole_run_reads_back(
    moe_checkpoint: Path, dense_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dense bundle, a checkpoint for two backends, and the graph of all experts, with everything but residency."""
    monkeypatch.setattr("mvmoe_deploy.bench.measure.run.BATCHES", (1, 3))
    monkeypatch.setattr("mvmoe_deploy.bench.measure.latency.MAX_WARMUP_SECONDS", 0.1)
    tiny.image_folder(tmp_path / "data", "val", tiny.CLASSES, 2)
    configurations = prepare(
        [dense_path, moe_checkpoint], tmp_path / "x", ["onnxruntime", "torch"], ["all-experts"]
    )  # fmt: skip
    names = ["dense", "moe onnxruntime", "moe torch", "all-experts"]
    assert [c.name for c in configurations] == names
    plan = Plan(rounds=3, min_seconds=0, cold_starts=1, throughput=True, memory_by_resident=False, count=10)
    seen: list[str] = []
    results = measure(configurations, Images([], "test", tmp_path / "data"), plan, lambda what, *_: seen.append(what))
    write_json(results, tmp_path / "r.json")
    assert read_json(tmp_path / "r.json") == results
    dense, routed, eager, whole = results.rows
    assert [row.name for row in results.rows] == names
    assert dense.ratio is not None
    assert dense.ratio.value == 1
    assert all(len(row.warm.samples) == 3 and row.cold_start is not None for row in results.rows)
    assert [t.batch for t in routed.throughput] == [1, 3]
    assert (dense.hit, whole.hit, eager.hit) == (None, None, None)
    assert routed.hit is not None
    assert routed.switch is not None
    assert routed.switch.p50.value > routed.hit.p50.value
    # the same function, whoever runs it
    accuracies = [row.accuracy for row in (routed, eager, whole)]
    assert all(found is not None for found in accuracies)
    assert len({(found.images, found.top1, found.top5) for found in accuracies if found}) == 1
    assert accuracies[0].heat_map == accuracies[1].heat_map  # type: ignore[union-attr]
    assert whole.counted_macs == routed.counted_macs
    if memory.ROLLUP.exists():
        assert eager.memory is not None and eager.memory.by_resident == [eager.memory.used]  # nothing to load apart
    assert len(results.expert_names) == 4
    assert json.loads(json.dumps(results.machine))["cores"] >= 1
    assert {"memory", "cold start", "warm latency", "throughput", "accuracy"} <= set(seen)


def test_torch_runs_a_checkpoint_as_the_bundle_does(moe_checkpoint: Path, moe: Configuration) -> None:
    eager = of_checkpoint(moe_checkpoint)
    batch = tiny.inputs(5).numpy()
    forced = np.array([[3], [1], [0], [2], [3]])
    for experts in (None, forced):
        outputs = []
        for c in (eager, moe):
            model = open_configuration(c)
            outputs.append(model.run(batch, experts))
            model.close()
        np.testing.assert_allclose(outputs[0][0], outputs[1][0], atol=1e-5)
        for field in ("experts", "gates", "probabilities"):
            np.testing.assert_allclose(getattr(outputs[0][1], field), getattr(outputs[1][1], field), atol=1e-5)


def test_baselines_need_a_routed_checkpoint(dense_checkpoint: Path, dense_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="are made from a routed checkpoint"):
        prepare([dense_path], tmp_path, baselines=["all-experts"])
    with pytest.raises(ConfigError, match="unknown backend 'tpu'"):
        prepare([dense_checkpoint], tmp_path, backends=["tpu"])
    with pytest.raises(BackendError, match=r"\\xfc: not UTF-8"):  # it could not be passed on to another process
        prepare([tmp_path / "\udcfc"], tmp_path)


def test_nothing_to_measure_is_said(moe: Configuration) -> None:
    for configurations in ([], [moe, moe]):
        with pytest.raises(ConfigError, match="nothing to measure, or two"):
            measure(configurations, Images(list(tiny.images(1)), "test"), QUICK)


def test_the_papers_scales_are_those_of_its_figure() -> None:
    scales = paper_scales()
    assert len(scales) == 12
    for scale, (dense, routed) in scales.items():
        assert dense.mflops == routed.mflops == round(config_from_name(f"vit_{scale}").flops() / 1e6)
        assert routed.top1 > dense.top1
    assert scales["12x192"][1].top1 == 62.90


def test_scales_are_chosen_by_name() -> None:
    assert choose_scales(None) == list(paper_scales())
    assert choose_scales("6x64, 12x192,6x64") == ["6x64", "12x192"]
    with pytest.raises(ConfigError, match="'tiny' is not of the form 12x192; the paper's are 12x384"):
        choose_scales("tiny")


def test_the_suite_runs_a_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mvmoe_deploy.bench.measure.latency.MAX_WARMUP_SECONDS", 0.1)
    real = paper_scales()
    monkeypatch.setattr("mvmoe_deploy.bench.candidates.suite.paper_scales", lambda: {"3x16": real["6x64"]})
    plan = Plan(rounds=2, min_seconds=0, cold_starts=0)
    results = measure_suite(["3x16"], Images(list(tiny.images(2)), "test"), plan, tmp_path)
    assert [(row.name, row.group, row.kind) for row in results.rows] == [
        ("vit_3x16", "3x16", "dense"),
        ("mvmoe_3x16", "3x16", "mobile-vmoe"),
    ]
    assert [row.paper.top1 for row in results.rows if row.paper] == [36.64, 41.30]
    assert results.rows[0].flops == results.rows[1].flops
    assert results.rows[0].accuracy is None


def test_ratios_are_to_the_first_row_of_the_group(moe: Configuration, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups of two rows; every phase is replaced by known samples, different in every round."""
    names = {"a1": ("a", 1.0), "a2": ("a", 2.0), "b1": ("b", 4.0), "b2": ("b", 12.0)}
    configurations = [msgspec.structs.replace(moe, name=name, group=group) for name, (group, _) in names.items()]
    rounds = np.linspace(1, 3, 9)  # a machine that becomes slower: a ratio that is not paired would be wide
    now = noise.now()
    timed = Timed(
        samples={name: (factor * rounds).tolist() for name, (_, factor) in names.items()},
        first=dict.fromkeys(names, 7.0), warmup=20, stable=True, since=now, until=now,
    )  # fmt: skip
    phases = run._Together(timed, throughput={}, energy=None, accuracy={})
    monkeypatch.setattr(run, "_memory", lambda _: dict.fromkeys(names))
    monkeypatch.setattr(run, "_together", lambda _: phases)
    for phase in ("_cold_starts", "_residency"):
        monkeypatch.setattr(run, phase, lambda _: {})
    monkeypatch.setattr(run, "_hit_and_switch", lambda _: None)
    rows = measure(configurations, Images(list(tiny.images(1)), "test"), QUICK).rows
    assert [(row.name, row.group) for row in rows] == [(name, group) for name, (group, _) in names.items()]
    ratios = [row.ratio for row in rows]
    assert [(ratio.value, ratio.low, ratio.high) for ratio in ratios if ratio] == [
        (pytest.approx(value),) * 3 for value in (1, 2, 1, 3)
    ]
    assert [row.warm.p50.value for row in rows] == [2, 4, 8, 24]
