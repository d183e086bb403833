"""Every sub-command of mvmoe-bench: its help, its defaults, and the results that it passes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import synthetic

from mvmoe_deploy.bench.results import Estimate, Results, write_json
from mvmoe_deploy.bench.selfcheck.bars import Figure
from mvmoe_deploy.cli import bench
from mvmoe_deploy.models import ZOO


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The output of a command that succeeds."""
    assert bench.main(list(argv)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--help"], ["measure", "android", "coreml", "figures", "parity", "executorch", "training", "report", "compare",
                      "--memory-sweep", "ratios are to the first"]),
        (["measure", "--help"], ["--memory-sweep", "dense,stock,dense-wide,all-experts,vmoe", "--html FILE"]),
        (["android", "--help"], ["--runner PATH", "--json FILE", "onnxruntime_perf_test"]),
        (["--device", "android", "--help"], ["--runner PATH"]),
        (["coreml", "--help"], ["of target coreml"]),
        (["measure", "--device=coreml", "--help"], ["of target coreml"]),
        (["figures", "--help"], ["--rounds"]),
        (["parity", "--help"], ["--data DIR"]),
        (["executorch", "--help"], ["matrix products / naive"]),
        (["training", "--help"], ["--optimizer"]),
        (["report", "--help"], ["RESULTS.json", "--plot PNG"]),
        (["compare", "--help"], ["--fail-if CONDITION", "process start to first prediction, median"]),
    ],
)  # fmt: skip
def test_help(argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.main(argv)
    help_text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert [word for word in words if word not in help_text] == []


def test_an_unknown_device_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.main(["a.mvmoe", "--device", "npu"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    assert all(word in error for word in ("error: argument --device", "'npu'", "cpu", "android", "coreml"))


def test_a_device_takes_the_other_arguments_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(bench.android, "run", seen.append)
    argv = ["a.mvmoe", "--threads", "2", "--device", "android", "b.mvmoe", "--runner", "r"]
    # argparse takes only the first of two groups of positional arguments that an option separates
    for given in (["--device", "android", "a.mvmoe", "b.mvmoe", "--runner", "r"],
                  ["a.mvmoe", "b.mvmoe", "--runner", "r", "--device=android"],
                  ["measure", "a.mvmoe", "b.mvmoe", "--runner", "r", "--device", "android"],
                  ["android", "a.mvmoe", "b.mvmoe", "--runner", "r"]):  # fmt: skip
        assert bench.main(given) == 0
        args = seen.pop()
        assert ([path.name for path in args.bundles], args.runner.name) == (["a.mvmoe", "b.mvmoe"], "r")
    with pytest.raises(SystemExit):
        bench.main(argv)


@pytest.fixture
def results_json(tmp_path: Path) -> Path:
    write_json(synthetic.results(), tmp_path / "results.json")
    return tmp_path / "results.json"


def test_report(results_json: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "report", str(results_json))
    assert "stock †: coefficient of variation 0.31 is above 0.15" in text
    names = {"--csv": "r.csv", "--markdown": "r.md", "--html": "r.html", "--plot": "r.png"}
    arguments = [part for option, name in names.items() for part in (option, str(tmp_path / name))]
    assert shown(capsys, "report", str(results_json), *arguments) == ""
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", *names.values()}


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_report_fits_the_terminal(
    width: int, results_json: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    text = shown(capsys, "report", str(results_json))
    assert max(map(len, text.splitlines())) <= width
    assert "memory" in text


def test_compare(results_json: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = synthetic.results()
    larger = msgspec.structs.replace(results.rows[0], bytes_on_disk=2 * results.rows[0].bytes_on_disk)
    write_json(msgspec.structs.replace(results, rows=[larger, *results.rows[1:]]), tmp_path / "b.json")
    argv = ["compare", str(results_json), str(tmp_path / "b.json")]
    (line,) = (line for line in shown(capsys, *argv).splitlines() if "higher" in line)
    assert line.split()[:2] == ["dense", "bytes"] and "2.000" in line
    assert bench.main([*argv, "--fail-if", "bytes > 1.5x"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: dense: bytes > 1.5x: 2.000")


def figures(*values: float) -> Iterator[Figure]:
    return (Figure(f"figure {n}", value, 1.05, "1 ms / 1 ms") for n, value in enumerate(values))


def test_figures(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mvmoe_deploy.bench.selfcheck.bars.measure_all", lambda rounds, folder: figures(1.0, 0.5))
    assert shown(capsys, "figures", "--rounds", "7").count("yes") == 2
    monkeypatch.setattr("mvmoe_deploy.bench.selfcheck.bars.measure_all", lambda rounds, folder: figures(1.0, 1.06))
    assert bench.main(["figures"]) == 1
    out, err = capsys.readouterr()
    assert "NO" in out and err.endswith("error: 1 of 2 figures miss their bar\n")


def test_figures_as_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    figure = Figure("routed / dense", 1.1, 1.05, "1 ms / 1 ms", floor=1.06)
    monkeypatch.setattr("mvmoe_deploy.bench.selfcheck.bars.measure_all", lambda rounds, folder: iter([figure]))
    assert bench.main(["figures", "--json"]) == 1
    (found,) = json.loads(capsys.readouterr().out)
    assert found == {
        "what": "routed / dense",
        "value": 1.1,
        "bar": 1.05,
        "detail": "1 ms / 1 ms",
        "floor": 1.06,
        "met": False,
    }
    assert bench.main(["figures"]) == 1
    header, _, row = capsys.readouterr().out.splitlines()[:3]
    assert "floor" in header and "1.06" in row


def test_parity(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [["onnx", "fp32", "separate", "1.0e-06", "10%", "100.0%", None, "36.1%", "2.40", "onnxruntime"]]
    seen: list[Any] = []
    monkeypatch.setattr(
        "mvmoe_deploy.bench.selfcheck.parity.measure", lambda *args, **options: seen.append(args) or rows
    )
    assert "worst abs error" in shown(capsys, "parity", "--data", str(tmp_path), "--count", "5")
    assert seen[0][0] == ZOO / "scripts" / "moe.safetensors" and seen[0][1:] == (tmp_path, 5)
    shown(capsys, "parity")
    assert seen[1][1] == ZOO / "scripts" / "sample"
    assert bench.main(["parity", "--checkpoint", "a.pt"]) == 2
    assert capsys.readouterr().err == "error: --checkpoint needs --data, labelled images of its classes, or --images\n"
    assert shown(capsys, "parity", "--data", str(tmp_path), "--markdown").split()[:4] == [
        "|",
        "target",
        "|",
        "precision",
    ]


def test_executorch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("executorch")
    report = {
        "ms": {"routed": {"p50": 1.5, "p90": 2.0, "p99": 3.0}},
        "ratios": {"routed / dense": 1.04},
        "delegation": {"naive": {"delegated": 9, "delegates": 3, "undelegated": {"layer_norm": 2}}},
    }
    seen: list[Any] = []
    monkeypatch.setattr(
        "mvmoe_deploy.bench.selfcheck.lowering.measure_scale", lambda *args, **options: seen.append(args) or report
    )
    text = shown(capsys, "executorch", "--model", "mvmoe_6x64", "--rounds", "3")
    assert seen[0][0] == "mvmoe_6x64" and seen[0][2:] == (3, 1)
    assert "1 thread, 3 interleaved rounds" in text
    assert "naive: 9 operators in 3 delegates; outside: 2 layer_norm" in text
    assert json.loads(shown(capsys, "executorch", "--json"))["ratios"] == report["ratios"]


def test_executorch_refuses_a_dense_scale(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("executorch")
    assert bench.main(["executorch", "--model", "vit_6x64"]) == 2
    assert capsys.readouterr().err.startswith("error: vit_6x64 is not routed")


def test_measure_asks_for_what_was_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All options reach the plan; ``--full`` turns everything on."""
    seen: list[Any] = []

    def measure(configurations: Any, images: Any, plan: Any, progress: Any) -> Results:
        seen.append((images.data, plan))
        return synthetic.results([synthetic.row("dense", ratio=Estimate(1, 1, 1))])

    def prepare(given: Any, folder: Any, backends: Any, baselines: Any, progress: Any) -> list[Any]:
        seen.append((given, backends, baselines))
        return []

    monkeypatch.setattr("mvmoe_deploy.bench.measure.run.measure", measure)
    monkeypatch.setattr("mvmoe_deploy.bench.candidates.prepare.prepare", prepare)
    argv = ["a.pt", "--threads", "1", "--rounds", "7", "--min-seconds", "0.5", "--cold-starts", "3", "--count", "11"]
    shown(capsys, *argv, "--memory-sweep")
    (given, backends, baselines), (data, plan) = seen
    assert data is None
    assert ([str(path) for path in given], backends, baselines) == (["a.pt"], ["onnxruntime"], [])
    assert (plan.threads, plan.rounds, plan.min_seconds, plan.cold_starts, plan.count) == (1, 7, 0.5, 3, 11)
    assert (plan.memory_by_resident, plan.throughput, plan.residency) == (True, False, False)
    seen.clear()
    shown(capsys, "--full")
    (given, backends, baselines), (data, plan) = seen
    zoo = ZOO / "scripts"
    assert (given, data) == ([zoo / "dense.safetensors", zoo / "moe.safetensors"], zoo / "sample")
    assert (backends, baselines) == (["onnxruntime", "torch"], ["stock", "dense-wide", "all-experts", "vmoe"])
    assert (plan.memory_by_resident, plan.throughput, plan.residency) == (True, True, True)
    assert (plan.rounds, plan.cold_starts) == (300, 10)
