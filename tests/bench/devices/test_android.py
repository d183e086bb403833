"""Measuring on a phone, against a fake adb that checks every call and runs what reaches the phone's shell."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tiny

from mvmoe_deploy.bench.devices import android
from mvmoe_deploy.bench.results import Results, read_json
from mvmoe_deploy.bundle import open_bundle
from mvmoe_deploy.errors import BackendError, ConfigError

TOOLS = {
    "getprop": """case "$1" in ro.product.manufacturer) echo Google;; ro.product.model) echo "Pixel 8";; ro.soc.model) echo Tensor;;
        ro.build.version.release) echo 15;; ro.product.cpu.abi) echo arm64-v8a;; esac""",
    "dumpsys": """case "$1" in battery) printf 'Current Battery Service state:\\n  AC powered: false\\n  level: 81\\n  temperature: 287\\n';;
        thermalservice) echo "IsStatusOverride: false"; echo "Thermal Status: $(cat $FAKE_ADB/status)";; esac""",
    "nproc": "echo 9",
    "logcat": """test "$1" = -d && test "$3 $4" = "-s ExecuTorch" && grep " ${2#--pid=} *${2#--pid=} " $FAKE_ADB/logcat""",
}  # fmt: skip


class Phone:
    """The fake phone's folder, and how it behaves."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.scenario: dict[str, Any] = {"devices": {"emulator-5554": "device"}, "inputs": {}}
        (folder / "data").mkdir(parents=True)
        (folder / "bin").mkdir()
        for name, script in TOOLS.items():
            self._program(folder / "bin" / name, f"#!/bin/sh\n{script}\n")
        for core in range(2):
            governor = folder / f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_governor"
            governor.parent.mkdir(parents=True)
            governor.write_text("schedutil\n")
        zone = folder / "sys/class/thermal/thermal_zone0"
        zone.mkdir(parents=True)
        (zone / "type").write_text("BIG\n")
        (zone / "temp").write_text("41300\n")
        (folder / "proc").mkdir()
        (folder / "proc/loadavg").write_text("1.25 1.00 0.90 2/900 12345\n")
        (folder / "status").write_text("0\n")
        (folder / "calls.jsonl").touch()
        here = Path(__file__).parents[2] / "support"
        self.adb = self._program(folder / "adb", f"#!{sys.executable} -IS\n" + (here / "fake_adb.py").read_text())
        self.runners = {
            name: self._program(
                folder / "host" / name, f"#!{sys.executable} -IS\n" + (here / "fake_runners.py").read_text()
            )
            for name in ("executor_runner", "onnxruntime_perf_test")
        }
        monkeypatch.setenv("FAKE_ADB", str(folder))
        self.behave()

    @staticmethod
    def _program(path: Path, content: str) -> Path:
        path.parent.mkdir(exist_ok=True)
        path.write_text(content, encoding="utf-8")
        path.chmod(0o755)
        return path

    def behave(self, **scenario: Any) -> None:
        self.scenario |= scenario
        (self.folder / "scenario.json").write_text(json.dumps(self.scenario))

    @property
    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "calls.jsonl").read_text().splitlines()]

    @property
    def runs(self) -> list[str]:
        """Shell commands that started a runner."""
        return [call[3] for call in self.calls if call[2:3] == ["shell"] and " exec " in call[3]]

    @property
    def left_over(self) -> list[str]:
        return [path.name for path in (self.folder / "data").iterdir()]

    def measure(self, *bundles: Path, runner: str = "onnxruntime_perf_test", **options: Any) -> Results:
        adb = android.find_device(str(self.adb))
        pieces = [piece for bundle in bundles for piece in open_bundle(bundle).manifest.pieces]
        self.behave(names={piece.graph: [spec.name for spec in piece.inputs] for piece in pieces})
        return android.measure(adb, self.runners[runner], bundles, runs=10, **options)


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Phone:
    return Phone(tmp_path / "phone", monkeypatch)


