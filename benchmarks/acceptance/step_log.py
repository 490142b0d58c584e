"""Record the steps of an acceptance run on disk, each before the next begins.

A leg is a list of steps in a file of its own, LEG.json. A step keeps a promise, breaks it, fails, is skipped with a
reason, or only measures. Reports are made of these files alone.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, Literal

from benchmarks.acceptance import targets
from runtime.core.errors import CheckFailed, GroundingError, ModelFileError
from runtime.core.io.atomic_files import write_json, write_text
from runtime.core.io.input_files import read_json

log = logging.getLogger("drn")

FORMAT = "drn-gpu/2"
Outcome = Literal["kept", "measured", "broken", "failed", "skipped"]
# A leg that has ended says finished or skipped; one that was cut off, or ran chosen steps only, goes on where it was.
State = Literal["unfinished", "finished", "skipped", "chosen"]
BAD = ("broken", "failed")
# A step in which a leg is cut off so many times hangs, and must not keep it from the next.
MOST_TRIES = 2


class Skip(Exception):
    """A step or a leg cannot run here; the message says why."""


class OutOfTime(Exception):
    """A leg's time is over before its last step."""


Table = tuple[Sequence[str], Sequence[Sequence[str]]]


@dataclasses.dataclass(frozen=True)
class Found:
    """What a step came to.

    Attributes:
        told: in a sentence.
        values: for the JSON file.
        broken: promises that do not hold, a clause each.
        judged: whether there was a promise at all.
        tables: header and rows, for the Markdown report, by their titles.
    """

    told: str
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    broken: Sequence[str] = ()
    judged: bool = True
    tables: Mapping[str, Table] = dataclasses.field(default_factory=dict)


def no_promise(told: str, values: Mapping[str, Any] | None = None, tables: Mapping[str, Table] | None = None) -> Found:
    """Return what was measured where nothing was promised."""
    return Found(told, values or {}, judged=False, tables=tables or {})


class Leg:
    """One leg, as far as it has come. Its file is written at every change, whole or not at all."""

    def __init__(
        self,
        path: Path,
        name: str,
        about: Mapping[str, Any],
        deadline: float | None = None,
        chosen: Collection[str] = (),
    ) -> None:
        """Go on with what `path` holds if that was cut off under the same settings, else begin.

        Args:
            path: LEG.json.
            name: of the leg.
            about: command, settings and machine, for the file.
            deadline: when no further step begins, in seconds since the epoch.
            chosen: steps to take; all if empty.
        """
        self.path, self.deadline, self.chosen = path, deadline, frozenset(chosen)
        self.content: dict[str, Any] = {
            "format": FORMAT,
            "leg": name,
            "state": "unfinished",
            "told": "",
            "running": None,
            "cut_off": [],
            "date": date.today().isoformat(),
            "about": dict(about),
            "steps": [],
        }
        if path.is_file():
            found = read_leg(path)
            if found["state"] in ("unfinished", "chosen") and found["about"].get("settings") == about.get("settings"):
                self.content["steps"] = found["steps"]
                # A step that is still running was ended with its process.
                self.content["cut_off"] = [*found.get("cut_off", []), *filter(None, [found["running"]])]
        self.save()

    def save(self) -> None:
        write_json(self.path, _plain(self.content))

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return float("inf") if self.deadline is None else self.deadline - time.time()

    def step(self, name: str, function: Callable[[], Found]) -> bool:
        """Take a step unless it was taken before the leg was cut off, and return whether all is well.

        A step that was not chosen is left out, which counts as not well. Whatever goes wrong is written down and no
        obstacle to the next step.

        Raises:
            OutOfTime: the deadline has passed, or came before the step could be judged.
        """
        for entry in self.content["steps"]:
            if entry["name"] == name:
                return entry["outcome"] not in (*BAD, "skipped")
        if self.chosen and name not in self.chosen:
            return False
        if self.left <= 0:
            raise OutOfTime
        if self.content["cut_off"].count(name) >= MOST_TRIES:
            function = _hanging
        self.content["running"] = name
        self.save()
        log.info("%s: %s ...", self.content["leg"], name)
        began = time.perf_counter()
        try:
            entry = {"name": name, **_taken(function), "seconds": round(time.perf_counter() - began, 2)}
        except OutOfTime:
            self.content["running"] = None
            self.save()
            raise
        self.content["steps"].append(entry)
        self.content["running"] = None
        self.save()
        log.info("  %s: %s", entry["outcome"], entry["told"])
        return entry["outcome"] not in (*BAD, "skipped")

    def end(self, state: State, told: str = "") -> None:
        """Say how the leg ended."""
        self.content.update(state=state, told=told, running=None)
        self.save()


def _hanging() -> Found:
    raise GroundingError("It was cut off twice when the time of the leg was over, and is not tried again.")


def _taken(function: Callable[[], Found]) -> dict[str, Any]:
    """Return the outcome of a step, whatever it raises but an interruption or the end of the leg's time."""
    try:
        found = function()
    except OutOfTime:
        raise
    except Skip as reason:
        return _entry("skipped", str(reason))
    except CheckFailed as error:
        return _entry("broken", str(error))
    except GroundingError as error:
        return _entry("failed", str(error))
    except Exception as error:
        log.exception("This should not have happened:")
        first = (str(error).strip() or "without a word").splitlines()[0]
        return _entry("failed", f"{type(error).__name__}: {first}")
    if found.broken:
        return _entry("broken", f"{found.told} Broken: {'; '.join(found.broken)}.".strip(), found)
    return _entry("kept" if found.judged else "measured", found.told, found)


