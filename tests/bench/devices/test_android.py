"""Measuring on a phone, through the real adb, which talks to the tests' own daemon and runs what reaches its shell."""

from __future__ import annotations

import json
import os
import re
import site
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import adbd
import msgspec
import pytest
import tiny
from exported import export_tiny

from mvmoe_deploy.bench.devices import android
from mvmoe_deploy.bench.report.tables import terminal_text
from mvmoe_deploy.bench.results import Results, read_json
from mvmoe_deploy.bundle import open_bundle
from mvmoe_deploy.errors import BackendError, ConfigError

pytestmark = adbd.needs_adb

TOOLS = {
    "getprop": """case "$1" in ro.product.manufacturer) echo Google;; ro.product.model) echo "Pixel 8";; ro.soc.model) echo Tensor;;
        ro.build.version.release) echo 15;; ro.product.cpu.abi) echo arm64-v8a;; esac""",
    "dumpsys": """case "$1" in battery) printf 'Current Battery Service state:\\n  AC powered: false\\n  level: 81\\n  temperature: 287\\n';;
        thermalservice) echo "IsStatusOverride: false"; echo "Thermal Status: $(cat $PHONE/status)";; esac""",
    "nproc": "echo 9",
    "logcat": """test "$1" = -d && test "$3 $4" = "-s ExecuTorch" && grep " ${2#--pid=} *${2#--pid=} " $PHONE/logcat""",
}  # fmt: skip

PKILL = """
import os, re, signal, sys
from pathlib import Path
assert sys.argv[1] == "-f" and len(sys.argv) == 3
found = 1
for process in Path("/proc").glob("[0-9]*"):
    try:
        command = (process / "cmdline").read_bytes().replace(b"\\0", b" ").decode()
        of_phone = f"PHONE={os.environ['PHONE']}".encode() in (process / "environ").read_bytes().split(b"\\0")
    except OSError:
        continue
    if of_phone and int(process.name) != os.getpid() and re.search(sys.argv[2], command):
        os.kill(int(process.name), signal.SIGTERM)
        found = 0
sys.exit(found)
"""
"""As Android's: it ends every process of the phone whose command line matches, but for itself."""