def executorch_like(bundle: Path, folder: Path, batch: int = 1) -> Path:
    """The manifest of an executorch bundle; the fake runner does not look into the pieces."""
    copy = tiny.copy_of(bundle, folder)

    def edit(manifest: dict[str, Any]) -> None:
        manifest["target"] = "executorch"
        manifest["options"] = {"max_batch": batch}
        for piece in manifest["pieces"]:
            piece["graph"] = piece["graph"].replace(".onnx", ".pte")
            piece["files"] = [path.replace(".onnx", ".pte") for path in piece["files"]]
            for spec in piece["inputs"]:
                spec["shape"][0] = batch
        for file in manifest["files"]:
            if file["path"].endswith(".onnx"):
                (copy / file["path"]).rename((copy / file["path"]).with_suffix(".pte"))
            file["path"] = file["path"].replace(".onnx", ".pte")

    tiny.edit_manifest(copy, edit)
    return copy


def input_sizes(bundle: Path) -> dict[str, list[int]]:
    """Bytes of one image's inputs of each graph."""
    sizes = {}
    for piece in open_bundle(bundle).manifest.pieces:
        sizes[piece.graph] = []
        for spec in piece.inputs:
            count = 4
            for extent in spec.shape[1:]:
                count *= int(extent)
            sizes[piece.graph].append(count)
    return sizes


def check(results: Results) -> None:
    """Checks the result of either runner: a routed bundle's pieces and their sum, against the dense baseline."""
    rows = {row.name: row for row in results.rows}
    tails = [f"moe/expert_{expert:02d}" for expert in range(tiny.EXPERTS)]
    assert list(rows) == ["dense", "moe", "moe/trunk", *tails]
    assert [len(row.warm.samples) for row in results.rows] == [10] * len(rows)
    # the fake runs take 8 and 2 ms, and twice that at first: what warming up keeps out
    for name, milliseconds in {"dense": 8, "moe": 10, "moe/trunk": 8, tails[0]: 2}.items():
        assert rows[name].warm.p50.value == pytest.approx(milliseconds, abs=0.03), name
        assert max(rows[name].warm.samples) < milliseconds + 0.03
    moe, ratio = rows["moe"], rows["moe"].ratio
    assert ratio is not None and ratio.value == pytest.approx(10 / 8, rel=0.01) and rows["dense"].ratio is None
    # run i is run i of the trunk and run i of expert i modulo E's tail
    pairs = [rows["moe/trunk"].warm.samples[i] + rows[tails[i % tiny.EXPERTS]].warm.samples[i] for i in range(10)]
    assert moe.warm.samples == pytest.approx(pairs)
    assert (moe.kind, rows["dense"].kind) == ("mobile-vmoe", "dense")
    assert moe.bytes_first_image < moe.bytes_on_disk and len(moe.bytes_per_expert) == tiny.EXPERTS
    assert moe.memory is None and moe.cold_start is None and moe.energy is None  # not measured, not invented
    machine = results.machine
    assert (machine["device"], machine["processor"], machine["system"], machine["cores"]) == (
        "Google Pixel 8",
        "Tensor",
        "Android 15",
        9,
    )
    assert machine["governors before"] == ["schedutil"]
    assert machine["temperatures before"] == {"battery": 28.7, "BIG": 41.3} == machine["temperatures after"]
    assert moe.warm.noise.throttled is False and moe.warm.noise.load_average == 1.25


def test_onnx_bundles_with_perf_test(phone: Phone, bundle_path: Path, dense_path: Path) -> None:
    results = phone.measure(dense_path, bundle_path, threads=2)
    check(results)
    assert {row.backend for row in results.rows} == {"onnxruntime"}
    assert results.method["load ms"]["moe/trunk"] == [31.2] * android.PASSES
    assert set(results.method["peak resident set of the runner's process, bytes"]["dense/model"]) == {52428800}
    assert len(phone.runs) == android.PASSES * (2 + tiny.EXPERTS)
    assert all("-e cpu -m times -r 7 -x 2 " in run for run in phone.runs)
    assert phone.left_over == []


