"""One page with everything a preset's notebooks found: figures, tables, verdicts, provenance.

The page is self-contained (styles, scripts and pictures inside it) and loads nothing from a
network.  It only reads what the notebooks wrote, so it can be made again at any time::

    python -m lib.report --preset mini
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lib import cost, figures, labels, multiplicity
from lib.errors import UserError
from lib.presets import Preset, get_preset
from lib.results import Run, runs_root
from lib.study import cost_table

TEMPLATE = "report.html.j2"
VECTOR_LIMIT = 1_500_000  # bytes: a larger SVG is shown as its PNG
FINDINGS = {  # one of them, several of them
    "holds": ("holds", "hold"),
    "undecided": ("undecided", "undecided"),
    "reversed": ("does not hold", "do not hold"),
    "unknown": ("cannot be judged", "cannot be judged"),
}


@dataclass(frozen=True)
class Section:
    """One question of the paper: its figures, its verdicts, its tables, the notebook behind it.

    paper: where the paper answers it; note: what the rows of the tables are.
    """

    name: str
    heading: str
    lead: str
    figures: tuple[str, ...]
    notebook: str
    paper: str
    tables: tuple[str, ...] = ()
    note: str = ""


SECTIONS = (
    Section(
        "figure5",
        "What does it look like?",
        "Rows chosen by rule, the most telling ones: where selection gains most, and where it misleads. "
        "Left the source, right four candidates in order of similarity; the green frame is what the game "
        "selects. Press a picture to enlarge it.",
        ("figure5",),
        "06_figure5_qualitative",
        "Figure 5",
    ),
    Section(
        "figure3",
        "Is the better reconstruction the better message?",
        "Candidates of one source, ranked by how well the source comes back. If the claim holds, "
        "the curves fall from left to right.",
        ("figure3",),
        "03_figure3_reconstruction_rank",
        "Figure 3",
    ),
    Section(
        "table1",
        "Does selecting beat sampling?",
        "The selected candidate against the mean candidate, of captions and of pictures. A filled dot has "
        "an interval without zero.",
        ("table1_gains",),
        "05_table1_selection_vs_nucleus",
        "Table 1",
        ("table1", "table1_text"),
        "Nucleus: mean over the draws. Selected: what the game chooses, the paper's row “Ours”. Interval: of "
        "the gain, 95 % for CIDEr and CLIP score, widened after Holm for the others. Most probable: the "
        "candidate that the captioner itself prefers. Greedy: its caption without sampling. Oracle: the best "
        "candidate by CIDEr or CLIP score, the most that a selection could reach.",
    ),
    Section(
        "figure4",
        "Are sources that come back well also described well?",
        "Means of sources: easy ones against hard ones. This trend is no evidence for selection.",
        ("figure4",),
        "04_figure4_reconstruction_correlation",
        "Figure 4",
    ),
    Section(
        "figure6",
        "Which pictures are easy?",
        "Good reconstruction and high caption quality at once.",
        ("figure6",),
        "07_figure6_good_reconstructions",
        "Figure 6",
    ),
    Section(
        "failures",
        "When does the game mislead?",
        "The paper's two kinds of failure, counted beside control pictures without the plant.",
        ("failures_counts", "failures_gallery"),
        "08_failure_cases",
        "Section 5.4.3",
    ),
)


# reading what the notebooks wrote


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): run its notebook again") from error


def _read_table(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(path)
        table["dataset"]  # the least that any of them has
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read as a table ({error}): run its notebook again") from error
    return table


def _data_uri(folder: Path, name: str) -> str:
    """The figure as a data URI: the vector file unless it is large."""
    path = folder / f"{name}.svg"
    if path.is_file() and path.stat().st_size <= VECTOR_LIMIT:
        # As text: base64 would be a quarter larger. What is kept has no meaning in an address.
        return "data:image/svg+xml," + quote(path.read_text(encoding="utf-8"), safe=" <>=/:;,.()!?-_'")
    png = (folder / f"{name}.png").read_bytes()
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _figure(folder: Path, name: str) -> dict[str, Any]:
    sidecar = _read(folder / f"{name}.json")
    files = [f"{name}.{kind}" for kind in ("svg", "pdf", "png", "json")]
    parts = folder / f"{name}.strips.json"
    strips = _read(parts) if parts.is_file() else []
    return {
        "name": name,
        "title": sidecar["title"],
        "alt": sidecar["alt"],
        "strips": strips,
        "uri": "" if strips else _data_uri(folder, name),
        "files": [file for file in files if (folder / file).is_file()],
    }


def _verdicts(folder: Path, name: str) -> list[dict[str, Any]]:
    """A section's verdicts by claim, the intervals of one claim on one scale around zero."""
    path = folder / f"{name}.verdict.json"
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for record in _read(path) if path.is_file() else []:
        groups.setdefault((record["claim"], record["statistic"]), []).append(record)
    shown = []
    for (claim, statistic), records in groups.items():
        known = [record["interval"] for record in records if None not in record["interval"]]
        scale = Scale.around(known)
        lines = [_shown(record, scale) for record in records]
        shown.append({"claim": claim, "statistic": statistic, "lines": lines})
    return shown


