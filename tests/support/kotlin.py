"""Compiles ``runtimes/kotlin`` with its tests' own part, and runs it on a JDK."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from mvmoe_deploy.decoding import decode
from mvmoe_deploy.files import atomic_directory
from mvmoe_deploy.web_engine import cache_folder

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "runtimes" / "kotlin"
TESTS = ROOT / "tests" / "runtimes" / "kotlin"
LEAST_JDK = 22
"""The first JDK with java.lang.foreign, through which the tests call the library of onnxruntime's wheel."""

LIBRARY = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*"), None)
FAST_START = ["-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xmx1g", "--enable-native-access=ALL-UNNAMED"]


def _jdk() -> Path | None:
    """A JDK that is new enough: the one in JAVA_HOME, or the newest that Debian's or Adoptium's packages installed."""
    homes = [Path(os.environ.get("JAVA_HOME", "/nonexistent")), *Path("/usr/lib/jvm").glob("*")]
    found = [(_version(home), home) for home in homes if (home / "bin" / "javac").exists()]
    return max((each for each in found if each[0] >= LEAST_JDK), default=(0, None))[1]


def _version(home: Path) -> int:
    """The JDK's version as its file ``release`` has it: ``JAVA_VERSION="25.0.1"``."""
    try:
        lines = (home / "release").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split('"')[1].split(".")[0]) for line in lines if line.startswith("JAVA_VERSION=")), 0)


JDK = _jdk()
needs_kotlin = pytest.mark.skipif(
    not (JDK and LIBRARY and shutil.which("npm")),
    reason=f"no JDK of version {LEAST_JDK} or later (Debian: openjdk-25-jdk-headless), no npm, or onnxruntime is not "
    "the wheel for Linux: the Kotlin runtime was neither compiled nor run",
)


