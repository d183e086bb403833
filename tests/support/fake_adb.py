#!/usr/bin/env python3
"""A stand-in for ``adb`` and the phone behind it, run as a program by the tests.

The folder named by FAKE_ADB is the phone: ``scenario.json`` says how it behaves, ``calls.jsonl`` gets every call, and
``data`` is its /data/local/tmp. Shell commands are run by a real shell, so that quoting matters as it does on a phone,
with the phone's own tools (getprop, dumpsys, logcat, …) first on the path.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

PHONE = Path(os.environ["FAKE_ADB"])
DATA = PHONE / "data"


def main() -> int:
    scenario = json.loads((PHONE / "scenario.json").read_text())
    arguments = sys.argv[1:]
    with open(PHONE / "calls.jsonl", "a", encoding="utf-8") as calls:
        calls.write(json.dumps(arguments) + "\n")
    if arguments == ["devices"]:
        print("List of devices attached\n" + "".join(f"{s}\t{state}\n" for s, state in scenario["devices"].items()))
        return 0
    if arguments[:1] != ["-s"] or scenario["devices"].get(arguments[1]) != "device":
        print("adb: device not selected as it should be", file=sys.stderr)
        return 1
    verb, rest = arguments[2], arguments[3:]
    if scenario.get("lost_at") == verb or (scenario.get("lost_at") and (PHONE / "lost").exists()):
        (PHONE / "lost").touch()
        print(f"adb: error: failed to get feature set: device '{arguments[1]}' not found", file=sys.stderr)
        return 1
    if verb == "push":
        return push(scenario, *rest)
    if verb == "shell" and len(rest) == 1:
        return shell(scenario, rest[0])
    print(f"adb: unknown command {verb} {rest}", file=sys.stderr)
    return 1


def push(scenario: dict, source: str, target: str) -> int:
    if not target.startswith("/data/local/tmp/") or ".." in target:
        print(f"adb: error: failed to copy '{source}' to '{target}': remote Permission denied", file=sys.stderr)
        return 1
    if Path(source).stat().st_size > scenario.get("space", 1 << 40):
        print(
            f"adb: error: failed to copy '{source}' to '{target}': remote write failed: No space left on device",
            file=sys.stderr,
        )
        return 1
    place = DATA / target.removeprefix("/data/local/tmp/")
    if not place.parent.is_dir():
        print(f"adb: error: failed to copy '{source}' to '{target}': remote No such file or directory", file=sys.stderr)
        return 1
    shutil.copyfile(source, place)
    place.chmod(0o644)  # as adb leaves files that were not executable at home
    print(f"{source}: 1 file pushed, 0 skipped. 30.1 MB/s (1234 bytes in 0.001s)")
    return 0


def shell(scenario: dict, command: str) -> int:
    if "exec" in command.split() and scenario.get("hang"):
        time.sleep(60)
    if command.startswith("pkill"):  # the phone's own processes only; here they have ended
        command = command.split("; ", 1)[1]
    command = command.replace("/data/local/tmp", str(DATA))
    for path in ("/proc/loadavg", "/sys/"):
        command = command.replace(path, f"{PHONE}{path}")
    environment = {**os.environ, "PATH": f"{PHONE / 'bin'}:{os.environ['PATH']}", "SCENARIO": json.dumps(scenario)}
    status = subprocess.run(["sh", "-c", command], env=environment, check=False).returncode
    return status if status >= 0 else 128 - status  # as a shell tells of a signal


if __name__ == "__main__":
    sys.exit(main())
