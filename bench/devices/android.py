"""A bundle's pieces on a phone or emulator, over adb, with the engine's own runner.

The runner times one graph at a time, so pieces are measured: the trunk and every tail, each run in several passes.
The row of a whole image adds up the times of its pieces; see :func:`measure`.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import shlex
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import numpy as np

import mvmoe_deploy
from mvmoe_deploy import targets
from mvmoe_deploy.backends import LoadedPiece
from mvmoe_deploy.bench.candidates.prepare import of_bundle
from mvmoe_deploy.bench.measure.bootstrap import quantile_estimate, ratio_estimate
from mvmoe_deploy.bench.measure.noise import scatter
from mvmoe_deploy.bench.results import FORMAT, Latency, Noise, Results, Row
from mvmoe_deploy.bundle import Bundle, Piece, open_bundle
from mvmoe_deploy.errors import BackendError, ConfigError
from mvmoe_deploy.images import preprocess
from mvmoe_deploy.runtime import Runtime
from mvmoe_deploy.selftest import StageResult
from mvmoe_deploy.terminal import unique

PLACE = PurePosixPath("/data/local/tmp")
"""The only folder on a stock phone in which the shell's user may write files and run programs."""

PASSES = 5
"""Number of passes over all pieces, each in another order, so that a phone that warms up slows all pieces alike."""

WARMUP = 5
"""Number of runs at the start of each pass that are discarded, because each pass starts a new runner process."""

QUICK = 30.0
"""Seconds that a query to the phone may take."""

END = "mvmoe-bench: ended with"
"""What the phone's shell prints at the end of a script, before the exit status."""

LOST = re.compile(
    r"device '.*' not found|device (still )?(offline|unauthorized|connecting)|no devices|error: closed|protocol fault"
    r"|couldn't read from device|remote (read|write) failed|connection reset|failed to get feature set",
    re.IGNORECASE,
)
"""What adb says when the phone is gone; commandline.cpp, transport.cpp and file_sync_client.cpp have the words."""


Progress = Callable[[Iterator[Any], int], Iterator[Any]]


@dataclass(frozen=True)
class Adb:
    """One phone or emulator, reached through the ``adb`` program."""

    program: str
    serial: str

    def run(self, *arguments: str, timeout: float = QUICK) -> str:
        """Runs ``adb -s SERIAL ARGUMENTS`` and returns what it printed.

        Raises:
            BackendError: the command failed, or took longer than ``timeout`` seconds.
        """
        done = call(self.program, ["-s", self.serial, *arguments], timeout)
        if done.returncode:
            gone = LOST.search(f"{done.stdout}\n{done.stderr}")
            raise BackendError(self.lost(done) if gone else self.explain(f"adb {arguments[0]}", done))
        return done.stdout

    def script(self, script: str, timeout: float = QUICK) -> subprocess.CompletedProcess[str]:
        """Runs a script in the phone's shell; the result has the script's exit status.

        The shell prints the status after everything else. If that line is missing, the script has not ended: adb exits
        with 0 when a phone is unplugged in the middle, and phones older than Android 7 send no status at all.

        Raises:
            BackendError: the connection was lost, or the script took longer than ``timeout`` seconds.
        """
        wrapped = f"({script}\n); status=$?; echo; echo {shlex.quote(END)} $status"
        done = call(self.program, ["-s", self.serial, "shell", wrapped], timeout)
        found = re.fullmatch(rf"(.*)\n{END} (\d+)\s*", done.stdout.replace("\r\n", "\n"), re.DOTALL)
        if not found:
            raise BackendError(self.lost(done))
        return subprocess.CompletedProcess(done.args, int(found[2]), found[1], done.stderr)

    def shell(self, *words: str, timeout: float = QUICK) -> str:
        """Runs a command on the phone and returns what it printed; each word arrives there as one word.

        Raises:
            BackendError: the command failed, or see :meth:`script`.
        """
        done = self.script(shlex.join(words), timeout)
        if done.returncode:
            raise BackendError(self.explain(words[0], done))
        return done.stdout

    def ask(self, script: str) -> str | None:
        """The output of a shell script on the phone; None if it prints nothing, as when it fails."""
        return self.script(script).stdout.strip() or None

    def explain(self, what: str, done: subprocess.CompletedProcess[str]) -> str:
        """A one-line error message made from the output of adb or the phone."""
        said = f"{done.stdout}\n{done.stderr}"
        if "No space left on device" in said:
            return f"{self.serial}: no space left in {PLACE}; free some and measure again"
        status = done.returncode
        by_signal = ""
        if 128 < status < 128 + 32:
            by_signal = f" ({signal.Signals(status - 128).name})"
            shells = signal.strsignal(status - 128) or " "  # the shell says "Aborted", after what the program said
            said = "\n".join(line for line in said.splitlines() if not line.startswith(shells))
        return f"{self.serial}: {what} failed with exit status {status}{by_signal}: {_reason(said)}"

    def lost(self, done: subprocess.CompletedProcess[str]) -> str:
        """The error message for a phone that is gone."""
        said = f"{done.stdout}\n{done.stderr}"
        reason = _reason(said) if LOST.search(said) else "a command on it did not end"
        return f"{self.serial}: the connection to the device was lost ({reason})"