@dataclass(frozen=True)
class Scale:
    """How the intervals of one claim are drawn and printed, so that they can be compared.

    reach: half the width of the plot, which has zero in its middle; digits: decimals that give the
    widest interval three figures.
    """

    reach: float
    digits: int

    @classmethod
    def around(cls, intervals: Sequence[Sequence[float]]) -> Scale:
        """The scale of these intervals; any one will do where there are none."""
        reach = 1.15 * max([abs(end) for pair in intervals for end in pair], default=1.0) or 1.0
        width = max([high - low for low, high in intervals], default=1.0) or 1.0
        return cls(reach, min(4, max(0, 2 - math.floor(math.log10(width)))))

    def place(self, value: float) -> float:
        """Percent of the plot's width."""
        return round(50 + 50 * value / self.reach, 2)

    def words(self, value: float) -> str:
        """A number as it is printed."""
        return f"{value:.{self.digits}f}".replace("-", "−")


def _shown(record: Mapping[str, Any], scale: Scale) -> dict[str, Any]:
    """A verdict with the words and the small interval plot of the page."""
    ends, plot, numbers = (*record["interval"], record["value"]), {}, ""
    if None not in ends:
        plot = dict(zip(("low", "high", "value"), map(scale.place, ends), strict=True))
        low, high, value = map(scale.words, ends)
        numbers = f"{value}{record['unit']} [{low}, {high}]"
    where = f"{labels.TASKS[record['task']]}, {labels.short_label(record['dataset'])}"
    word = FINDINGS[record["finding"]][0]
    return {**record, "plot": plot, "numbers": numbers, "where": where, "word": word}


def _tables(folder: Path, names: Iterable[str]) -> list[dict[str, Any]]:
    """Printed tables as text cells, one a dataset and domain."""
    from lib.tables import paper_layout  # reads scores only, but brings the metrics with it

    shown = []
    for name in names:
        path = folder / f"{name}.csv"
        if not path.is_file():
            continue
        for (dataset, domain), block in _read_table(path).groupby(["dataset", "domain"], sort=False):
            layout = paper_layout(block, context=domain == "all")
            task = labels.TASKS[block["task"].iloc[0]]
            place = f"{labels.dataset_label(dataset)}, {labels.DOMAINS.get(domain, domain)}"
            shown.append(
                {
                    "title": f"{task}: {place} (n = {block['n'].max()})",
                    "columns": list(layout.columns),
                    "lines": [(str(row), list(cells)) for row, cells in layout.iterrows()],
                    "main": domain == "all",
                }
            )
    return shown


def _rivals(folder: Path, name: str) -> list[str]:
    """What is said of captions that need no game, where the section's notebook has compared them."""
    from lib.tables import rival_sentences

    path = folder / f"{name}_rivals.csv"
    return rival_sentences(_read_table(path)) if path.is_file() else []


def _sections(folder: Path) -> list[dict[str, Any]]:
    """The sections whose figures are there."""
    shown = []
    for section in SECTIONS:
        present = [name for name in section.figures if (folder / f"{name}.json").is_file()]
        if not present:
            continue
        page = folder / "notebooks" / f"{section.notebook}.html"
        shown.append(
            {
                "section": section,
                "figures": [_figure(folder, name) for name in present],
                "verdicts": _verdicts(folder, section.name),
                "tables": _tables(folder, section.tables),
                "rivals": _rivals(folder, section.name),
                "link": f"notebooks/{page.name}" if page.is_file() else None,
            }
        )
    return shown


# provenance and cost


