"""Every error this project raises on purpose. The command line prints one as a single line and exits with 2."""

import re

MAX_LINE = 300
"""Longest quotation from another library's error, in characters."""

MAX_MESSAGE = 2000
"""Longest message, in characters; the longest intended one lists two dozen names."""

_UNDECODED = re.compile("[\udc80-\udcff]+")
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")


class MvmoeError(Exception):
    """Base of all errors of this project; the message says what was wrong, where, and what to do.

    The message is one line. Unprintable characters, such as terminal escapes in a file name, appear as Python escapes.
    """

    def __str__(self) -> str:
        text = as_text(super().__str__())
        if len(text) > MAX_MESSAGE:  # it quotes something unreasonably long
            text = f"{text[: MAX_MESSAGE // 2]} … {text[-MAX_MESSAGE // 2 :]}"
        if text.isprintable():
            return text
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class ConfigError(MvmoeError):
    """A model config or a set of weights that do not fit together."""


class CheckpointError(MvmoeError):
    """A checkpoint that cannot be read or is incomplete."""


class BundleError(MvmoeError):
    """A bundle that is missing, damaged, unsafe or of another format version."""


class ImageError(MvmoeError):
    """An image, or a batch of them, that cannot be used."""


class BackendError(MvmoeError):
    """A backend that is not installed, does not run here, or failed."""


class BudgetError(MvmoeError):
    """A memory budget that cannot hold even one tail."""


class ExportError(MvmoeError):
    """A checkpoint that cannot be exported, or whose output may not be written."""


class CheckFailed(MvmoeError):  # noqa: N818  (it says what happened)
    """A check that ran and failed. The command line exits with 1."""


class AnswerError(CheckFailed, BackendError):
    """A model's answer that cannot be one: NaN, infinite, no probabilities, or a class that does not exist."""


class VerificationError(CheckFailed):
    """An export whose pieces do not agree with the PyTorch checkpoint."""


class RegressionError(CheckFailed):
    """A benchmark value that exceeds its limit by more than the noise."""


class DataError(MvmoeError):
    """A training data folder that cannot be used."""


def as_text(name: str) -> str:
    """A file's name as text that can be stored and shown.

    In a locale without UTF-8, Python keeps a name's other bytes as surrogates, which no file of text can hold. They are
    decoded as UTF-8 here; bytes that are not UTF-8 appear as Python escapes.
    """
    text = _UNDECODED.sub(
        lambda found: found[0].encode(errors="surrogateescape").decode(errors="backslashreplace"), name
    )
    return text.encode(errors="backslashreplace").decode()


def first_line(error: BaseException) -> str:
    """Another library's error as a reason to quote within one line: its first line, or its type's name if it has none.

    Terminal escape sequences and other unprintable characters are removed.
    """
    lines = (_ESCAPE.sub("", line) for line in str(error).splitlines())
    printable = ("".join(character for character in line if character.isprintable()).strip() for line in lines)
    line = next((line for line in printable if line), type(error).__name__)
    return line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]}…"


def root_cause(error: BaseException) -> str:
    """The first line of the last error in a chain of causes: torch's outer ones say which step failed, not why."""
    seen = {id(error)}
    while error.__cause__ is not None and id(error.__cause__) not in seen:
        error = error.__cause__
        seen.add(id(error))
    return first_line(error)
