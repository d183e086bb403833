"""Writes what a runtime in any language has to agree with: bundles of tiny models, images, and Python's answers.

    python tests/conformance/make.py OUT

README.md beside this file says what is written.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
    from conformance import write

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write into")
    parser.add_argument("--executorch", action="store_true", help="bundles for ExecuTorch as well, which take a minute")
    args = parser.parse_args()
    print(write(args.out, executorch=args.executorch))