def _runs(sidecars: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """rows path -> hash of all input rows of the page's figures."""
    found: dict[str, str] = {}
    for sidecar in sidecars:
        found |= {entry["rows"]: entry["sha256"] for entry in sidecar["input"]}
    return dict(sorted(found.items()))


def _cost(paths: Sequence[str]) -> dict[str, Any]:
    """What the runs that are still on this disk cost, beside the paper's hours, as text cells.

    lines: by stage; details: the passes and TFLOP of each network.
    """
    runs = [Run(folder) for folder in _folders(paths)]
    short, whole = cost.as_text(cost_table(runs)), cost.as_text(cost_table(runs, whole=True))
    lines, details = ([(str(name), list(cells)) for name, cells in table.iterrows()]
                      for table in (short, whole.drop(index=short.index)))
    columns = [_run_label(name) for name in short.columns]
    return {"columns": columns, "lines": lines, "details": details, "note": cost.PAPER_NOTE}


def _flagged(paths: Sequence[str], wanted: bool) -> str:
    """What the safety checker, or a remote model that refused, did to the runs still on this disk."""
    counts = [Run(folder).info().get("counts", {}) for folder in _folders(paths)]
    rows, flagged, left_out = (sum(c.get(key, 0) for c in counts)
                               for key in ("rows", "flagged", "flagged_sources"))
    if not wanted and not flagged:
        return "off"
    return (f"{'on' if wanted else 'off'}: {flagged} of {rows} rows flagged, {left_out} sources with "
            "such a row left out of every comparison")


def _folders(paths: Sequence[str]) -> list[Path]:
    """The folders of runs that are still on this disk, from the paths of their rows."""
    folders = [runs_root() / Path(path).parent.name for path in paths]
    return [folder for folder in folders if (folder / "run.json").is_file()]


def _run_label(name: str) -> str:
    """A run's folder name in words: task and dataset."""
    parts = name.split("--")
    if len(parts) < 3 or parts[2] not in labels.TASKS:
        return name
    return f"{labels.TASKS[parts[2]]}, {labels.short_label(parts[1])}"


def _provenance(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    sidecars = [_read(folder / f"{name}.json") for name in names]
    first, runs = sidecars[0], _runs(sidecars)
    commits = sorted({str(s["commit"]) + (" (changed)" if s["dirty"] else "") for s in sidecars})
    facts = {
        "commit": ", ".join(commits),
        "seed": first["seed"],
        "python": first["python"],
        "system": first["system"],
        "device": first["device"] or "not asked (figures need none)",
        "java": first["java"] or "none",
        "safety checker": _flagged(list(runs), first["preset"]["generator"]["safety_checker"]),
    }
    return {
        "facts": facts,
        "versions": first["versions"],
        "preset": json.dumps(first["preset"], indent=2, ensure_ascii=False),
        "assumed": first["preset"].get("assumed", []),
        "runs": runs,
        "cost": _cost(list(runs)),
    }


def build_report(preset: Preset | str) -> Path:
    """Write figures/<preset>/index.html from what the notebooks wrote; returns its path.

    Raises UserError if no figure of the preset is there or a file beside one is damaged.
    """
    preset = get_preset(preset) if isinstance(preset, str) else preset
    folder = figures.folder(preset)
    sections = _sections(folder)
    if not sections:
        raise UserError(f"{folder} has no figures: run ./run_all.sh --preset {preset.name} first")
    names = [figure["name"] for shown in sections for figure in shown["figures"]]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    records = [line for shown in sections for v in shown["verdicts"] for line in v["lines"]]
    tally = [record["finding"] for record in records]
    played = list(dict.fromkeys(record["dataset"] for record in records)) or preset.datasets
    page = environment.get_template(TEMPLATE).render(
        preset=preset,
        selected=figures.SELECTED,
        datasets=[labels.dataset_label(name) for name in played],
        drawn=any(name.startswith("picturebook") for name in played),
        sections=sections,
        tally=[(tally.count(key), words[tally.count(key) > 1]) for key, words in FINDINGS.items()],
        total=len(tally),
        together=multiplicity.tally(records),
        provenance=_provenance(folder, names),
        notebooks=sorted(path.stem for path in (folder / "notebooks").glob("*.html")),
    )
    target = folder / "index.html"
    partial = target.with_name(".index.html.partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, target)
    return target


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: 0, or 2 with one line on bad input."""
    parser = argparse.ArgumentParser(prog="python -m lib.report", description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="mini", help="a name or a .toml file (default: mini)")
    try:
        print(build_report(parser.parse_args(arguments).preset))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