class Kotlin:
    """The compiled runtime."""

    def __init__(self, classes: Path, compiler: Path, engine: str) -> None:
        """
        Args:
            classes: where :func:`kotlin` has compiled everything to.
            compiler: folder of the compiler's jar files.
            engine: which ``ai.onnxruntime`` the runtime runs with, for reports.
        """
        self._classes, self._compiler, self.engine = classes, compiler, engine

    def run(self, command: str, tasks: list[tuple[object, ...]], folder: Path) -> list[list[str]]:
        """Runs one command of ``checks/Main.kt``: gives it tasks, and returns the fields of the lines it answers."""
        file = folder / f"{command}.txt"
        file.write_text("\n".join("\t".join(map(str, task)) for task in tasks))
        path = [*self._classes.glob("*"), self._compiler / "kotlin-stdlib.jar"]
        found = subprocess.run(
            [
                *(_java(), "-XX:+UseSerialGC", "-Xmx512m", "--enable-native-access=ALL-UNNAMED"),
                f"-Donnxruntime.library={LIBRARY}",
                f"-Dexecutorch.runner={_executorch_runner()}",
                *("-cp", os.pathsep.join(map(str, path)), "mvmoe.checks.MainKt", command, str(file)),
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        assert found.returncode == 0, f"{command} ended with {found.returncode}:\n{found.stderr[-3000:]}"
        return [line.split("\t") for line in found.stdout.splitlines()]

    def compile(self, sources: list[str], folder: Path) -> str:
        """Compiles further files, each by itself against the runtime; returns what the compiler complains about."""
        path = [self._compiler / "kotlin-stdlib.jar", *self._classes.glob("*")]
        modules = []
        for number, source in enumerate(sources):
            file = folder / f"Source{number}.kt"
            file.write_text(source)
            modules.append(_module(self._compiler, folder / f"classes{number}", f"source{number}", [file], path))
        return _compile(modules, self._compiler)


def write_raw(image: Path, file: Path) -> None:
    """Writes an image's decoded pixels for ``raw`` in Main.kt: width and height, then the pixels.

    The platform's decoder is the app's, and a JVM's own is not exact.
    """
    pixels = np.asarray(decode(image))
    file.write_bytes(struct.pack("<2I", pixels.shape[1], pixels.shape[0]) + pixels.tobytes())


def _java(tool: str = "java") -> str:
    assert JDK is not None
    return str(JDK / "bin" / tool)


def _executorch_runner() -> str:
    return f"{sys.executable}\t{TESTS / 'executorch_runner.py'}"


@functools.cache
def kotlin() -> Kotlin:
    """The runtime, compiled once for each state of its sources."""
    with _alone():
        compiler = _installed_compiler()
        jar = next((cache_folder() / "tests-maven").glob("onnxruntime-*.jar"), None)
        classes = _place(jar)
        if not classes.exists():
            jar = jar or _maven_jar()
            classes = _place(jar)
            with atomic_directory(classes) as temporary:
                _compile_all(temporary, compiler, jar)
    if jar:
        engine = f"Maven Central's {jar.name}"
    else:
        engine = (
            "onnxruntime's Python wheel through the tests' own ai.onnxruntime, since Maven Central was not reached: "
            "against its Java package nothing was compiled or run"
        )
    engine += "; ExecuTorch's Android classes are the tests' own; the sample's activity was not compiled"
    return Kotlin(classes, compiler, engine)


@contextmanager
def _alone() -> Iterator[None]:
    """Tests run in several processes; one installs and compiles, and the others wait."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    with (cache_folder() / "tests-kotlin.lock").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        yield


def _place(jar: Path | None) -> Path:
    """Where what the sources compile to is kept: outside the checkout, since compiling takes longer than all tests."""
    key = hashlib.sha256(f"{jar and jar.name} {_version(JDK or Path())}".encode())
    for path in [*_sources(PACKAGE), *_sources(TESTS), TESTS / "package-lock.json", Path(__file__)]:
        key.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return cache_folder() / f"tests-kotlin-{key.hexdigest()[:16]}"


def _sources(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.suffix in (".kt", ".java"))


def _installed_compiler() -> Path:
    """The folder of the compiler's jar files, 90 MB, installed by npm the first time."""
    lock = (TESTS / "package-lock.json").read_bytes()
    place = cache_folder() / f"tests-kotlinc-{hashlib.sha256(lock).hexdigest()[:16]}"
    if not place.exists():
        with atomic_directory(place) as temporary:
            for name in ("package.json", "package-lock.json"):
                shutil.copy(TESTS / name, temporary)
            command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
            done = subprocess.run(command, cwd=temporary, capture_output=True, text=True, check=False, timeout=240)
            if done.returncode:
                pytest.skip(f"npm ci failed, so Kotlin was neither compiled nor run: {done.stderr.strip()[-300:]}")
    return place / "node_modules" / "kotlin-compiler" / "lib"


def _maven_jar() -> Path | None:
    """The Java package of ONNX Runtime that runtimes/kotlin pins, where Maven Central can be reached."""
    if not shutil.which("mvn"):
        return None
    versions = (PACKAGE / "gradle" / "libs.versions.toml").read_text()
    version = next(line.split('"')[1] for line in versions.splitlines() if line.startswith("onnxruntime ="))
    artefact = f"com.microsoft.onnxruntime:onnxruntime:{version}"
    command = [
        "mvn",
        "-q",
        "-B",
        "dependency:copy",
        f"-Dartifact={artefact}",
        f"-DoutputDirectory={cache_folder() / 'tests-maven'}",
    ]
    subprocess.run(command, capture_output=True, check=False, timeout=200)
    return next((cache_folder() / "tests-maven").glob(f"onnxruntime-{version}.jar"), None)


def _compile_all(classes: Path, compiler: Path, jar: Path | None) -> None:
    """Compiles the core, what depends on it, and the tests' part, each against no more than it may see."""
    stdlib = compiler / "kotlin-stdlib.jar"
    standins = [path for path in _sources(TESTS / "standins") if not (jar and "onnxruntime" in path.parts)]
    (classes / "standins").mkdir(parents=True)
    if jar:
        shutil.copy(jar, classes)
    javac = [_java("javac"), "-nowarn", "-d", str(classes / "standins"), *map(str, standins)]
    subprocess.run(javac, check=True, timeout=200)
    engines = [PACKAGE / "onnxruntime" / "src" / "main", PACKAGE / "executorch" / "src" / "main"]
    engines.append(PACKAGE / "sample" / "src" / "main" / "kotlin" / "mvmoe" / "sample" / "model")
    seen = [stdlib, classes / "core", classes / "standins", *classes.glob("*.jar")]
    complaints = _compile(
        [
            _module(compiler, classes / "core", "core", [PACKAGE / "core" / "src" / "main"], [stdlib]),
            _module(compiler, classes / "engines", "engines", engines, seen),
            [
                *_module(compiler, classes / "checks", "checks", [TESTS / "checks"], [*seen, classes / "engines"]),
                f"-Xfriend-paths={classes / 'core'}",  # which lets the tests see what is internal
            ],
        ],
        compiler,
    )
    assert not complaints, complaints


def _module(compiler: Path, out: Path, name: str, sources: list[Path], path: list[Path]) -> list[str]:
    """The compiler's arguments for a module. It may use no more of the JDK than Android has: what Java 8 had."""
    options = ["-no-stdlib", "-no-reflect", "-Werror", "-jvm-target", "1.8", "-Xjdk-release=1.8", "-module-name", name]
    return [*options, "-cp", os.pathsep.join(map(str, path)), "-d", str(out), *map(str, sources)]


def _compile(modules: list[list[str]], compiler: Path) -> str:
    """Compiles modules in turn, each against no more than its class path, and returns the complaints."""
    arguments = [argument for module in modules for argument in ["--", *module]][1:]
    found = subprocess.run(
        [
            *(_java(), *FAST_START, "--sun-misc-unsafe-memory-access=allow", "-cp", f"{compiler}/*"),
            *(str(TESTS / "Compile.java"), *arguments),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    return found.stdout + found.stderr if found.returncode else ""
