"""The README's tables of results, from the committed verdicts and measurements: `python -m lib.readme`.

With `--write` the lines between the README's two pairs of markers are replaced. A test holds the README
to what the files in `figures/mini` and `data/models/mini` say.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections import Counter
from pathlib import Path

import pandas as pd

from lib import labels, multiplicity
from lib.presets import REPO_ROOT
from lib.tables import rival_sentences

FIGURES = REPO_ROOT / "figures" / "mini"
EVALUATION = REPO_ROOT / "data" / "models" / "mini" / "evaluation.json"
README = REPO_ROOT / "README.md"

# Verdict file, notebook, how the README names it, and which claims of the file it shows.
SHOWN = (
    ("figure3", "03", "Figure 3", "the better the reconstruction"),
    ("figure4", "04", "Figure 4", "sources that are reconstructed better"),
    ("table1", "05", "Table 1", ("the selected caption", "the selected image")),
    ("failures", "08", "Failures", ("annotation imperfection", "the generator adds")),
)
PLAYED = (("01", "image reconstruction"), ("02", "text reconstruction"))


def result_lines(figures: Path = FIGURES) -> list[str]:
    """A Markdown table, one row a verdict, and a sentence on the time that playing took."""
    lines = ["| figure | draw again | time | claim | measured | n | finding |", "|---|---|---|---|---|---|---|"]
    times = read_times(figures)
    for name, notebook, title, start in SHOWN:
        command = f"`./run_all.sh --only {notebook}` | {times[notebook]:.0f} s"
        for verdict in json.loads((figures / f"{name}.verdict.json").read_text(encoding="utf-8")):
            if not verdict["claim"].startswith(start) or verdict["value"] is None:
                continue
            low, high = ("–" if bound is None else f"{bound:.2f}" for bound in verdict["interval"])
            where = f"{verdict['task']}, {labels.short_label(verdict['dataset'])}"
            claim = re.sub(r" \([^)]*\)$", "", verdict["claim"])
            score = f"{gain[1]} " if (gain := re.match("gain in (.+)", verdict["statistic"])) else ""
            measured = f"{score}{verdict['value']:.2f}{verdict['unit']} [{low}, {high}]"
            lines.append(f"| {title} | {command} | {where}: {claim} | {measured} | {verdict['n']} | {verdict['finding']} |")
    minutes = " and ".join(f"{times[number] / 60:.1f} min ({what})" for number, what in PLAYED)
    took = f"Playing and scoring took {minutes}, the other notebooks {drawn_seconds(times):.0f} s together."
    return [*lines, "", *verdict_summary(figures), "", *greedy_lines(figures), "", took]


def verdict_summary(figures: Path) -> list[str]:
    """Sentences that count all verdicts, by themselves and together; a line for each that is reversed."""
    files = sorted(figures.glob("*.verdict.json"))
    verdicts = [verdict for path in files for verdict in json.loads(path.read_text(encoding="utf-8"))]
    found = Counter(verdict["finding"] for verdict in verdicts)
    counts = ", ".join(multiplicity.counted(count, finding) for finding, count in found.most_common())
    against = [f"{verdict['task']}, {labels.short_label(verdict['dataset'])}: {verdict['claim']}"
               for verdict in verdicts if verdict["finding"] == "reversed"]
    together = multiplicity.tally(verdicts)
    return [f"All {len(verdicts)} verdicts: {counts}. {together}".rstrip(), *(f"- Reversed: {claim}." for claim in against)]


def greedy_lines(figures: Path) -> list[str]:
    """What Table 1 shows beside the claim: CIDEr of captions that need no game, and whether they say more."""
    with (figures / "table1.csv").open(encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["domain"] == "all" and row["metric"] == "cider"]
    kinds = {"nucleus": "nucleus", "selected": "selected", "likeliest": "most probable candidate",
             "greedy": "greedy", "oracle": "oracle"}
    scores = [", ".join(f"{name} {100 * float(row[kind]):.0f}" for kind, name in kinds.items() if row.get(kind))
              for row in rows]
    said = [f"- CIDEr, {labels.short_label(row['dataset'])}: {text}." for row, text in zip(rows, scores, strict=True)]
    kept = figures / "table1_rivals.csv"
    rivals = pd.read_csv(kept) if kept.is_file() else pd.DataFrame(columns=["dataset", "rival"])
    return [*said, *(f"- {line}" for line in rival_sentences(rivals[rivals["rival"] == "greedy"]))]


def read_times(figures: Path) -> dict[str, float]:
    """Seconds that each notebook took, by its number."""
    kept = json.loads((figures / "times.json").read_text(encoding="utf-8"))
    return {name[:2]: entry["seconds"] for name, entry in kept.items()}


def drawn_seconds(times: dict[str, float]) -> float:
    """What all notebooks took that only read rows."""
    return sum(seconds for number, seconds in times.items() if number not in dict(PLAYED))


def model_lines(evaluation: Path = EVALUATION) -> list[str]:
    """A Markdown table of the measures that have a target, and of the accessory plant."""
    lines = ["| measure | value | target | |", "|---|---|---|---|"]
    for measure in json.loads(evaluation.read_text(encoding="utf-8"))["measures"]:
        target = measure["target"]
        if target is None and not measure["name"].startswith("generator: accessory"):
            continue
        verdict = "" if target is None else "reached" if measure["value"] >= target else "**missed**"
        lines.append(f"| {measure['name']} | {measure['value']:.3f} | {'' if target is None else target} | {verdict} |")
    return lines


def rewrite(text: str) -> str:
    """The README's text with both tables replaced."""
    for marker, lines in (("results", result_lines()), ("models", model_lines())):
        block = "\n".join([f"<!-- {marker} -->", *lines, f"<!-- end of {marker} -->"])
        text = re.sub(f"<!-- {marker} -->.*<!-- end of {marker} -->", lambda _, b=block: b, text, flags=re.DOTALL)
    return text


def main() -> None:
    """Print the tables, or write them into the README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the tables in README.md")
    if parser.parse_args().write:
        README.write_text(rewrite(README.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("\n".join([*result_lines(), "", *model_lines()]))


if __name__ == "__main__":
    main()
