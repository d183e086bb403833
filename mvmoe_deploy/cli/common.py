"""What every command shares: how errors become exit codes, and how output is printed."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import functools
import io
import locale
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from mvmoe_deploy import __version__
from mvmoe_deploy.errors import BackendError, CheckFailed, MvmoeError, first_line

if TYPE_CHECKING:
    from mvmoe_deploy.checkpoint import Header
    from mvmoe_deploy.images import Preprocessing
    from mvmoe_deploy.models.train.data import ImageSet

CHECK_FAILED = 1
BAD_INPUT = 2
UTF_8 = ("utf-8", "utf8", "cp65001")


class Command(Protocol):
    """A command's entry point; without arguments it reads the process's own."""

    def __call__(self, argv: list[str] | None = None) -> int: ...


def command(main: Callable[[list[str] | None], None]) -> Command:
    """Turns this project's errors into one line on standard error and an exit code: 1 check failed, 2 bad input.

    No state of standard output leads to a traceback: characters that its encoding lacks are replaced, output to a
    closed stream is dropped, and a reader such as ``head`` may stop reading.
    """

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        _prepare_streams()
        try:
            try:
                main(argv)
            except SystemExit:  # raised by --help
                sys.stdout.flush()
                raise
            sys.stdout.flush()
            return 0
        except CheckFailed as error:
            _complain(f"error: {error}")
            return CHECK_FAILED
        except MvmoeError as error:
            _complain(f"error: {error}")
            return BAD_INPUT
        except BrokenPipeError:  # whoever reads the output, such as head, has read enough
            return 128 + 13  # the exit code that a shell reports for a program that SIGPIPE ended
        except UnicodeError as error:
            encoding = locale.getpreferredencoding(False)  # UTF-8 in Python's UTF-8 mode
            if encoding.lower() in UTF_8:
                raise  # a fault of this project
            _complain(
                f"error: a library cannot work in this locale, whose encoding is {encoding} ({first_line(error)}); "
                "set PYTHONUTF8=1"
            )
            return BAD_INPUT
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            _complain(f"error: {where}{error.strerror or error}")
            return BAD_INPUT
        except KeyboardInterrupt:
            _complain("interrupted")
            return 130
        finally:
            _give_up_output()

    return run


def _prepare_streams() -> None:
    """Makes standard output and standard error accept whatever is printed."""
    for name in ("stdin", "stdout", "stderr"):  # in the order of their descriptors
        if getattr(sys, name) is None:  # closed: the next file to be opened would get its descriptor and the output
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=PLAINER)


PLAINER = "mvmoe-plainer"
"""Name of an error handler for encodings: characters that an encoding lacks become similar ones that it has."""

SIMILAR = {"–": "-", "−": "-", "…": "...", "×": "x", "†": "*", "→": "->", "±": "+-", "≥": ">=", "≤": "<=", "·": "-"}


def _plainer(error: UnicodeError) -> tuple[bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return b"".join(map(_similar, error.object[error.start : error.end])), error.end


def _similar(character: str) -> bytes:
    if "\udc80" <= character <= "\udcff":  # a byte of a file name that is not text: written as it is
        return bytes([ord(character) - 0xDC00])
    return SIMILAR.get(character, "?").encode()


codecs.register_error(PLAINER, _plainer)


def _complain(message: str) -> None:
    """Prints to standard error, which may be a closed pipe."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)


def _give_up_output() -> None:
    """Redirects standard output to the null device if the rest cannot be written; Python would complain on exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class SubCommand(Protocol):
    """One sub-command: a module with these names, whose heavy imports are inside its functions.

    Attributes:
        HELP: what the sub-command does, in one line without a full stop.
        EXAMPLES: text that the help shows unchanged below the options; may be empty.
    """

    HELP: str
    EXAMPLES: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares the arguments; called only if this sub-command was asked for."""

    def run(self, args: argparse.Namespace) -> None:
        """Runs the sub-command.

        Raises:
            MvmoeError: the input is bad, or a check failed; :func:`command` turns it into an exit code.
        """


