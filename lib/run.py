"""The command behind ``./run_all.sh``: executes the notebooks in order with papermill. ``--help`` needs no package."""

import argparse
import ast
import json
import logging
import multiprocessing.forkserver
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from lib.base import ROOT, UserError, write_atomic

NOTEBOOKS = ROOT / "notebooks"
HELP = """\
own data (formats and limits: data/README.md):
  --dataset folder:DIR   images, also in subfolders; captions, which scores need, in captions.csv or a.txt beside a.jpg
  --dataset texts:FILE   one prompt a line; text reconstruction only
  The mini models know only the objects of their picture book: for photographs choose another preset, such as paper.

examples:
  ./run_all.sh --n 20                                 every figure and table of the picture book, small
  ./run_all.sh --only 04 --param BINS=5               one figure again, with another parameter
  ./run_all.sh --preset mine.toml --dataset folder:my/images
  ./run_all.sh --fetch --preset paper --dataset coco  tells sizes and downloads what is missing
"""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags; UserError for a wrong one."""
    parser = argparse.ArgumentParser("./run_all.sh", epilog=HELP, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     description="Runs the round trips and draws every figure. Finished rows are reused.")

    def error(message: str) -> NoReturn:
        raise UserError(f"{message}; ./run_all.sh --help lists the flags")

    parser.error, add = error, parser.add_argument
    add("--preset", default="mini", metavar="P", help="models, decoding and sizes: a name or a .toml file (mini)")
    add("--dataset", action="append", metavar="D", help="a dataset; several: repeat, or a,b (the preset's own)")
    add("--n", type=int, metavar="N", help="sources of each dataset (the preset's number)")
    add("--candidates", type=int, metavar="K", help="candidates of each source (the preset's number)")
    add("--seed", type=int, default=0, metavar="S", help="changes every draw (the preset's)")
    add("--only", default="", metavar="LIST", help="notebooks by number or name, such as 03,05")
    add("--param", action="append", default=[], metavar="NAME=VALUE", help="any other parameter; repeatable")
    add("--force", action="store_true", help="score finished rows again; to make them again, remove their folder")
    add("--fetch", action="store_true", help="run nothing: tell and download what is missing")
    add("--verify", action="store_true", help="run nothing: make a sample of the rows again and compare")
    add("--explore", action="store_true", help="serve the interactive page on this machine until Ctrl-C")
    flags = parser.parse_args(arguments)
    for name in ("n", "candidates", "seed"):
        value, least = getattr(flags, name), 0 if name == "seed" else 1
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: give a whole number from {least} on")
    return flags


def select(only: str) -> list[Path]:
    """Return the notebooks that `only` names by number (03 or 3) or name, in order; all from 01 if it is empty."""
    paths = sorted(path for path in NOTEBOOKS.glob("[0-9]*.ipynb") if not path.name.startswith("00"))
    wanted = tuple(part.strip().removesuffix(".ipynb").zfill(2) for part in only.split(",") if part.strip())
    for name in wanted:
        if not any(path.stem.startswith(name) for path in paths):
            raise UserError(f"--only {name}: no such notebook; there are {', '.join(path.stem for path in paths)}")
    return [path for path in paths if path.stem.startswith(wanted or "")]


def declared(notebook: Path) -> dict[str, Any]:
    """Return {NAME: default} of a notebook's cell tagged ``parameters``."""
    import papermill

    # An expression such as 1 / 3 is a default too; the notebook itself is about to be executed.
    return {name: eval(found["default"]) for name, found in papermill.inspect_notebook(notebook).items()}


