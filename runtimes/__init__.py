"""The same runtime in the languages of phones; what Python needs of them are the files that it serves to a browser."""

from __future__ import annotations

from pathlib import Path

WEB = Path(__file__).parent / "web"
"""The package for browsers: ``src`` is the runtime, ``app`` the page that ``mvmoe-inspect --serve`` shows."""
