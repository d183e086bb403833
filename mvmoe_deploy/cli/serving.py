"""Serving a page to phones: the options, the address that is printed, and the wait until the user ends it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mvmoe_deploy.errors import ConfigError

if TYPE_CHECKING:
    from mvmoe_deploy.bundle import Bundle
    from mvmoe_deploy.serve import Handler, Server, Site


def add_server_options(p: argparse.ArgumentParser) -> None:
    """Declares how a page is served."""
    group = p.add_argument_group("serving a page")
    group.add_argument("--host", default="0.0.0.0", metavar="ADDRESS", help="listen here; 127.0.0.1: this machine only")
    group.add_argument("--port", type=_port, metavar="N", help="listen on this port (default: 8470, or a free one)")
    group.add_argument(
        "--https", action="store_true",
        help="serve by HTTPS with a certificate made here, which the phone has to be told to accept; the live camera "
        "needs it",
    )  # fmt: skip
    group.add_argument(
        "--certificate", type=Path, metavar="PEM", help="serve by HTTPS with this certificate and key, in one file"
    )
    group.add_argument(
        "--engine", type=Path, metavar="DIR",
        help="folder of the npm package onnxruntime-web (default: npm fetches it once into the user's cache)",
    )  # fmt: skip


def refuse_server_options(args: argparse.Namespace, needed: str) -> None:
    """Raises an error if an option of :func:`add_server_options` is given where nothing is served."""
    given = [f"--{name}" for name in ("port", "https", "certificate", "engine") if getattr(args, name)]
    if given:
        raise ConfigError(f"{', '.join(given)}: only with {needed}")


def serve_app(bundle: Bundle, args: argparse.Namespace) -> None:
    """Serves the app with a bundle until the user ends it."""
    from mvmoe_deploy import web_engine
    from mvmoe_deploy.errors import as_text
    from mvmoe_deploy.serve import app_site

    name = as_text(bundle.path.stem)
    server = open_with_options(app_site({name: bundle}, web_engine.find(args.engine)), args)
    print(f"serving {name}: scan the code, or open this address on a phone in the same network; Ctrl-C ends it")
    print_address(server, args)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("ended")
    finally:
        server.server_close()


def open_with_options(site: Site, args: argparse.Namespace, handler: type[Handler] | None = None) -> Server:
    """A server of a site as the options want it; a handler answers in another way than the usual."""
    from mvmoe_deploy.serve import Handler, local_address, open_server, self_signed

    certificate = args.certificate
    if args.https and certificate is None:
        certificate = self_signed(local_address())
    return open_server(site, args.host, port=args.port, certificate=certificate, handler=handler or Handler)


def print_address(server: Server, args: argparse.Namespace) -> None:
    """Prints where the page is, for the eye and for a phone's camera."""
    from mvmoe_deploy.serve import LOOPBACK, local_address, qr_code

    everywhere = args.host in ("0.0.0.0", "::")
    address = server.url(local_address() if everywhere else args.host)
    print(f"\n  {address}\n")
    if code := qr_code(address):
        # white on black, whatever the terminal's colours are: some cameras cannot read the opposite
        print("\n".join(f"\033[97;40m{line}\033[0m" if sys.stdout.isatty() else line for line in code.splitlines()))
    elif sys.stdout.isatty():
        print("(with pip install 'mvmoe-deploy[serve]' it is shown as a QR code as well)")
    if any(host in address for host in LOOPBACK):
        print("Only this machine can open it.")
    elif not address.startswith("https:"):
        print(
            f"Live camera and offline use need HTTPS or localhost: {server.url('localhost')} on this machine, and\n"
            f"on an Android phone on a cable after adb reverse tcp:{server.port} tcp:{server.port}"
        )
    sys.stdout.flush()


def _port(text: str) -> int:
    """An argparse type: a number of a port."""
    if text.isdecimal() and 0 < int(text) < 65536:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be a number from 1 to 65535, is {text!r}")