def test_executorch_bundles_with_executor_runner(
    phone: Phone, bundle_path: Path, dense_path: Path, tmp_path: Path
) -> None:
    dense, moe = (executorch_like(bundle, tmp_path) for bundle in (dense_path, bundle_path))
    phone.behave(inputs=input_sizes(dense) | input_sizes(moe))
    results = phone.measure(dense, moe, runner="executor_runner")
    check(results)
    assert {row.backend for row in results.rows} == {"executorch"}
    assert results.method["load ms"]["moe/trunk"] == [7.251] * android.PASSES
    assert results.method["peak resident set of the runner's process, bytes"] is None
    assert phone.left_over == []


def test_pieces_take_turns(phone: Phone, bundle_path: Path) -> None:
    """Each piece is the first in one pass, if there are enough passes for that."""
    phone.measure(bundle_path)
    graphs = [run.split()[-3] for run in phone.runs]
    passes = [graphs[start : start + 1 + tiny.EXPERTS] for start in range(0, len(graphs), 1 + tiny.EXPERTS)]
    assert len({order[0] for order in passes}) == len(passes) == android.PASSES
    assert all(sorted(order) == sorted(passes[0]) for order in passes)


def test_hostile_file_names_stay_names(
    phone: Phone, bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tiny.copy_of(bundle_path, tmp_path)
    bad = "trunk; touch $(echo pwned) 'x.onnx"

    def edit(manifest: dict[str, Any]) -> None:
        for piece in manifest["pieces"]:
            if piece["role"] == "trunk":
                piece["files"] = [bad if path == piece["graph"] else path for path in piece["files"]]
                for file in manifest["files"]:
                    if file["path"] == piece["graph"]:
                        (copy / file["path"]).rename(copy / bad)
                        file["path"] = bad
                piece["graph"] = bad

    tiny.edit_manifest(copy, edit)
    monkeypatch.setattr(android, "PASSES", 1)
    assert len(phone.measure(copy).rows) == 2 + tiny.EXPERTS
    assert not list(phone.folder.rglob("pwned")) and not Path("pwned").exists()


@pytest.mark.parametrize(
    ("devices", "serial", "message"),
    [
        ({}, None, "adb sees no device; connect one"),
        ({"A": "unauthorized"}, None, "A: has not authorised this computer; unlock it"),
        ({"A": "offline"}, None, "A: is offline"),
        ({"A": "no permissions (missing udev rules? user is in the plugdev group); see [http://developer.android.com]"}, None, "A: is in state 'no permissions"),
        ({"A": "recovery"}, "A", "A: is in state 'recovery'"),
        ({"A": "device", "B": "device"}, None, r"several devices \(A, B\); pick one with --serial"),
        ({"A": "device"}, "C", "C: is not connected; adb sees A"),
        ({}, "C", "C: is not connected"),
    ],
)  # fmt: skip
def test_a_phone_that_cannot_be_used(phone: Phone, devices: dict[str, str], serial: str | None, message: str) -> None:
    phone.behave(devices=devices)
    with pytest.raises(BackendError, match=message):
        android.find_device(str(phone.adb), serial)
    assert phone.calls == [["devices"]]  # nothing was tried on it


def test_the_phone_is_picked_by_serial(phone: Phone) -> None:
    phone.behave(devices={"A": "offline", "B": "device"})
    assert android.find_device(str(phone.adb), "B").serial == "B"


def test_no_adb(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="cannot be run; install Android's platform-tools"):
        android.find_device(str(tmp_path / "adb"))


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        ({"crash": "expert_02"}, r"onnxruntime_perf_test result.csv failed with exit status 139 \(SIGSEGV\): terminating with uncaught"),
        ({"space": 10_000}, "no space left in /data/local/tmp"),
        ({"lost_at": "push"}, "the connection to the device was lost"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_said_and_tidied_up(
    phone: Phone, bundle_path: Path, scenario: dict[str, Any], message: str
) -> None:
    phone.behave(**scenario)
    with pytest.raises(BackendError, match=message):
        phone.measure(bundle_path)
    assert "lost_at" in scenario or phone.left_over == []
    assert phone.calls[-1][3].startswith("pkill -f /data/local/tmp/mvmoe-bench-")


def test_a_runner_that_hangs_is_given_up(phone: Phone, bundle_path: Path) -> None:
    phone.behave(hang=True)
    with pytest.raises(BackendError, match=r"no answer in 2 s"):
        phone.measure(bundle_path, timeout=2)
    assert phone.left_over == []


def test_executorch_errors_name_what_the_log_says(phone: Phone, dense_path: Path, tmp_path: Path) -> None:
    dense = executorch_like(dense_path, tmp_path)
    phone.behave(inputs={"model.pte": [1]})
    with pytest.raises(BackendError, match=r"exit status 134 \(SIGABRT\): .*Could not prepare inputs: 0x12"):
        phone.measure(dense, runner="executor_runner")


def test_a_runner_that_does_not_report_iterations_is_refused(phone: Phone, dense_path: Path, tmp_path: Path) -> None:
    dense = executorch_like(dense_path, tmp_path)
    phone.behave(inputs=input_sizes(dense), iterations_logged=3)
    with pytest.raises(BackendError, match=r"model.pte: executor_runner reported 3 of 7 iterations; build it from"):
        phone.measure(dense, runner="executor_runner")


def test_executor_runner_would_run_the_largest_batch(phone: Phone, dense_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"batches of up to 16 images, and executor_runner .* --max-batch 1"):
        phone.measure(executorch_like(dense_path, tmp_path, batch=16), runner="executor_runner")


def test_what_no_runner_can_run_is_refused(phone: Phone, dense_path: Path, bundle_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="takes bundles of one target; these are executorch, onnx"):
        phone.measure(executorch_like(dense_path, tmp_path), bundle_path)
    (phone.folder / "host" / "executor_runner").unlink()
    with pytest.raises(ConfigError, match="executor_runner: no such file"):
        phone.measure(bundle_path, runner="executor_runner")
    assert phone.left_over == []


def test_a_throttling_phone_marks_its_rows(phone: Phone, dense_path: Path) -> None:
    (phone.folder / "status").write_text("2\n")
    (row,) = phone.measure(dense_path).rows
    assert row.warm.noise.throttled and "the phone was throttling" in row.warm.noise.reasons


def test_what_a_phone_hides_is_not_known(phone: Phone, dense_path: Path) -> None:
    for tool in ("dumpsys", "getprop", "nproc"):
        (phone.folder / "bin" / tool).write_text("#!/bin/sh\nexit 1\n")
    results = phone.measure(dense_path)
    assert results.rows[0].warm.noise.throttled is None
    assert results.machine["device"] is None and results.machine["temperatures before"] == {"BIG": 41.3}


def test_the_command(phone: Phone, dense_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mvmoe_deploy.cli import bench

    phone.behave(names={"model.onnx": ["images"]})
    arguments = ["--device", "android", str(dense_path), "--adb", str(phone.adb), "--rounds", "5"]
    runner = str(phone.runners["onnxruntime_perf_test"])
    assert (
        bench.main(
            [*arguments, "--runner", runner, "--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]
        )
        == 0
    )
    assert "dense" in capsys.readouterr().out
    assert [row.name for row in read_json(tmp_path / "r.json").rows] == ["dense"]
    assert (tmp_path / "r.html").stat().st_size > 10_000
    phone.behave(devices={})
    assert bench.main([*arguments, "--runner", runner]) == 2
    assert (
        capsys.readouterr().err
        == "error: adb sees no device; connect one with USB debugging on, or start an emulator\n"
    )


def test_results_are_json(phone: Phone, dense_path: Path) -> None:
    results = phone.measure(dense_path)
    assert msgspec.json.decode(msgspec.json.encode(results), type=Results) == results
