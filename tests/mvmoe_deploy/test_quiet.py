"""What libraries print goes nowhere; what this project prints, and raises, does not."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings

import pytest

from mvmoe_deploy.quiet import quiet

TALKATIVE = """
import os, sys
from mvmoe_deploy.quiet import quiet
with quiet():
    print("python", file=sys.stderr)
    os.write(2, b"native\\n")
    print("output")
print("after", file=sys.stderr)
os.write(2, b"native after\\n")
"""


def test_nothing_reaches_standard_error_until_the_block_ends() -> None:
    done = subprocess.run([sys.executable, "-c", TALKATIVE], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("output\n", "after\nnative after\n")


def test_a_process_without_standard_error_works() -> None:
    code = "import os; os.close(2)\nfrom mvmoe_deploy.quiet import quiet\nwith quiet(): print('output')"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == "output\n"


def test_what_is_raised_comes_through_and_all_is_as_before() -> None:
    descriptors = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
    level, stream = logging.root.manager.disable, sys.stderr
    with pytest.raises(ValueError, match="wrong"), quiet():
        warnings.warn("dropped", stacklevel=1)
        raise ValueError("wrong")
    assert (logging.root.manager.disable, sys.stderr) == (level, stream)
    if descriptors:
        assert len(os.listdir("/proc/self/fd")) == len(descriptors)