class Phone:
    """A phone, and how it behaves."""

    def __init__(self, folder: Path, adb: Callable[..., str]) -> None:
        self.folder = folder
        self._adb = adb
        (folder / "data").mkdir(parents=True)
        (folder / "bin").mkdir()
        for name, script in TOOLS.items():
            self._program(folder / "bin" / name, f"#!/bin/sh\n{script}\n")
        self._program(folder / "bin" / "pkill", f"#!{sys.executable} -IS\n{PKILL}")
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
        (folder / "logcat").touch()
        programs = (Path(__file__).parents[2] / "support" / "fake_runners.py").read_text()
        self.runners = {
            name: self._program(folder / "host" / name, f"#!{sys.executable} -IS\n{programs}")
            for name in ("executor_runner", "onnxruntime_perf_test")
        }
        self.scenario: dict[str, Any] = {"inputs": {}, "path": [*site.getsitepackages(), *sys.path]}
        self.behave()
        environment = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PHONE": str(folder)}
        elsewhere = {path: f"{folder}{path}" for path in ("/proc/loadavg", "/sys/")}
        self.daemon = adbd.Adbd(folder / "data", environment, elsewhere)
        self.serial = f"127.0.0.1:{self.daemon.port}"

    @staticmethod
    def _program(path: Path, content: str) -> Path:
        path.parent.mkdir(exist_ok=True)
        path.write_text(content, encoding="utf-8")
        path.chmod(0o755)
        return path

    def connect(self) -> None:
        assert f"connected to {self.serial}" in self._adb("connect", self.serial)

    def unplug(self) -> None:
        self.daemon.vanish()
        self._adb("disconnect", self.serial)

    def behave(self, **scenario: Any) -> None:
        self.scenario |= scenario
        (self.folder / "scenario.json").write_text(json.dumps(self.scenario))

    @property
    def runs(self) -> list[str]:
        """Scripts that started a runner."""
        return [service for service in self.daemon.services if " exec " in service]

    @property
    def left_over(self) -> list[str]:
        return [path.name for path in (self.folder / "data").iterdir()]

    @property
    def running(self) -> list[str]:
        """Command lines of the phone's processes; those that are about to end are waited for."""
        for _ in range(50):
            found = list(self._running())
            if not found:
                break
            time.sleep(0.05)
        return found

    def _running(self) -> Iterator[str]:
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if f"PHONE={self.folder}".encode() in (process / "environ").read_bytes():
                    yield (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue

    def measure(self, *bundles: Path, runner: str = "onnxruntime_perf_test", **options: Any) -> Results:
        adb = android.find_device(serial=self.serial)
        pieces = [piece for bundle in bundles for piece in open_bundle(bundle).manifest.pieces]
        self.behave(names={piece.graph: [each.name for each in (*piece.inputs, *piece.weights)] for piece in pieces})
        return android.measure(adb, self.runners[runner], bundles, runs=10, **options)


@pytest.fixture(scope="module")
def adb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """Runs commands of the real adb, whose server is the tests' own."""
    with adbd.adb_server(tmp_path_factory.mktemp("adb")) as run:
        yield run


@pytest.fixture
def phone(tmp_path: Path, adb: Callable[..., str]) -> Iterator[Phone]:
    """A phone that adb is connected to."""
    phone = Phone(tmp_path / "phone", adb)
    phone.connect()
    yield phone
    phone.unplug()


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
    assert [row.selftest for row in results.rows] == [[]] * len(results.rows)
    assert results.method["self-test"] == "not run: onnxruntime_perf_test does not give away what a graph computed"
    assert phone.left_over == [] == phone.running


def test_swappable_tails_get_their_weights_as_inputs(phone: Phone, folder: Path) -> None:
    path = folder / "phone_swappable.mvmoe"
    bundle = export_tiny(tiny.moe_config(), path, layout="swappable").bundle
    (row, *pieces) = phone.measure(path).rows
    assert row.layout == "swappable" and len(pieces) == 1 + tiny.EXPERTS
    assert len(bundle.piece("tail", 0).weights) == 4  # the runner would have missed one
    assert len(phone.runs) == android.PASSES * (1 + tiny.EXPERTS)


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
    stages = {row.name: [stage.stage for stage in row.selftest] for row in results.rows if row.selftest}
    assert stages == {"dense": ["pixels", "logits"], "moe": ["pixels", "route", "gate", "logits"]}
    assert all(stage.passed == stage.cases for row in results.rows for stage in row.selftest)
    assert {stage.cases for stage in results.rows[1].selftest} == {tiny.EXPERTS}
    assert phone.left_over == [] == phone.running


@pytest.mark.parametrize(("piece", "stage"), [("trunk", "gate"), ("expert", "logits")])
def test_a_phone_that_computes_something_else_fails_the_selftest(
    piece: str, stage: str, phone: Phone, bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe = executorch_like(bundle_path, tmp_path)
    phone.behave(inputs=input_sizes(moe), factor={piece: 1.001})  # of the first class, channel and expert
    monkeypatch.setattr(android, "PASSES", 1)
    results = phone.measure(moe, runner="executor_runner")
    failed = [each.stage for each in results.rows[0].selftest if each.passed < each.cases]
    assert failed[0] == stage
    assert f"moe failed its self-test at {stage}" in terminal_text(results)


def test_pieces_take_turns(phone: Phone, bundle_path: Path) -> None:
    """Each piece is the first in one pass, if there are enough passes for that."""
    phone.measure(bundle_path)
    graphs = [found[1] for run in phone.runs if (found := re.search(r"(\S+\.onnx) result\.csv", run))]
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
    assert not list(tmp_path.rglob("pwned")) and not Path("pwned").exists()


@pytest.fixture
def more(tmp_path: Path, adb: Callable[..., str]) -> Iterator[Callable[[str], Phone]]:
    """Makes further phones, which greet adb with a state."""
    made: list[Phone] = []

    def make(state: str) -> Phone:
        made.append(Phone(tmp_path / f"phone{len(made)}", adb))
        made[-1].daemon.answers = state
        return made[-1]

    yield make
    for phone in made:
        phone.unplug()


def test_no_phone(adb: Callable[..., str]) -> None:
    with pytest.raises(BackendError, match="adb sees no device; connect one"):
        android.find_device()
    with pytest.raises(BackendError, match=r"C: is not connected$"):
        android.find_device(serial="C")


def test_the_phone_is_picked_by_serial(phone: Phone, more: Callable[[str], Phone]) -> None:
    assert android.find_device().serial == phone.serial
    other = more("device")
    other.connect()
    both = ", ".join(sorted([phone.serial, other.serial]))
    with pytest.raises(BackendError, match=rf"several devices \({both}\); pick one with --serial"):
        android.find_device()
    assert android.find_device(serial=other.serial).serial == other.serial
    with pytest.raises(BackendError, match=f"C: is not connected; adb sees {both}"):
        android.find_device(serial="C")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("unauthorized", "has not authorised this computer( yet)?; unlock it"),
        ("recovery", "is in state 'recovery', which adb cannot run programs in"),
    ],
)
def test_a_phone_that_cannot_be_used(state: str, message: str, more: Callable[[str], Phone]) -> None:
    phone = more(state)
    with pytest.raises(BackendError, match=f"{phone.serial}: {message}"):
        android.find_device(serial=phone.serial)  # which connects to it
    with pytest.raises(BackendError, match=f"{phone.serial}: {message}"):
        android.find_device()
    assert phone.daemon.services == []  # nothing was tried on it