def extra_parameters(texts: Sequence[str], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of ``NAME=VALUE`` texts, each of the type of its default; UserError if that cannot be.

    A list may be written a,b. papermill itself only warns of an unknown parameter and goes on with the default.
    """
    given: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in known:
            raise UserError(f"--param {text}: no chosen notebook has a parameter {name}; there are {', '.join(known)}")
        kind = type(known[name])
        try:
            given[name] = value if kind is str else value.split(",") if kind is list and "[" not in value else (
                kind(ast.literal_eval(value.title() if kind is bool else value)))
        except (ValueError, SyntaxError, TypeError) as error:
            raise UserError(f"--param {text}: must be of type {kind.__name__}, such as {known[name]!r}") from error
    return given


def neutral_surroundings(folder: Path) -> None:
    """Keep the user's settings of Jupyter, IPython and matplotlib out of this process and its kernels."""
    for name in [name for name in os.environ if name.startswith(("JUPYTER", "IPYTHON", "MPL"))]:
        del os.environ[name]
    (folder / "matplotlibrc").touch()
    sys.warnoptions.append("ignore:resource_tracker")  # it frees what killed processes held: no news
    multiprocessing.current_process()._config["tempdir"] = str(folder)  # short: it has a socket there
    os.environ |= {"MATPLOTLIBRC": str(folder / "matplotlibrc"), "IPYTHONDIR": str(folder / "ipython"),
                   "MPLBACKEND": "module://matplotlib_inline.backend_inline",  # must be known before matplotlib is imported
                   "OPENBLAS_NUM_THREADS": "1",  # numpy's sums do not depend on how many notebooks run
                   "JUPYTER_PREFER_ENV_PATH": "1",  # the kernel is this interpreter, whatever kernels are installed
                   "MALLOC_ARENA_MAX": "1",  # glibc: threads share what they have freed, 0.25 GB less a notebook
                   **dict.fromkeys(("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"), str(folder))}


def end_on_signals(folder: Path, message: str) -> None:
    """From now on Ctrl-C and SIGTERM end this process and all that it has started, in one line."""

    def end(*_: object) -> None:
        import psutil

        logging.disable()  # that kernels died is no news
        sys.stdout = None  # nor that notebooks stopped
        children = psutil.Process().children(recursive=True)
        for child in children:
            child.kill()
        psutil.wait_procs(children, timeout=5)
        shutil.rmtree(folder, ignore_errors=True)
        print(f"\n{message}", file=sys.stderr, flush=True)
        os._exit(130)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, end)


def begin_forks(models: bool) -> None:
    """Start the process that kernels are forked from; what they share is imported there once: seconds less for each."""
    shared = ["ipykernel.kernelapp", "lib.figures", "lib.roundtrip"]
    if models and not any(map(os.path.exists, ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))):  # CUDA bears no fork
        shared += ["lib.models.generators", "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"]
    multiprocessing.forkserver.set_forkserver_preload(shared * (sys.platform == "linux"))  # macOS does not fork safely
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as it shall be there: it ends with this process
    multiprocessing.forkserver.ensure_running()
    signal.signal(signal.SIGINT, handler)