def call(program: str, arguments: Sequence[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Runs adb.

    Raises:
        BackendError: there is no such program, or it does not answer in time.
    """
    try:
        return subprocess.run(
            [program, *arguments], capture_output=True, text=True, errors="replace", timeout=timeout, check=False
        )
    except (FileNotFoundError, PermissionError):
        raise BackendError(f"{program}: cannot be run; install Android's platform-tools or give --adb PATH") from None
    except subprocess.TimeoutExpired:
        raise BackendError(f"adb {' '.join(arguments)[:100]}: no answer in {timeout:g} s") from None


def find_device(program: str = "adb", serial: str | None = None) -> Adb:
    """Picks the phone.

    Args:
        program: the adb program.
        serial: the phone's serial number; optional if only one phone is connected. With HOST:PORT, adb is asked to
            connect to it.

    Raises:
        BackendError: no phone is connected, several are and no serial is given, or the phone cannot be used; the
            message says what to do.
    """
    states = _devices(program)
    if serial and ":" in serial and serial not in states:
        done = call(program, ["connect", serial], QUICK)  # exits with 0 when it fails, too
        states = _devices(program)
        if serial not in states:
            said = _reason(f"{done.stdout}\n{done.stderr}")
            raise BackendError(f"{serial}: adb cannot connect to it ({said}); turn on wireless debugging there")
    if serial is None:
        if not states:
            raise BackendError("adb sees no device; connect one with USB debugging on, or start an emulator")
        if len(states) > 1:
            raise BackendError(f"adb sees several devices ({', '.join(sorted(states))}); pick one with --serial")
        serial = next(iter(states))
    state = states.get(serial)
    if state == "device":
        return Adb(program, serial)
    advice = {
        None: "is not connected" + (f"; adb sees {', '.join(sorted(states))}" if states else ""),
        "unauthorized": "has not authorised this computer; unlock it and accept the prompt",
        "authorizing": "has not authorised this computer yet; unlock it and accept the prompt",
        "offline": "is offline; reconnect it, or restart adb with adb kill-server",
    }
    reason = advice.get(state, f"is in state {(state or '').strip()!r}, which adb cannot run programs in")
    raise BackendError(f"{serial}: {reason}")


def _devices(program: str) -> dict[str, str]:
    """The state of each phone that adb sees, by serial number."""
    done = call(program, ["devices"], QUICK)
    if done.returncode:
        raise BackendError(f"adb devices failed: {_reason(f'{done.stdout}{done.stderr}')}")
    return dict(line.split("\t", 1) for line in done.stdout.splitlines() if "\t" in line)


@dataclass(frozen=True)
class Timing:
    """The runner's report on one process.

    Attributes:
        load: milliseconds to load the graph.
        first: milliseconds of the first run; onnxruntime_perf_test reports whole milliseconds only.
        samples: milliseconds of the runs after warming up.
        peak: peak resident set size of the process in bytes, runner included; None if the runner does not report it.
    """

    load: float
    first: float
    samples: list[float]
    peak: int | None


@dataclass(frozen=True)
class Place:
    """The runner's folder on the phone, which also holds a folder per bundle with the bundle's own file names."""

    adb: Adb
    folder: PurePosixPath
    runner: PurePosixPath
    threads: int
    timeout: float

    def run(self, folder: PurePosixPath, *arguments: str) -> tuple[str, str]:
        """Runs the runner in a folder; returns its process id and all of its output.

        Raises:
            BackendError: the runner crashed, failed or took too long.
        """
        # exec keeps the process id, which is needed to filter the log
        script = f"echo pid $$; cd {shlex.quote(str(folder))} && LD_LIBRARY_PATH={shlex.quote(str(self.folder))} exec "
        script += shlex.join([str(self.runner), *arguments]) + " 2>&1"
        done = self.adb.script(shlex.join(["sh", "-c", script]), self.timeout)
        found = re.search(r"^pid (\d+)", done.stdout)
        if done.returncode:
            if found:
                done.stdout += self.log(found[1])
            raise BackendError(self.adb.explain(f"{self.runner.name} {arguments[-1]}", done))
        if not found:
            raise BackendError(f"{self.adb.serial}: the shell did not start {self.runner.name}")
        return found[1], done.stdout

    def log(self, process: str) -> str:
        """The lines that a process wrote to the phone's log under ExecuTorch's tag."""
        return self.adb.ask(f"logcat -d --pid={process} -s ExecuTorch") or ""


def run_executorch(place: Place, folder: PurePosixPath, piece: Piece, inputs: Sequence[str], runs: int) -> Timing:
    """Runs ``executor_runner`` (ExecuTorch 1.3 or newer, which reports every iteration).

    Its flags and messages are defined in examples/portable/executor_runner/executor_runner.cpp. On Android, ExecuTorch
    logs to logcat instead of the terminal, see runtime/platform/default/android.cpp.
    """
    flags = {
        "model_path": piece.graph,
        "method_name": piece.function or "",
        "inputs": ",".join(inputs),
        "num_executions": str(WARMUP + runs),
        "cpu_threads": str(place.threads),
        "print_output": "none",
    }
    process, printed = place.run(folder, *(f"--{name}={value}" for name, value in flags.items() if value))
    printed += place.log(process)
    times = [float(each) for each in re.findall(rf"Iteration \d+ of {WARMUP + runs}: ([\d.]+) ms", printed)]
    load = re.search(r"Model loaded in ([\d.]+) ms", printed)
    if len(times) != WARMUP + runs or not load:
        raise BackendError(
            f"{piece.graph}: {place.runner.name} reported {len(times)} of {WARMUP + runs} iterations; build it from "
            "ExecuTorch 1.3 or newer with EXECUTORCH_ENABLE_LOGGING=ON"
        )
    return Timing(float(load[1]), times[0], times[WARMUP:], None)


def answer_executorch(
    place: Place, folder: PurePosixPath, piece: Piece, inputs: Sequence[str], local: Path
) -> list[np.ndarray[Any, Any]]:
    """Runs ``executor_runner`` once, which writes each output's bytes to a file; they are pulled into ``local``."""
    flags = {"model_path": piece.graph, "method_name": piece.function or "", "inputs": ",".join(inputs)}
    flags |= {"output_file": "output", "cpu_threads": str(place.threads), "print_output": "none"}
    place.run(folder, *(f"--{name}={value}" for name, value in flags.items() if value))
    outputs = []
    for number, spec in enumerate(piece.outputs):
        name = f"output-{number}.bin"
        place.adb.run("pull", str(folder / name), str(local / name), timeout=place.timeout)
        shape = [1, *(int(extent) for extent in spec.shape[1:])]
        value = np.fromfile(local / name, np.dtype(spec.dtype))
        if value.size != np.prod(shape):
            raise BackendError(f"{piece.graph}: {place.runner.name} wrote {value.size} values of {spec.name} {shape}")
        outputs.append(value.reshape(shape))
    return outputs


def run_onnxruntime(place: Place, folder: PurePosixPath, piece: Piece, inputs: Sequence[str], runs: int) -> Timing:
    """Runs ``onnxruntime_perf_test`` on one graph and the test data in its folder.

    Its flags are defined in onnxruntime/test/perftest/command_args_parser.cc. A line of its result file has model,
    seconds, peak bytes, CPU share and number, see PerformanceResult::DumpToFile in performance_runner.cc.
    """
    data = folder / "test_data_set_0"
    prepare = [["rm", "-rf", str(data), str(folder / "result.csv")], ["mkdir", str(data)]]
    prepare += [["cp", str(folder / name), str(data / f"input_{number}.pb")] for number, name in enumerate(inputs)]
    done = place.adb.script(" && ".join(map(shlex.join, prepare)))
    if done.returncode:
        raise BackendError(place.adb.explain(f"copying the inputs of {piece.graph}", done))
    _, printed = place.run(
        folder,
        "-e",
        "cpu",
        "-m",
        "times",
        "-r",
        str(WARMUP + runs),
        "-x",
        str(place.threads),
        piece.graph,
        "result.csv",
    )
    lines = place.adb.shell("cat", str(folder / "result.csv")).splitlines()
    fields = [line.rsplit(",", 4) for line in lines if line.count(",") >= 4]
    load = re.search(r"Session creation time cost: ([\d.e+-]+) s", printed)
    first = re.search(r"First inference time cost: ([\d.e+-]+) ms", printed)
    try:
        seconds, peaks = [float(each[1]) for each in fields], [int(each[2]) for each in fields]
    except ValueError:
        seconds, peaks = [], []
    if len(seconds) != WARMUP + runs or not load or not first:
        raise BackendError(f"{piece.graph}: {place.runner.name} wrote {len(seconds)} of {WARMUP + runs} times")
    return Timing(1e3 * float(load[1]), float(first[1]), [1e3 * each for each in seconds[WARMUP:]], max(peaks))


@dataclass(frozen=True)
class Runner:
    """An engine's own program that runs one graph on a phone; a target's record names it.

    Attributes:
        program: name of the program.
        run: function that runs a piece :data:`WARMUP` plus ``runs`` times, in the folder with its files and inputs.
        encode: function that turns an input's name and value into the file content that the program reads.
        answer: function that runs a piece once and returns its outputs; None if the program does not give them away.
    """

    program: str
    run: Callable[[Place, PurePosixPath, Piece, Sequence[str], int], Timing]
    encode: Callable[[str, np.ndarray[Any, Any]], bytes]
    answer: Callable[[Place, PurePosixPath, Piece, Sequence[str], Path], list[np.ndarray[Any, Any]]] | None = None


def _raw(name: str, value: np.ndarray[Any, Any]) -> bytes:
    return value.tobytes()


def _tensor_proto(name: str, value: np.ndarray[Any, Any]) -> bytes:
    from onnx import numpy_helper

    return bytes(numpy_helper.from_array(value, name).SerializeToString())


EXECUTORCH = Runner("executor_runner", run_executorch, _raw, answer_executorch)
ONNXRUNTIME = Runner("onnxruntime_perf_test", run_onnxruntime, _tensor_proto)


def _runner_of(bundle: Bundle) -> Runner:
    """The program that runs a bundle's pieces.

    Raises:
        ConfigError: the bundle's target has no such program, or the package that describes it is not installed.
    """
    target = targets.get(bundle.manifest.target)
    if not target.android:
        able = ", ".join(name for name, other in targets.known().items() if other.android)
        raise ConfigError(f"{bundle.path}: --device android takes bundles of {able}; this is a {target.name} bundle")
    runner: Runner = targets.resolve(target.android, f"target {target.name}", target.requirement, ConfigError)
    return runner


@dataclass
class _Measured:
    """A bundle and the timings of its pieces by name, one per pass."""

    bundle: Bundle
    name: str
    folder: PurePosixPath
    inputs: dict[str, list[str]]
    timings: dict[str, list[Timing]] = field(default_factory=dict)
    selftest: list[StageResult] = field(default_factory=list)

    def samples(self, piece: str) -> list[float]:
        return [sample for timing in self.timings[piece] for sample in timing.samples]


@dataclass
class OnPhone:
    """A backend of the Python runtime whose pieces run on the phone, one process each time."""

    place: Place
    runner: Runner
    folder: PurePosixPath
    local: Path
    name: str = "the phone's engine"
    unloads: bool = True

    def load(self, piece: Piece) -> LoadedPiece:
        """See :class:`mvmoe_deploy.backends.Backend`."""
        answer = self.runner.answer
        assert answer is not None

        def run(*inputs: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
            names = []
            for number, (spec, value) in enumerate(zip(piece.inputs, inputs, strict=True)):
                names.append(f"case_{number}")
                (self.local / names[-1]).write_bytes(self.runner.encode(spec.name, value))
                pushed = str(self.folder / names[-1])
                self.place.adb.run("push", str(self.local / names[-1]), pushed, timeout=self.place.timeout)
            return answer(self.place, self.folder, piece, names, self.local)

        return run


def selftest(place: Place, runner: Runner, measured: _Measured, local: Path, progress: Progress) -> list[StageResult]:
    """The verdict on a bundle's self-test, its pieces run on the phone; empty if it cannot be run.

    Decoding and resampling are this computer's, so the first stage says nothing of the phone.
    """
    if runner.answer is None:
        return []
    backend = OnPhone(place, runner, measured.folder, local)
    with Runtime(measured.bundle, backend) as runtime:
        verdict = runtime.selftest(progress)
    return verdict.stages if verdict else []


def measure(
    adb: Adb,
    runner: Path,
    paths: Sequence[Path],
    threads: int = 1,
    runs: int = 100,
    images: Sequence[Path] = (),
    timeout: float = 300.0,
    progress: Progress = lambda items, total: items,
) -> Results:
    """Measures bundles on a phone.

    Each piece has a row with its own runs, timed by the runner inside its process. A bundle of several pieces also has
    a first row with the bundle's name, which is a sum: run i of the trunk (and router) plus run i of the tail of expert
    i modulo E, from the same pass. This is an image's cost in the engine, without preprocessing and the choice of the
    expert. What the runner does not measure (memory, cold starts, energy) stays absent.

    Args:
        adb: the phone.
        runner: the engine's runner, built for the phone; shared libraries beside it are pushed too.
        paths: bundles, all of the runner's target; ratios are to the first bundle.
        threads: threads of the engine.
        runs: number of runs to keep per piece, over all passes.
        images: image files; trunks run on the first one, or on noise if there is none. Tails run on noise, because
            their work does not depend on the values.
        timeout: seconds that one process of the runner may take.
        progress: wraps the iteration over the cases of each self-test, and that over the runs.

    Raises:
        BackendError: the phone or the runner failed; the pushed files are removed all the same.
        ConfigError: the runner cannot run a bundle.
    """
    bundles = [open_bundle(path) for path in paths]
    program = _check(bundles, runner)
    per_pass = -(-runs // PASSES)
    with _folder(adb) as folder, TemporaryDirectory() as local:
        for file in [runner, *sorted(runner.parent.glob("*.so"))]:
            adb.run("push", str(file), str(folder / file.name), timeout=timeout)
        adb.shell("chmod", "755", str(folder / runner.name))
        place = Place(adb=adb, folder=folder, runner=folder / runner.name, threads=threads, timeout=timeout)
        names = unique([path.stem for path in paths])
        measured = [
            _push(
                adb=adb,
                bundle=bundle,
                name=name,
                folder=folder / f"bundle{number}",
                local=Path(local),
                images=images,
                timeout=timeout,
            )
            for number, (bundle, name) in enumerate(zip(bundles, names, strict=True))
        ]
        for each in measured:
            each.selftest = selftest(place, program, measured=each, local=Path(local), progress=progress)
        before = describe(adb)
        turns = [(each, piece) for each in measured for piece in each.bundle.manifest.pieces]
        order = [turns[number % len(turns) :] + turns[: number % len(turns)] for number in range(PASSES)]
        for each, piece in progress((turn for one_pass in order for turn in one_pass), PASSES * len(turns)):
            timing = program.run(place, each.folder, piece, each.inputs[piece.name], per_pass)
            each.timings.setdefault(piece.name, []).append(timing)
        after = describe(adb)
    throttled = (
        None if after["thermal_status"] is None else max(after["thermal_status"], before["thermal_status"] or 0) > 0
    )
    base = image_samples(measured[0])
    load = float((after["load_average"] or [0])[0])
    rows = [row for each in measured for row in _rows(each, None if each is measured[0] else base, throttled, load)]
    method = {
        "threads": threads,
        "runs": PASSES * per_pass,
        "order": f"{PASSES} passes over all pieces, rotated; {WARMUP} runs before each are not kept",
        "what a row is": "a piece, timed by the runner in its own process; a bundle's row is the sum of its trunk and, "
        "in turn, one of its tails; preprocessing and choosing the expert are not included",
        "images": f"{images[0].name}" if images else "noise",
        "runner": f"{runner.name}, {runner.stat().st_size} bytes",
        "self-test": "the phone runs the pieces; decoding and resampling are this computer's"
        if program.answer
        else f"not run: {program.program} does not give away what a graph computed",
        "load ms": _each(measured, lambda timing: timing.load),
        "peak resident set of the runner's process, bytes": _each(measured, lambda timing: timing.peak),
    }
    changing = {f"{key} {when}": state[key] for when, state in (("before", before), ("after", after))
                for key in ("temperatures", "thermal_status", "governors")}  # fmt: skip
    fixed = {key: value for key, value in before.items() if f"{key} before" not in changing}
    machine = {**fixed, **changing, "mvmoe-deploy": mvmoe_deploy.__version__}
    return Results(format=FORMAT, rows=rows, machine=machine, method=method)


def describe(adb: Adb) -> dict[str, Any]:
    """Describes the phone and its temperatures; a value is None if the phone does not report it."""
    properties = {name: adb.ask(f"getprop {name}") for name in
                  ("ro.product.manufacturer", "ro.product.model", "ro.soc.model", "ro.build.version.release",
                   "ro.product.cpu.abi")}  # fmt: skip
    load = adb.ask("cat /proc/loadavg")
    governors = adb.ask("cat /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor")
    cores = adb.ask("nproc")
    status = re.search(r"Thermal Status: (\d+)", adb.ask("dumpsys thermalservice") or "")
    model = f"{properties['ro.product.manufacturer'] or ''} {properties['ro.product.model'] or ''}".strip()
    return {
        "processor": properties["ro.soc.model"] or model or None,
        "device": model or None,
        "system": f"Android {properties['ro.build.version.release']}",
        "abi": properties["ro.product.cpu.abi"],
        "cores": int(cores) if cores and cores.isdigit() else None,
        "load_average": [float(each) for each in load.split()[:3]] if load else None,
        "governors": sorted(set(governors.split())) if governors else None,
        "temperatures": temperatures(adb),
        "thermal_status": int(status[1]) if status else None,
    }


def temperatures(adb: Adb) -> dict[str, float] | None:
    """Degrees Celsius of the battery and of each thermal zone that the shell's user may read."""
    found = {}
    battery = re.search(r"^\s*temperature: (-?\d+)", adb.ask("dumpsys battery") or "", re.MULTILINE)
    if battery:
        found["battery"] = int(battery[1]) / 10  # tenths: android.os.BatteryManager.EXTRA_TEMPERATURE
    zones = adb.ask(
        'for z in /sys/class/thermal/thermal_zone*; do echo "$(cat $z/type) $(cat $z/temp)"; done 2>/dev/null'
    )
    for name, millidegrees in re.findall(r"^(\S+) (-?\d+)$", zones or "", re.MULTILINE):
        if -50_000 < int(millidegrees) < 200_000:  # some zones without a sensor report nonsense
            found[name] = int(millidegrees) / 1000
    return found or None


def _check(bundles: Sequence[Bundle], runner: Path) -> Runner:
    """Checks that the runner can run all bundles, which must be of one target; returns how it is used."""
    if not runner.is_file():
        raise ConfigError(f"{runner}: no such file; give --runner the engine's runner, built for the phone")
    programs = [_runner_of(bundle) for bundle in bundles]
    found = sorted({bundle.manifest.target for bundle in bundles})
    if len(found) != 1:
        raise ConfigError(f"--device android: takes bundles of one target; these are {', '.join(found)}")
    for bundle in bundles:
        bundle.check()
        batch = bundle.manifest.options.get("max_batch", 1)
        if batch != 1:  # extension/runner_util/inputs.cpp fills inputs of the largest shape
            raise ConfigError(
                f"{bundle.path}: takes batches of up to {batch} images, and executor_runner always runs the largest; "
                "export it with --max-batch 1"
            )
    return programs[0]


@contextlib.contextmanager
def _folder(adb: Adb) -> Iterator[PurePosixPath]:
    """Yields a new folder on the phone; at the end it is removed, and processes that still run from it are ended.

    Raises:
        BackendError: the folder cannot be made, or not removed.
    """
    folder = PLACE / f"mvmoe-bench-{secrets.token_hex(4)}"
    adb.shell("mkdir", str(folder))
    try:
        yield folder
    except BaseException:
        # a disconnected phone cannot be tidied up, and the error that says so is being raised
        with contextlib.suppress(BackendError):
            _remove(adb, folder)
        raise
    _remove(adb, folder)


def _remove(adb: Adb, folder: PurePosixPath) -> None:
    # The pattern does not match itself. Otherwise pkill would end the shell that runs it; and so it would if the
    # folder's name stood in the same script.
    adb.ask(f"pkill -f '[{folder.name[0]}]{folder.name[1:]}'")
    adb.shell("rm", "-rf", str(folder))


def _push(
    adb: Adb, bundle: Bundle, name: str, folder: PurePosixPath, local: Path, images: Sequence[Path], timeout: float
) -> _Measured:
    """Pushes a bundle's files and the inputs of each piece."""
    folders = {str((folder / file.path).parent) for file in bundle.manifest.files} | {str(folder)}
    adb.shell("mkdir", "-p", *sorted(folders))
    for path in sorted({path for piece in bundle.manifest.pieces for path in piece.files}):
        adb.run("push", str(bundle.path / path), str(folder / path), timeout=timeout)
    generator = np.random.default_rng(0)
    inputs: dict[str, list[str]] = {}
    for piece in bundle.manifest.pieces:
        values: dict[str, np.ndarray[Any, Any]] = {}
        for spec in piece.inputs:
            shape = [extent if isinstance(extent, int) else 1 for extent in spec.shape]
            shape[0] = 1
            value = generator.standard_normal(shape).astype(np.float32)
            if spec.name == "images" and images:
                value = preprocess(images[0], bundle.manifest.preprocessing).reshape(shape).astype(np.float32)
            if spec.name == "gate":
                value = np.full(shape, 0.5, np.float32)
            values[spec.name] = value
        values |= {weight.name: weight.read(bundle.path) for weight in piece.weights}
        inputs[piece.name] = []
        for number, (tensor, value) in enumerate(values.items()):
            file_name = f"input_{piece.name}_{number}"
            (local / file_name).write_bytes(_runner_of(bundle).encode(tensor, value))
            adb.run("push", str(local / file_name), str(folder / file_name), timeout=timeout)
            inputs[piece.name].append(file_name)
    return _Measured(bundle, name, folder, inputs)


def _parts(bundle: Bundle, choice: int) -> list[str]:
    """Names of the pieces that one image runs through if its k experts are ``choice``, ``choice`` + 1, …"""
    routing = bundle.manifest.routing
    chosen = {(choice + each) % routing.experts for each in range(routing.k)} if routing else set()
    return [piece.name for piece in bundle.manifest.pieces if piece.expert is None or piece.expert in chosen]


def image_samples(measured: _Measured) -> list[float]:
    """For each run, the total time of one image's pieces; the experts take turns from run to run."""
    samples = {name: measured.samples(name) for name in measured.timings}
    count = min(map(len, samples.values()))
    return [sum(samples[name][run] for name in _parts(measured.bundle, run)) for run in range(count)]


def _rows(measured: _Measured, base: list[float] | None, throttled: bool | None, load: float) -> Iterator[Row]:
    """Yields the row of a bundle, then a row for each of its pieces.

    Args:
        measured: the bundle and its timings.
        base: samples of the first bundle, to which the ratio is taken; None for the first bundle itself.
        throttled: whether the phone was throttling; None if it does not report that.
        load: the phone's load average.
    """
    whole = of_bundle(measured.bundle.path, measured.name, group="android")
    image = image_samples(measured)
    first_runs = [measured.timings[name][0].first for name in _parts(measured.bundle, 0)]
    yield Row(
        **whole.facts(),
        warm=_latency(image, sum(first_runs), throttled, load),
        ratio=None if base is None else ratio_estimate(image, base),
        selftest=measured.selftest,
    )
    manifest = measured.bundle.manifest
    if len(manifest.pieces) == 1:
        return
    sizes = {file.path: file.bytes for file in manifest.files}
    for piece in manifest.pieces:
        size = sum(sizes[path] for path in set(piece.files))
        own = msgspec.structs.replace(
            whole,
            name=f"{measured.name}/{piece.name}",
            flops=piece.flops,
            macs=None,
            counted_macs=None,
            parameters=piece.parameters,
            active_parameters=piece.parameters,
            bytes_on_disk=size,
            bytes_first_image=size,
            bytes_per_expert=[],
        )
        first = measured.timings[piece.name][0].first
        yield Row(**own.facts(), warm=_latency(measured.samples(piece.name), first, throttled, load))


def _latency(samples: list[float], first: float, throttled: bool | None, load: float) -> Latency:
    p50, p90, p99 = (quantile_estimate(samples, percent) for percent in (50, 90, 99))
    variation, doubts = scatter(samples, p50)
    noise = Noise(variation, load, throttled, [*doubts, *(["the phone was throttling"] if throttled else [])])
    return Latency(first=first, warmup=PASSES * WARMUP, p50=p50, p90=p90, p99=p99, noise=noise, samples=samples)


def _each(measured: Sequence[_Measured], pick: Callable[[Timing], float | None]) -> dict[str, list[float]] | None:
    """One figure per pass, by bundle and piece; None if the runner does not report the figure."""
    found = {
        f"{each.name}/{piece}": [value for timing in timings if (value := pick(timing)) is not None]
        for each in measured
        for piece, timings in each.timings.items()
    }
    return found if any(found.values()) else None


def _reason(text: str) -> str:
    """The line of some output that says what went wrong: one with an error of adb, or else the last."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("pid ")]
    of_adb = [line for line in lines if re.match(r"(adb: )?error: |failed to ", line)]
    return [*lines, *of_adb[:1]][-1][:300] if lines else "it printed nothing"