def test_a_phone_that_went_offline(phone: Phone) -> None:
    phone.daemon.vanish()
    with pytest.raises(BackendError, match=f"{phone.serial}: is offline; reconnect it"):
        android.find_device()


def test_a_phone_behind_usb_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    state = "no permissions (missing udev rules? user is in the plugdev group); see [http://developer.android.com]"
    monkeypatch.setattr(android, "_devices", lambda program: {"A": state})
    with pytest.raises(BackendError, match="A: is in state 'no permissions"):
        android.find_device()


def test_adb_is_asked_to_connect_to_an_address(more: Callable[[str], Phone]) -> None:
    phone = more("device")
    assert android.find_device(serial=phone.serial).ask("echo hello") == "hello"


def test_an_address_where_nothing_listens(adb: Callable[..., str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    message = rf"127.0.0.1:{port}: adb cannot connect to it \(failed to connect .*refused\); turn on wireless debugging"
    with pytest.raises(BackendError, match=message):
        android.find_device(serial=f"127.0.0.1:{port}")


def test_an_adb_that_fails(tmp_path: Path) -> None:
    program = Phone._program(tmp_path / "bin" / "adb", "#!/bin/sh\necho 'error: cannot start server' >&2; exit 1\n")
    with pytest.raises(BackendError, match="adb devices failed: error: cannot start server"):
        android.find_device(str(program))


def test_no_adb(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="cannot be run; install Android's platform-tools"):
        android.find_device(str(tmp_path / "adb"))


@pytest.mark.parametrize("shell_v2", [True, False], ids=["new", "before Android 7"])
def test_what_goes_wrong_is_said_and_tidied_up(
    shell_v2: bool, tmp_path: Path, more: Callable[[str], Phone], bundle_path: Path
) -> None:
    """A phone's old shell does not even send exit statuses."""
    phone = more("device")
    phone.daemon.shell_v2 = shell_v2
    phone.connect()
    phone.behave(crash="expert_02")
    message = r"onnxruntime_perf_test result.csv failed with exit status 139 \(SIGSEGV\): terminating with uncaught"
    with pytest.raises(BackendError, match=message):
        phone.measure(bundle_path)
    assert phone.left_over == [] == phone.running
    phone.daemon.space = 10_000
    with pytest.raises(BackendError, match=f"{phone.serial}: no space left in /data/local/tmp; free some"):
        phone.measure(bundle_path)
    assert phone.left_over == [] == phone.running


def test_a_runner_that_hangs_is_given_up_and_ended(phone: Phone, bundle_path: Path) -> None:
    phone.behave(hang=True)
    with pytest.raises(BackendError, match=r"no answer in 2 s"):
        phone.measure(bundle_path, timeout=2)
    assert phone.left_over == [] == phone.running


def test_processes_and_folder_are_removed_without_ending_the_shell_that_does_it(phone: Phone) -> None:
    device = android.find_device()
    with android._folder(device) as folder:
        device.script(f"cp $(command -v sleep) {folder}/sleep; {folder}/sleep 60 > {folder}/output 2>&1 < /dev/null &")
        assert len(list(phone._running())) == 1 and phone.left_over == [folder.name]
    assert phone.left_over == [] == phone.running
    with pytest.raises(KeyError), android._folder(device):
        raise KeyError
    assert phone.left_over == []


def test_a_folder_that_cannot_be_removed_is_said(phone: Phone, dense_path: Path) -> None:
    (phone.folder / "bin" / "rm").write_text("#!/bin/sh\necho 'rm: Permission denied' >&2; exit 1\n")
    (phone.folder / "bin" / "rm").chmod(0o755)
    with (
        pytest.raises(BackendError, match="rm failed with exit status 1: rm: Permission denied"),
        android._folder(android.find_device()),
    ):
        pass


@pytest.mark.parametrize("shell_v2", [True, False], ids=["new", "before Android 7"])
@pytest.mark.parametrize("moment", ["push", "run", "last words"])
def test_a_phone_that_vanishes_never_looks_like_success(
    moment: str, shell_v2: bool, more: Callable[[str], Phone], bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """adb exits with 0, and says nothing, when a phone is unplugged while a command runs on it."""
    phone = more("device")
    phone.daemon.shell_v2 = shell_v2
    phone.connect()
    monkeypatch.setattr(android, "PASSES", 1)
    if moment == "push":
        phone.daemon.vanish_after = 10_000
    elif moment == "run":
        phone.behave(hang=True)
        phone.daemon.vanish_during = " exec "

    def progress(items: Iterator[Any], total: int) -> Iterator[Any]:
        yield from items
        if moment == "last words":  # after the last run, while the phone is asked how warm it is
            (phone.folder / "bin" / "dumpsys").write_text("#!/bin/sh\nsleep 60\n")
            phone.daemon.vanish_during = "dumpsys"

    reason = "couldn't read from device" if moment == "push" else "a command on it did not end"
    with pytest.raises(BackendError, match=rf"{phone.serial}: the connection to the device was lost \(.*{reason}"):
        phone.measure(bundle_path, progress=progress)


def test_words_arrive_as_they_are(phone: Phone) -> None:
    device = android.find_device()
    for word in ("a b", "$HOME", "it's", '"', "*", "a\nb", "--", "ü"):
        assert device.shell("printf", "%s", word) == word
    assert device.script("exit 3").returncode == 3
    assert device.script("sh -c 'kill -9 $$'").returncode == 137
    assert device.ask("false") is None


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
    arguments = ["--device", "android", str(dense_path), "--rounds", "5"]
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
    phone.unplug()
    assert bench.main([*arguments, "--runner", runner]) == 2
    assert (
        capsys.readouterr().err
        == "error: adb sees no device; connect one with USB debugging on, or start an emulator\n"
    )


def test_results_are_json(phone: Phone, dense_path: Path) -> None:
    results = phone.measure(dense_path)
    assert msgspec.json.decode(msgspec.json.encode(results), type=Results) == results