def _kernel(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """Be a kernel until it is told to end, or the run command has ended, however it did."""
    from ipykernel.kernelapp import IPKernelApp

    os.setsid()
    os.chdir(ROOT)
    threads, torch = environment.get("OMP_NUM_THREADS"), sys.modules.get("torch")
    if torch and threads != os.environ.get("OMP_NUM_THREADS"):  # set by us since torch was imported
        torch.set_num_threads(int(threads))
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # the usual one again, whose semaphores outlive nobody
    logging.getLogger("asyncio").setLevel("CRITICAL")  # how a kernel ends is no news
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    IPKernelApp.launch_instance([*arguments, "--IPKernelApp.log_level=CRITICAL"])


def forked_kernels() -> type:
    """Return the manager of such kernels."""
    from jupyter_client import AsyncKernelManager

    async def launch(manager: AsyncKernelManager, command: list[str], env: Mapping[str, str], **_: object) -> None:
        process = multiprocessing.get_context("forkserver").Process(
            name="kernel", target=_kernel, args=(command[command.index("-f"):], env))  # without what it would start
        process.start()
        manager.provisioner.process = SimpleNamespace(  # what jupyter_client uses of a subprocess.Popen
            poll=lambda: process.exitcode, wait=process.join, send_signal=lambda number: os.kill(process.pid, number),
            kill=process.kill, terminate=process.terminate, stdin=None, stdout=None, stderr=None)

    return type("Forked", (AsyncKernelManager,), {"_async_launch_kernel": launch})


def execute(notebook: Path, target: Path, parameters: Mapping[str, Any], folder: Path, stream: Any = None) -> str:
    """Execute a notebook into `target`, its sockets in `folder`; return in one line why it stopped, empty if it did not."""
    import papermill
    from nbclient.exceptions import DeadKernelError
    from traitlets.config import Config

    config = Config(KernelManager={"transport": "ipc", "connection_file": str(folder / f"{notebook.stem}.json")})
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(
            notebook, target, dict(parameters), kernel_name="python3", language="python", cwd=ROOT, config=config,
            kernel_manager_class=forked_kernels(), progress_bar=False, stdout_file=stream, stderr_file=stream,
            start_timeout=600)
    except papermill.PapermillExecutionError as error:
        said = " ".join(error.evalue.split())
        return said if error.ename == "UserError" else f"{error.ename}: {said[:400]} (traceback in {target})"
    except DeadKernelError:
        return "its process was killed (out of memory?); finished rows are kept, run again to continue"
    return ""


def export_summary(executed: Path, page: Path) -> None:
    """Write an executed notebook as one HTML file without code that loads nothing from a network."""
    from nbconvert import HTMLExporter

    scripts = ("html_head_js", "html_head_js_mathjax", "html_head_js_mermaidjs", "jupyter_widgets")
    without = "".join(f"{{% block {name} %}}{{% endblock %}}" for name in scripts)
    exporter = HTMLExporter(raw_template="{% extends 'lab/index.html.j2' %}" + without, embed_images=True,
                            exclude_input=True)
    write_atomic(page, exporter.from_filename(str(executed))[0])


def run_notebooks(flags: argparse.Namespace, given: dict[str, Any], folder: Path) -> int:
    """Execute the chosen notebooks and name what was written; return the exit status."""
    begin_forks(models=any(path.stem < "03" for path in select(flags.only)))
    from lib.roundtrip.check import compare_expected

    known = {path: declared(path) for path in select(flags.only)}
    given |= {"RESCORE": flags.force}
    given |= extra_parameters(flags.param, {name: value for found in known.values() for name, value in found.items()})
    runs, begun, told = prepared(given), time.monotonic(), set[str]()

    def one(path: Path) -> bool:
        start, target = time.monotonic(), runs.figures / "notebooks" / path.name
        parameters = {name: value for name, value in given.items() if name in known[path]}
        trouble = execute(path, target, parameters, folder, sys.stdout if path in models else None)
        line = f"error: {'as above' if trouble in told else trouble}"
        print(f"{path.stem}  {line if trouble else f'{time.monotonic() - start:.0f} s'}\n", end="", flush=True)
        told.update({trouble} - {""})
        return not trouble

    models = [path for path in known if "ENGINE" in known[path]]
    summary = [path for path in known if path.stem == "90_summary"]
    rest = [path for path in known if path not in models + summary]
    # Small models leave cores idle where a notebook starts, scores or draws: two at a time share them.
    stages = [*([models] if runs.preset.shards_at_once > 1 else [[path] for path in models]), rest, summary]
    with ThreadPoolExecutor(2) as pool:  # not in this thread: it stays free to answer Ctrl-C
        for stage in stages:
            if len(stage) > 1:  # two at a time divide the cores
                os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // 2)))
            ended_well = list(pool.map(one, stage))
    print(f"\n{len(known)} notebooks in {time.monotonic() - begun:.0f} s")
    if ended_well == [True]:  # the summary
        export_summary(runs.figures / "notebooks" / summary[0].name, runs.figures / "index.html")
        print(f"read first{' (incomplete: see the errors above)' if told else ''}: {runs.figures / 'index.html'}")
    print(f"figures and executed notebooks: {runs.figures}")
    if line := compare_expected(runs):
        print(line)
    return 1 if told else 0


def prepared(given: Mapping[str, Any], models: bool = False) -> Any:
    """Return the runs that the parameters stand for, once their data, and on request their models, are here."""
    from lib.data import fetch, missing_files
    from lib.models import fetch_models, missing_models
    from lib.presets import load_preset
    from lib.roundtrip import open_runs

    preset = load_preset(given["PRESET"])
    names = preset.datasets if given["DATASET"] == "all" else given["DATASET"].split(",")
    size = (given["N_SOURCES"] or preset.n_sources, given["SEED"] or preset.seed)
    for what, amount in [*missing_files(names, *size), *(missing_models(preset) if models else [])]:
        print(f"to download: {what}, about {amount / 1e6:,.0f} MB", flush=True)
    fetch(names, *size)
    if models:  # otherwise a run downloads them where it needs them: finished rows need none
        fetch_models(preset)
        print("images are missing: see above" if missing_files(names, *size) else "everything is here")
    return open_runs(*(given[name] for name in ("PRESET", "DATASET", "N_SOURCES", "N_CANDIDATES", "SEED")))


def explore(given: Mapping[str, Any], folder: Path) -> int:
    """Serve notebook 00 by Voila on this machine's own address, with a token, until Ctrl-C."""
    import papermill

    book = folder / "explore.ipynb"
    papermill.execute_notebook(NOTEBOOKS / "00_explore.ipynb", book, given, prepare_only=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port, token = free.getsockname()[1], secrets.token_urlsafe(24)
    write_atomic(folder / "voila.json", json.dumps({
        "Voila": {"ip": "127.0.0.1", "port": port, "token": token, "open_browser": False, "log_level": "ERROR",
                  "connection_dir_root": str(folder),
                  "tornado_settings": {"disable_check_xsrf": True,  # else a closing page cannot end its kernel
                                       "websocket_max_message_size": 256 << 20,  # uploads
                                       "ws_ping_interval": 0}},  # with pings, tornado warns or closes live pages
        "VoilaConfiguration": {"template": "explorer"}, "ConnectionFileMixin": {"transport": "ipc"},
        "MappingKernelManager": {"cull_idle_timeout": 120, "cull_interval": 30, "cull_busy": True},  # of vanished pages
        "ZMQChannelsWebsocketConnection": {"iopub_data_rate_limit": 1e9}}))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JUPYTER_PATH": str(ROOT / "lib" / "explorer")}
    with subprocess.Popen([sys.executable, "-m", "voila", str(book)], cwd=ROOT, env=environment) as server:
        while server.poll() is None and socket.socket().connect_ex(("127.0.0.1", port)):
            time.sleep(0.2)
        if server.poll() is None:
            print(f"the explorer: http://127.0.0.1:{port}/?token={token} (Ctrl-C ends it)", flush=True)
        return server.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status: 0, 1 (a notebook stopped or rows differ), 2 (bad input)."""
    try:
        flags = parse(arguments)
        with tempfile.TemporaryDirectory(prefix="nb-", dir="/tmp") as name:  # short: a socket's path is limited
            folder = Path(name)
            given = {"PRESET": flags.preset, "DATASET": ",".join(flags.dataset or ["all"]), "N_SOURCES": flags.n or 0,
                     "N_CANDIDATES": flags.candidates or 0, "SEED": flags.seed}  # what every notebook has
            end_on_signals(folder, "explorer closed" if flags.explore else "interrupted, run again to continue")
            neutral_surroundings(folder)
            if flags.explore:
                return explore(given, folder)
            if flags.fetch:
                prepared(given, models=True)
                return 0
            if flags.verify:
                from lib.roundtrip.check import verify_runs

                return 0 if verify_runs(prepared(given)) else 1
            return run_notebooks(flags, given, folder)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        if pid := multiprocessing.forkserver._forkserver._forkserver_pid:
            os.kill(pid, signal.SIGKILL)  # in the midst of its imports it would not notice that nobody needs it
        return 2


if __name__ == "__main__":
    sys.exit(main())
