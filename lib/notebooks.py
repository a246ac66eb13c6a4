"""One notebook at a time: its parameters, its execution by papermill, its HTML copy.

Reading parameters needs the standard library only, so that the command line can check them before
anything heavy is imported.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, TextIO

from lib.errors import UserError
from lib.presets import REPO_ROOT

NOTEBOOKS = REPO_ROOT / "notebooks"

# Executed notebooks are read from disk, often without a network: no script is loaded from anywhere.
_OFFLINE_TEMPLATE = """
{%- extends 'lab/index.html.j2' -%}
{%- block html_head_js -%}{%- endblock -%}
{%- block jupyter_widgets -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
"""


class NotebookFailure(RuntimeError):
    """A notebook stopped on an error that is not bad input; the message says where and what."""


# --- which notebooks -------------------------------------------------------------------------

def read_manifest(folder: Path = NOTEBOOKS) -> list[Path]:
    """Return the notebooks of ``manifest.txt`` in run order; UserError if one of them is absent."""
    manifest = folder / "manifest.txt"
    if not manifest.is_file():
        raise UserError(f"{manifest} is missing: restore it from the repository")
    lines = manifest.read_text(encoding="utf-8").splitlines()
    names = [text for line in lines if (text := line.split("#", 1)[0].strip())]
    paths = [folder / (name if name.endswith(".ipynb") else f"{name}.ipynb") for name in names]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{manifest.name} names {path.name}, which is not in {folder}: "
                            "restore the notebook or take its line out")
    return paths


def select(notebooks: Sequence[Path], only: str | None) -> list[Path]:
    """Keep the notebooks that ``only`` names, in manifest order.

    ``only`` is a comma-separated list of numbers (``03`` or ``3``) or names (``03_figure3...``,
    with or without number and ending); None keeps all.
    """
    if only is None:
        return list(notebooks)
    chosen: set[Path] = set()
    for token in filter(None, (part.strip() for part in only.split(","))):
        wanted = token.removesuffix(".ipynb")
        matches = [path for path in notebooks if wanted in _names(path)]
        if not matches:
            known = ", ".join(path.stem for path in notebooks)
            raise UserError(f"--only {token!r} matches no notebook; there are {known}")
        chosen.update(matches)
    if not chosen:
        raise UserError("--only is empty: name notebooks by number or name, such as 03,05")
    return [path for path in notebooks if path in chosen]


def _names(path: Path) -> set[str]:
    """What a notebook answers to: its stem, its number with and without zero, its bare name."""
    number, _, bare = path.stem.partition("_")
    return {path.stem, number, number.lstrip("0") or "0", bare}


# --- parameters ------------------------------------------------------------------------------

def declared_parameters(notebook: Path) -> dict[str, Any]:
    """Return {NAME: default} of the one cell tagged ``parameters``."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{notebook} is not a notebook ({error}): restore it") from error
    tagged = [cell for cell in cells if "parameters" in cell.get("metadata", {}).get("tags", [])]
    if len(tagged) != 1:
        raise UserError(f"{notebook.name} has {len(tagged)} cells tagged 'parameters', not one")
    values: dict[str, Any] = {}
    for statement in ast.parse("".join(tagged[0]["source"])).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            values[statement.targets[0].id] = ast.literal_eval(statement.value)
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            values[statement.target.id] = ast.literal_eval(statement.value)
    return values


def check_parameters(notebook: Path, given: Mapping[str, Any]) -> None:
    """Raise UserError for a parameter that the notebook lacks or whose type differs.

    papermill itself only warns, and the run would silently use the default.
    """
    declared = declared_parameters(notebook)
    for name, value in given.items():
        if name not in declared:
            raise UserError(f"{notebook.name} has no parameter {name!r}; "
                            f"it has {', '.join(declared)}")
        expected = type(declared[name])
        if type(value) is not expected and not (expected is float and type(value) is int):
            raise UserError(f"{notebook.name}: parameter {name} = {value!r} must be of type "
                            f"{expected.__name__}, like its default {declared[name]!r}")


# --- execution -------------------------------------------------------------------------------

class Indented:
    """A text stream that passes lines on, set in below a headline without its line end.

    ``used`` tells whether anything was passed on, so that a silent notebook keeps to one line.
    """

    def __init__(self, stream: TextIO, prefix: str = "      ") -> None:
        self.stream, self.prefix, self.used, self._last = stream, prefix, False, ""

    def write(self, text: str) -> int:
        """Print the pieces of a message at once: a progress bar ends its line only with the next
        one, minutes later. Carriage returns end lines; a repeated line is shown once."""
        for line in filter(str.strip, text.replace("\r", "\n").split("\n")):
            if line != self._last:
                if not self.used:
                    print(file=self.stream)
                self.used, self._last = True, line
                print(f"{self.prefix}{line}", file=self.stream, flush=True)
        return len(text)

    def flush(self) -> None:
        """Every line is flushed as it is written."""


