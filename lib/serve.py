"""The explorer as a page on this machine only: what ``./run_all.sh --explore`` calls.

Voila serves notebook 00 on the loopback address, behind a random token that is part of the printed
address. The token goes to Voila by its environment, where other users of the machine cannot see it.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib import notebooks
from lib.errors import UserError
from lib.presets import REPO_ROOT

NOTEBOOK = notebooks.NOTEBOOKS / "00_explore.ipynb"
HOST, PORT = "127.0.0.1", 8866
PATIENCE = 180  # seconds until the server must answer
ELSEWHERE = ("The same calls are plain functions of `lib.explorer`: `notebooks/00_explore.ipynb` shows "
             "them in JupyterLab.")
FORGET = 1800  # seconds after which a page that nobody has open any more is ended, with its models
LARGEST_UPLOAD = 256 * 2**20  # bytes; the server's own limit would cut off large photographs


@dataclass(frozen=True)
class Served:
    """A running page: its process, its port, its token."""

    process: subprocess.Popen[bytes]
    port: int
    token: str

    @property
    def address(self) -> str:
        """What to open in a browser."""
        return f"http://{HOST}:{self.port}/?token={self.token}"


def free_port(wanted: int = PORT) -> int:
    """The wanted port of the loopback address, or any free one where it is taken."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise UserError(f"no port of {HOST} is free: close some programs and try again")


def with_parameters(parameters: Mapping[str, Any], folder: Path) -> Path:
    """A copy of the notebook with these parameters, in a folder of its own.

    It ends with the page: the rounds step by step below it are for JupyterLab, and a visitor need
    not wait until they are played.
    """
    import nbformat
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    book = load_notebook_node(str(NOTEBOOK))
    known = notebooks.declared_parameters(NOTEBOOK)
    given = {name: absolute(value) for name, value in parameters.items() if name in known}
    copy = folder / NOTEBOOK.name
    book = parameterize_notebook(book, given, kernel_name="python3", language="python")
    last = max(k for k, cell in enumerate(book.cells) if "open_page" in cell.source)
    book.cells = [*book.cells[: last + 1], nbformat.v4.new_markdown_cell(ELSEWHERE)]
    nbformat.write(book, copy)
    return copy


def absolute(value: Any) -> Any:
    """A parameter with its path spelled out: the page's process runs in another folder."""
    if not isinstance(value, str):
        return value
    kind, colon, place = value.partition(":")
    if kind in ("folder", "texts") and place:
        return kind + colon + str((REPO_ROOT / Path(place).expanduser()).resolve())
    return str((REPO_ROOT / value).resolve()) if value.endswith(".toml") else value


def command(notebook: Path, port: int) -> list[str]:
    """How Voila is called."""
    return [sys.executable, "-m", "voila", str(notebook), "--no-browser", "--Voila.log_level=WARN",
            f"--Voila.ip={HOST}", f"--Voila.port={port}", "--Voila.port_retries=0",
            "--Voila.auto_token=True", "--template=explorer",
            f"--MappingKernelManager.cull_idle_timeout={FORGET}", "--MappingKernelManager.cull_interval=60",
            "--ZMQChannelsWebsocketConnection.iopub_data_rate_limit=1e9"]


def write_limits(folder: Path) -> str:
    """Tell Voila how large an upload may be; a command line cannot hold a nested setting."""
    limits = {"Voila": {"tornado_settings": {"websocket_max_message_size": LARGEST_UPLOAD}}}
    (folder / "voila.json").write_text(json.dumps(limits), encoding="utf-8")
    return str(folder)


@contextmanager
def served(parameters: Mapping[str, Any]) -> Iterator[Served]:
    """Serve the page for the duration of a block; yields when it answers.

    Raises UserError if the server ends or does not answer in time.
    """
    with notebooks.kernel_surroundings() as runtime:
        notebook = with_parameters(parameters, Path(runtime))
        token, port = secrets.token_urlsafe(24), free_port()
        paths = [str(REPO_ROOT / "lib" / "explorer" / "share"),
                 *filter(None, [os.environ.get("JUPYTER_PATH")])]
        env = {**os.environ, "JUPYTER_TOKEN": token, "JUPYTER_PATH": os.pathsep.join(paths),
               "JUPYTER_CONFIG_PATH": write_limits(Path(runtime))}
        process = subprocess.Popen(command(notebook, port), env=env, cwd=REPO_ROOT)
        page = Served(process, port, token)
        try:
            wait_until_up(page)
            yield page
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_until_up(page: Served, patience: float = PATIENCE) -> None:
    """Return when the server accepts connections."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if page.process.poll() is not None:
            raise UserError("the page's server ended at once (its message is above): is the package "
                            "voila installed as pinned?")
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex((HOST, page.port)) == 0:
                return
        time.sleep(0.1)
    raise UserError(f"the page's server did not answer within {patience:.0f} s: try again")


def serve(parameters: Mapping[str, Any]) -> None:
    """Serve the page until Ctrl-C, until the terminal is closed or until the command is ended."""
    for name in ("SIGTERM", "SIGHUP"):  # would leave the server and its models running without an owner
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda *_: sys.exit(0))
    with served(parameters) as page:
        print(f"The explorer is at\n\n    {page.address}\n\nOpen it in a browser on this machine; the "
              "first page takes some seconds. Ctrl-C ends it.", flush=True)
        try:
            page.process.wait()
        except KeyboardInterrupt:
            print("\nclosing the explorer", flush=True)