def command_group(description: str, commands: Mapping[str, SubCommand], default: str) -> Command:
    """A command with sub-commands, such as ``mvmoe-train evaluate``.

    If the first argument names no sub-command, the default runs: ``mvmoe-train --data …`` means
    ``mvmoe-train train --data …``. The help of the command alone lists all sub-commands, with the default's options.

    Args:
        description: what the whole command does.
        commands: the sub-commands by name, in the order in which the help lists them.
        default: name of the sub-command that runs if none is named.
    """

    @command
    def main(argv: list[str] | None = None) -> None:
        argv = sys.argv[1:] if argv is None else argv
        if not argv or argv[0] not in (*commands, "-h", "--help", "--version"):
            argv = [default, *argv]
        chosen = argv[0] if argv[0] in commands else default
        whole = parser(description)
        choices = whole.add_subparsers(title="commands", metavar="COMMAND", required=True)
        for name, module in commands.items():
            about = f"{module.HELP} (the default)" if name == default else module.HELP
            part = choices.add_parser(
                name,
                help=about.replace("%", "%%"),
                description=f"{module.HELP[:1].upper()}{module.HELP[1:]}.",
                epilog=module.EXAMPLES,
            )
            if name == chosen:
                module.add_arguments(part)
                part.set_defaults(run=module.run)
            if name == default and chosen == default:
                whole.epilog = part.format_help()
        args = whole.parse_args(argv)
        args.run(args)

    return main


class Parser(argparse.ArgumentParser):
    """A parser whose help keeps the epilog's lines and shows defaults, and whose errors are one line."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"formatter_class": _Formatter, "allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        """Ends the process with exit code 2."""
        self.exit(BAD_INPUT, f"error: {' '.join(message.split())}; {self.prog} --help says more\n")


def parser(description: str, epilog: str = "") -> Parser:
    """The parser of a whole command, with ``--version``."""
    made = Parser(description=description, epilog=epilog)
    made.add_argument("--version", action="version", version=f"mvmoe-deploy {__version__}", help="print the version")
    return made


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, [], "") or not action.option_strings:
            return action.help
        return super()._get_help_string(action)


def progress_bar(items: Iterator[Any], total: int, title: str = "") -> Iterator[Any]:
    """A progress bar on standard error, shown only on a terminal and only after two seconds."""
    from tqdm import tqdm

    bar: Iterator[Any] = tqdm(items, total=total, desc=title, delay=2, disable=None, leave=False, file=sys.stderr)
    return bar


def read_split(
    data: Path, split: str, preprocessing: Preprocessing, class_ids: list[str] | None = None, **options: Any
) -> ImageSet:
    """:func:`mvmoe_deploy.models.train.folders.read_images` with a progress bar; says if classes have no images.

    Raises:
        DataError: see there.
    """
    from mvmoe_deploy.models.train.folders import read_images  # imports torch

    images = read_images(
        data,
        split,
        preprocessing,
        class_ids,
        progress=lambda items, total: progress_bar(items, total, f"reading {split}"),
        **options,
    )
    present, known = len(images.labels.unique()), len(images.class_ids)
    if present < known:
        print(f"{data}: has images of {present} of the {known} classes", file=sys.stderr)
    return images


def add_data_options(p: argparse.ArgumentParser, *, any_split: bool = True) -> None:
    """Declares what the commands that study a model on labelled images have in common.

    Args:
        p: the command's parser.
        any_split: whether the user may choose the split.
    """
    p.add_argument("--data", type=Path, required=True, metavar="DIR", help="labelled images, as for mvmoe-train")
    if any_split:
        p.add_argument("--split", default="val", help="which of its folders or zips to read")
    p.add_argument("--val-share", type=share, metavar="SHARE", help=VAL_SHARE_HELP)
    p.add_argument("--threads", type=thread_count, help="CPU threads (default: all)")


VAL_SHARE_HELP = (
    "if --data has no val: the share of each class to validate on (default: what the checkpoint was trained with; a "
    "bundle does not know it)"
)


def use_threads(count: int | None) -> None:
    """Sets the number of PyTorch's CPU threads; None leaves it at the number of CPUs."""
    import torch

    if count:
        torch.set_num_threads(count)


def val_share(args: argparse.Namespace, header: Header) -> float:
    """The share of each class to validate on: the option's, or what the checkpoint was trained with.

    A model is thereby judged on images that it never saw.
    """
    from mvmoe_deploy.models.train.folders import recorded_val_share

    given: float | None = args.val_share
    return recorded_val_share(header) if given is None else given


def share(text: str) -> float:
    """An argparse type: a share of at least 0 and below 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0 and below 1, is {text!r}")
    return value


def positive_int(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, is {text!r}")
    return value


def thread_count(text: str) -> int:
    """An argparse type: a number of threads that this machine can use."""
    from mvmoe_deploy.backends import check_threads  # imports numpy

    value = positive_int(text)
    try:
        check_threads(value)
    except BackendError as error:
        raise argparse.ArgumentTypeError(str(error).partition(": ")[2] + f", is {text}") from None
    return value
