"""A phone for tests: it speaks adb's protocol on loopback, so that the real ``adb`` can talk to it.

Commands are run by this machine's shell, with paths of the phone replaced by those of a sandbox folder, and files are
pushed into that folder. The protocols are described in the Android sources: packages/modules/adb/docs/dev, protocol.md
(the transport), services.md and SYNC.TXT (files), and shell_protocol.h (the second version of the shell's).
"""

from __future__ import annotations

import ctypes
import itertools
import os
import queue
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import pytest

PLACE = "/data/local/tmp"
LARGEST = 1 << 18
"""Most bytes of one message."""

CNXN, AUTH, OPEN, OKAY, CLSE, WRTE = (
    int.from_bytes(name, "little") for name in (b"CNXN", b"AUTH", b"OPEN", b"OKAY", b"CLSE", b"WRTE")
)
STDIN, STDOUT, STDERR, EXIT, END_OF_INPUT = range(5)
"""Kinds of packets of the shell's second version."""

needs_adb = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("adb") is None,
    reason="no adb on Linux (Debian's package adb): measuring on a phone was not tried",
)


class Adbd:
    """The daemon on a phone.

    Attributes:
        port: where it listens on loopback.
        services: what it was asked to do, in the words of the protocol.
        answers: how it greets: ``device`` or another state; ``unauthorized`` asks for a key and takes none; ``offline``
            says nothing.
        space: bytes that a file may have before the phone is full.
        vanish_during: the phone is gone, as if unplugged, a moment after it began what contains this text.
        vanish_after: the same, after so many bytes of a pushed file.
        shell_v2: whether it has the shell's second version; without, as before Android 7, there are no exit codes.
    """

    def __init__(self, sandbox: Path, environment: dict[str, str], elsewhere: dict[str, str]) -> None:
        """
        Args:
            sandbox: the phone's /data/local/tmp.
            environment: of the commands.
            elsewhere: further paths of the phone, and what they are here.
        """
        self.sandbox, self.environment = sandbox, environment
        self._here = {PLACE: str(sandbox), **elsewhere}
        self.services: list[str] = []
        self.answers = "device"
        self.space = 1 << 40
        self.vanish_during: str | None = None
        self.vanish_after: int | None = None
        self.shell_v2 = True
        self._processes: list[subprocess.Popen[bytes]] = []
        self._transports: list[_Transport] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):  # when the listener is closed
            while True:
                connection, _ = self._listener.accept()
                # Each of the many small messages would otherwise wait 40 ms for the one before to be acknowledged.
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                transport = _Transport(self, connection)
                self._transports.append(transport)
                threading.Thread(target=transport.serve, daemon=True).start()

    def vanish(self) -> None:
        """Closes everything without a word, and ends what still runs."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # which ends accept
        self._listener.close()
        for transport in self._transports:
            transport.close()
        for process in self._processes:
            end(process)

    def here(self, text: str) -> str:
        """A text with the phone's paths replaced by this machine's."""
        for path, place in self._here.items():
            text = text.replace(path, place)
        return text

    def there(self, content: bytes) -> bytes:
        """The reverse, for the sandbox alone."""
        return content.replace(str(self.sandbox).encode(), PLACE.encode())

    def start(self, command: str, merged: bool) -> subprocess.Popen[bytes]:
        """Runs a command in the phone's shell."""
        process = subprocess.Popen(
            ["/bin/sh", "-c", self.here(command)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if merged else subprocess.PIPE,
            cwd=self.sandbox,
            env=self.environment,
            start_new_session=True,
        )
        self._processes.append(process)
        return process


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a command and what it has started, as adbd does when its client goes away."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


class _Transport:
    """A connection of adb's server: messages of many streams, one after another."""

    def __init__(self, device: Adbd, connection: socket.socket) -> None:
        self.device = device
        self._socket = connection
        self._lock = threading.Lock()
        self._streams: dict[int, _Stream] = {}
        self._numbers = itertools.count(1)

    def send(self, command: int, first: int, second: int, data: bytes = b"") -> None:
        header = struct.pack("<6I", command, first, second, len(data), sum(data) & 0xFFFFFFFF, command ^ 0xFFFFFFFF)
        with self._lock, suppress(OSError):  # to a server that is gone
            self._socket.sendall(header + data)

    def close(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def serve(self) -> None:
        try:
            while True:
                command, first, second, size, _, magic = struct.unpack("<6I", self._take(24))
                assert magic == command ^ 0xFFFFFFFF, "a message with a wrong magic number"
                self._handle(command, first, second, self._take(size))
        except (EOFError, OSError):
            pass
        finally:
            for stream in list(self._streams.values()):
                stream.hung_up()
            self.close()

    def _take(self, size: int) -> bytes:
        found = bytearray()
        while len(found) < size:
            part = self._socket.recv(size - len(found))
            if not part:
                raise EOFError
            found += part
        return bytes(found)

    def _handle(self, command: int, first: int, second: int, data: bytes) -> None:
        if command == CNXN:
            self._greet()
        elif command == OPEN:
            stream = _Stream(self, next(self._numbers), first)
            self._streams[stream.number] = stream
            service = data.rstrip(b"\0").decode()
            threading.Thread(target=stream.serve, args=[service], daemon=True).start()
        elif command == WRTE and second in self._streams:
            self._streams[second].inbox.put(data)
            self.send(OKAY, second, first)
        elif command == OKAY and second in self._streams:
            self._streams[second].ready.set()
        elif command == CLSE and second in self._streams:
            self._streams.pop(second).hung_up()
        elif command == AUTH:
            self.send(AUTH, 1, 0, bytes(20))  # none of its keys will do

    def _greet(self) -> None:
        if self.device.answers == "unauthorized":
            self.send(AUTH, 1, 0, bytes(20))
        elif self.device.answers != "offline":
            features = "cmd,stat_v2" + (",shell_v2" if self.device.shell_v2 else "")
            banner = f"{self.device.answers}::ro.product.name=test;ro.product.model=Test;ro.product.device=test;features={features}"
            self.send(CNXN, 0x01000001, LARGEST, banner.encode())

    def forget(self, stream: _Stream) -> None:
        if self._streams.pop(stream.number, None):
            self.send(CLSE, stream.number, stream.remote)


class _Stream:
    """One service that adb has opened, with its own thread."""

    def __init__(self, transport: _Transport, number: int, remote: int) -> None:
        self.transport, self.number, self.remote = transport, number, remote
        self.device = transport.device
        self.inbox: queue.Queue[bytes | None] = queue.Queue()
        self.ready = threading.Event()
        self.ready.set()
        self.closed = False
        self._buffer = b""

    def hung_up(self) -> None:
        """The other side has closed the stream."""
        self.closed = True
        self.ready.set()
        self.inbox.put(None)

    def write(self, data: bytes) -> None:
        """Sends data, each message after the other side has acknowledged the one before."""
        for start in range(0, len(data), LARGEST):
            self.ready.wait()
            if self.closed:
                return
            self.ready.clear()
            self.transport.send(WRTE, self.number, self.remote, data[start : start + LARGEST])

    def read(self, size: int) -> bytes:
        while len(self._buffer) < size:
            data = self.inbox.get()
            if data is None:
                raise EOFError
            self._buffer += data
        found, self._buffer = self._buffer[:size], self._buffer[size:]
        return found

    def serve(self, service: str) -> None:
        self.device.services.append(service)
        kind, _, rest = service.partition(":")
        name, *options = kind.split(",")
        if name not in ("shell", "sync"):
            self.transport.forget(self)
            return
        self.transport.send(OKAY, self.number, self.remote)
        unplugged = self.device.vanish_during
        if unplugged and unplugged in service:
            threading.Timer(0.3, self.device.vanish).start()
        try:
            if name == "sync":
                self._sync()
            else:
                self._shell(rest, "v2" in options)
        except EOFError:
            pass
        finally:
            self.ready.wait(5)  # until the last of its data has arrived
            self.transport.forget(self)

    def _shell(self, command: str, v2: bool) -> None:
        process = self.device.start(command, merged=not v2)
        threading.Thread(target=self._feed, args=[process, v2], daemon=True).start()
        pumps = [
            threading.Thread(target=self._pump, args=[pipe, kind if v2 else None], daemon=True)
            for pipe, kind in ((process.stdout, STDOUT), (process.stderr, STDERR))
            if pipe
        ]
        for pump in pumps:
            pump.start()
        for pump in pumps:
            pump.join()
        status = process.wait()
        if v2:
            self.write(struct.pack("<BIB", EXIT, 1, (status if status >= 0 else 128 - status) & 255))

    def _pump(self, pipe: IO[bytes], kind: int | None) -> None:
        while chunk := os.read(pipe.fileno(), 1 << 16):
            chunk = self.device.there(chunk)
            self.write(chunk if kind is None else struct.pack("<BI", kind, len(chunk)) + chunk)

    def _feed(self, process: subprocess.Popen[bytes], v2: bool) -> None:
        """Passes on what adb writes, and ends the command when adb goes away."""
        assert process.stdin
        with suppress(EOFError, OSError):
            while v2:
                kind, size = struct.unpack("<BI", self.read(5))
                data = self.read(size)
                if kind == STDIN:
                    process.stdin.write(data)
                    process.stdin.flush()
                elif kind == END_OF_INPUT:
                    process.stdin.close()
            while True:
                process.stdin.write(self.read(1))
                process.stdin.flush()
        while not self.closed and process.poll() is None:
            time.sleep(0.01)
        end(process)

    def _sync(self) -> None:
        while True:
            name, size = struct.unpack("<4sI", self.read(8))
            if name == b"QUIT":
                return
            argument = self.read(size).decode()
            if name in (b"STAT", b"STA2", b"LST2"):
                self._stat(name, argument)
            elif name == b"SEND":
                path, _, mode = argument.rpartition(",")
                self._answer(self._receive(Path(self.device.here(path)), int(mode)))
            elif name == b"RECV":
                self._deliver(Path(self.device.here(argument)))
            else:
                self._answer(f"unknown sync request {name!r}")
                return

    def _answer(self, problem: str | None) -> None:
        text = (problem or "").encode()
        self.write(struct.pack("<4sI", b"FAIL" if problem else b"OKAY", len(text)) + text)

    def _stat(self, name: bytes, path: str) -> None:
        try:
            found = (os.stat if name == b"STA2" else os.lstat)(self.device.here(path))
            error = 0
        except OSError as problem:
            found, error = os.stat_result([0] * 10), problem.errno or 0
        times = (int(found.st_atime), int(found.st_mtime), int(found.st_ctime))
        if name == b"STAT":
            self.write(struct.pack("<4s3I", name, found.st_mode, found.st_size & 0xFFFFFFFF, times[1]))
            return
        numbers = (found.st_mode, found.st_nlink, found.st_uid, found.st_gid, found.st_size)
        self.write(struct.pack("<4sI2Q4IQ3q", name, error, found.st_dev, found.st_ino, *numbers, *times))

    def _receive(self, file: Path, mode: int) -> str | None:
        """Takes a pushed file; returns what went wrong. As adbd does, it makes the folders that are missing."""
        size, problem = 0, None
        inside = file.resolve().is_relative_to(self.device.sandbox.resolve())
        try:
            if not inside:
                raise PermissionError(13, "Permission denied")
            file.parent.mkdir(parents=True, exist_ok=True)
            target: IO[bytes] = file.open("wb")
        except OSError as error:
            problem, target = error.strerror, open(os.devnull, "wb")  # noqa: SIM115
        with target:
            while True:
                name, number = struct.unpack("<4sI", self.read(8))
                if name == b"DONE":
                    break
                size += len(data := self.read(number))
                if self.device.vanish_after is not None and size > self.device.vanish_after:
                    self.device.vanish()
                    raise EOFError
                if size > self.device.space:
                    problem = problem or "No space left on device"
                elif not problem:
                    target.write(data)
        if problem is None:
            file.chmod(mode & 0o777)
            os.utime(file, (number, number))
        elif inside:
            file.unlink(missing_ok=True)
        return problem

    def _deliver(self, file: Path) -> None:
        try:
            content = file.read_bytes()
        except OSError as error:
            self._answer(error.strerror)
            return
        for start in range(0, len(content), 1 << 16):
            part = content[start : start + (1 << 16)]
            self.write(struct.pack("<4sI", b"DATA", len(part)) + part)
        self.write(struct.pack("<4sI", b"DONE", 0))


@contextmanager
def adb_server(home: Path) -> Iterator[Callable[..., str]]:
    """Runs a server of the real adb on a port of its own, which the commands of this process use as long as it lasts.

    Yields:
        A function that runs an adb command and returns what it printed.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    private = {
        "ANDROID_ADB_SERVER_PORT": port,
        "HOME": str(home),  # where adb keeps its keys
        "TMPDIR": str(home),  # and its log
        "ADB_LOCAL_TRANSPORT_MAX_PORT": "5554",  # look for no emulators
        "ADB_MDNS": "0",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in private.items():
            patch.setenv(name, value)
        server = subprocess.Popen(
            ["adb", "server", "nodaemon"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=_end_with_parent,
        )
        try:
            _wait_for(int(port), server)
            yield (
                lambda *arguments: (
                    subprocess.run(["adb", *arguments], capture_output=True, text=True, timeout=20, check=False).stdout
                )
            )
        finally:
            server.kill()
            server.wait(10)


def _end_with_parent() -> None:
    """Has the kernel end this process when the tests' process ends, in whatever way."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(200):
        assert server.poll() is None, f"adb's server ended with {server.returncode}"
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise AssertionError("adb's server does not listen")