@contextlib.contextmanager
def kernel_surroundings() -> Iterator[str]:
    """Set what a kernel inherits for the duration of a run; yields the short runtime folder.

    The folder also keeps the user's IPython start-up files and kernel lists out of a run that is
    to be the same everywhere.
    """
    with tempfile.TemporaryDirectory(prefix="nb-") as runtime:
        paths = [str(REPO_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        changes = {
            "JUPYTER_RUNTIME_DIR": runtime,
            "IPYTHONDIR": str(Path(runtime) / "ipython"),
            "JUPYTER_PREFER_ENV_PATH": "1",
            "PYTHONPATH": os.pathsep.join(paths),
        }
        before = {name: os.environ.get(name) for name in changes}
        os.environ.update(changes)
        try:
            yield runtime
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def execute(notebook: Path, target: Path, parameters: Mapping[str, Any],
            stream: Any = sys.stdout) -> None:
    """Execute a notebook with parameters and keep the executed copy at ``target``, whole or cut.

    What the notebook prints, progress included, goes to ``stream`` as it appears. Raises
    UserError for one raised inside and NotebookFailure for anything else.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from traitlets.config import Config
    check_parameters(notebook, parameters)
    target.parent.mkdir(parents=True, exist_ok=True)
    with kernel_surroundings() as runtime:
        # Sockets in the file system: no two runs can race for a port. Their names are limited to
        # about 100 bytes, hence the short folder.
        manager = {"transport": "ipc", "connection_file": f"{runtime}/kernel.json"}
        try:
            papermill.execute_notebook(
                notebook, target, dict(parameters), kernel_name="python3", language="python",
                cwd=REPO_ROOT, progress_bar=False, stdout_file=stream, stderr_file=stream,
                start_timeout=600,  # a busy machine may need minutes to start a process
                config=Config({"KernelManager": manager, "AsyncKernelManager": manager}))
        except papermill.PapermillExecutionError as error:
            raise _failure(error, notebook, target) from error
        except DeadKernelError as error:
            raise UserError(f"{notebook.name}: its Python process was killed (out of memory?); "
                            "finished rows are kept, run the same command again") from error


def _failure(error: Any, notebook: Path, target: Path) -> UserError | NotebookFailure:
    """Turn papermill's report into one line: bad input as UserError, the rest as a failure."""
    if error.ename == "UserError":
        return UserError(error.evalue)
    message = " ".join(error.evalue.split())[:400]
    return NotebookFailure(f"{notebook.name}, cell {error.cell_index}: {error.ename}: {message} "
                           f"(traceback in {target})")


def export_html(executed: Path) -> Path:
    """Write an executed notebook as one HTML file beside it that loads nothing from a network.

    Its title is the notebook's; its figures have the alternative texts that were saved with them in
    the folder above.
    """
    import nbformat
    from nbconvert import HTMLExporter
    book = nbformat.read(executed, as_version=4)
    exporter = HTMLExporter(raw_template=_OFFLINE_TEMPLATE, embed_images=True)
    title = next(_headings(book.cells), executed.stem)
    page, _ = exporter.from_notebook_node(book, {"metadata": {"name": title}})
    texts = iter(_alternatives(book.cells, executed.parent.parent))
    page = re.sub(re.escape(_NO_ALTERNATIVE), lambda found: escape(next(texts, found[0])), page)
    html = executed.with_suffix(".html")
    html.write_text(page, encoding="utf-8")
    return html


_NO_ALTERNATIVE = "No description has been provided for this image"  # what nbconvert writes


def _headings(cells: Sequence[Any]) -> Iterator[str]:
    """The headings of a notebook's texts."""
    for cell in cells:
        if cell.cell_type == "markdown":
            yield from re.findall(r"^#+ +(.+)$", cell.source, re.MULTILINE)


def _alternatives(cells: Sequence[Any], folder: Path) -> list[str]:
    """What the pictures of a notebook show, in order: as saved beside a figure, or its heading."""
    found, heading = [], ""
    for cell in cells:
        heading = next(reversed(list(_headings([cell]))), heading)
        if cell.cell_type != "code":
            continue
        shown = sum("image/png" in output.get("data", {}) for output in cell.outputs)
        saved = re.findall(r'save_(?:figure|gallery)\(\w+, "(\w+)"', cell.source)
        sidecars = [folder / f"{name}.json" for name in saved]
        texts = [json.loads(path.read_text(encoding="utf-8"))["alt"] for path in sidecars if path.is_file()]
        found += (texts + shown * [f"Figure to the section: {heading}"])[:shown]
    return found