def _plain(value: Any) -> Any:
    """Return a value as JSON can hold it: what is no number becomes its name, where it was measured as such."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    # NumPy's scalars are no numbers to JSON.
    value = value.item() if hasattr(value, "item") else value
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _entry(outcome: Outcome, told: str, found: Found | None = None) -> dict[str, Any]:
    return {
        "outcome": outcome,
        "told": told,
        "values": dict(found.values) if found else {},
        "broken": list(found.broken) if found else [],
        "tables": [
            {"title": title, "header": list(header), "rows": [list(row) for row in rows]}
            for title, (header, rows) in (found.tables.items() if found else ())
        ],
    }


def read_leg(path: Path) -> dict[str, Any]:
    """Return the content of a leg's file; ModelFileError if it is none."""
    content = read_json(path, "results of a leg", ModelFileError)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ModelFileError(f"{path} should hold the results of a leg and does not; remove it and run the leg again.")
    return content


def record_crash(path: Path, code: int) -> bool:
    """Write down that the process of a leg ended by itself with `code`; return whether the leg can go on behind it."""
    content = read_leg(path)
    step = content["running"]
    if content["state"] != "unfinished" or step is None:
        return False
    told = f"The process ended with code {code} in this step, where it should have gone on."
    content["steps"].append({"name": step, **_entry("failed", told), "seconds": None})
    content["running"] = None
    write_json(path, content)
    return True


def kept(content: Mapping[str, Any]) -> bool:
    """Return whether a leg ran to its end, or that of its chosen steps, kept every promise, and did anything at all.

    A skip is never a pass.
    """
    outcomes = [step["outcome"] for step in content["steps"]]
    done = any(outcome in ("kept", "measured") for outcome in outcomes)
    return content["state"] in ("finished", "chosen") and done and not any(outcome in BAD for outcome in outcomes)


def gather(directory: Path, legs: Sequence[str], machine: Mapping[str, Any], name: str) -> tuple[Path, Path]:
    """Write all legs of a directory into one JSON file and a Markdown report, and return where."""
    contents = [read_leg(path) for leg in legs if (path := directory / f"{leg}.json").is_file()]
    today = date.today().isoformat()
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    stem = directory / f"gpu-{today}-{slug}"
    whole = {"format": FORMAT, "date": today, "name": name, "machine": dict(machine), "legs": contents}
    paths = stem.with_name(f"{stem.name}.json"), stem.with_name(f"{stem.name}.md")
    write_json(paths[0], whole)
    write_text(paths[1], markdown(whole))
    return paths


def verdict(content: Mapping[str, Any]) -> str:
    """Return in a phrase how a leg ended."""
    outcomes = [step["outcome"] for step in content["steps"]]
    counts = {outcome: outcomes.count(outcome) for outcome in ("kept", "measured", *BAD, "skipped")}
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count) or "no step"
    if content["state"] == "skipped":
        return f"skipped: {content['told']}"
    if content["state"] == "unfinished":
        where = f" in “{content['running']}”" if content["running"] else ""
        return f"not finished, cut off{where} ({told}); the same command goes on"
    part = "of the chosen steps " if content["state"] == "chosen" else ""
    return f"{part}{'every promise is kept' if kept(content) else 'NOT KEPT'} ({told})"


def markdown(whole: Mapping[str, Any]) -> str:
    """Return the report of all legs."""
    machine = whole["machine"]
    versions = ", ".join(f"{library} {version}" for library, version in machine.get("versions", {}).items())
    lines = [
        f"# GPU acceptance: {whole['name']}, {whole['date']}",
        "",
        f"{machine.get('told', '')} {versions}.".strip(),
        "",
    ]
    if machine.get("note"):
        lines += [f"**{machine['note']}**", ""]
    lines += ["| leg | verdict |", "| --- | --- |"]
    lines += [f"| {leg['leg']} | {_cell(verdict(leg))} |" for leg in whole["legs"]]
    lines += ["", "## The bar", "", *_table(targets.HEADER, targets.rows(whole["legs"]))]
    for leg in whole["legs"]:
        if not leg["steps"]:
            continue
        lines += ["", f"## {leg['leg']}", "", f"{leg['date']}, `{leg['about'].get('command', '')}`", ""]
        lines += ["| step | outcome | seconds | what was found |", "| --- | --- | --- | --- |"]
        for step in leg["steps"]:
            seconds = "" if step["seconds"] is None else f"{step['seconds']:.1f}"
            lines.append(f"| {_cell(step['name'])} | {step['outcome']} | {seconds} | {_cell(step['told'])} |")
        for step in leg["steps"]:
            for table in step["tables"]:
                lines += ["", f"### {table['title']}", "", *_table(table["header"], table["rows"])]
    return "\n".join(lines) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(map(_cell, row))} |" for row in (header, ["---"] * len(header), *rows)]


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")
