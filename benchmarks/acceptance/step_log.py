"""Record the steps of each leg of an acceptance run in LEG.json, and write reports of these files.

The outcome of a step is kept (its check passed), broken (its check failed), failed (an error), skipped, or measured
(without a check).
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
# A leg in the state unfinished or chosen (only chosen steps ran) can resume.
State = Literal["unfinished", "finished", "skipped", "chosen"]
BAD = ("broken", "failed")
# A step in which a leg was cut off this many times is skipped.
MAX_TRIES = 2


class Skip(Exception):
    """A step or a leg cannot run on this machine, for the reason in the message."""


class OutOfTime(Exception):
    """The time limit of a leg has passed before its last step."""


Table = tuple[Sequence[str], Sequence[Sequence[str]]]


@dataclasses.dataclass(frozen=True)
class Found:
    """The result of a step.

    Attributes:
        told: one sentence.
        values: values for the JSON file.
        broken: a clause for each check that failed.
        judged: whether the step has a check.
        tables: title to header and rows, for the Markdown report.
    """

    told: str
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    broken: Sequence[str] = ()
    judged: bool = True
    tables: Mapping[str, Table] = dataclasses.field(default_factory=dict)


def no_promise(told: str, values: Mapping[str, Any] | None = None, tables: Mapping[str, Table] | None = None) -> Found:
    """Return the result of a step without a check."""
    return Found(told, values or {}, judged=False, tables=tables or {})


class Leg:
    """The state of a leg; every change is written to its file atomically."""

    def __init__(
        self,
        path: Path,
        name: str,
        about: Mapping[str, Any],
        deadline: float | None = None,
        chosen: Collection[str] = (),
    ) -> None:
        """Resume from `path` if a leg with the same settings was cut off, else start.

        Args:
            path: LEG.json.
            name: name of the leg.
            about: command, settings and machine, for the file.
            deadline: time after which no step starts, in seconds since the epoch.
            chosen: steps to run; all if empty.
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
            recorded = read_leg(path)
            same = recorded["about"].get("settings") == about.get("settings")
            if recorded["state"] in ("unfinished", "chosen") and same:
                self.content["steps"] = recorded["steps"]
                # The process of a step that is recorded as running was killed.
                self.content["cut_off"] = [*recorded.get("cut_off", []), *filter(None, [recorded["running"]])]
        self.save()

    def save(self) -> None:
        """Write the file."""
        write_json(self.path, _plain(self.content))

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return float("inf") if self.deadline is None else self.deadline - time.time()

    def step(self, name: str, function: Callable[[], Found]) -> bool:
        """Run a step, unless it ran before the leg was cut off. Errors are recorded, and do not stop the leg.

        Returns:
            Whether its outcome is kept or measured; False for a step that was not chosen.

        Raises:
            OutOfTime: the deadline has passed before the step had an outcome.
        """
        for entry in self.content["steps"]:
            if entry["name"] == name:
                return entry["outcome"] not in (*BAD, "skipped")
        if self.chosen and name not in self.chosen:
            return False
        if self.left <= 0:
            raise OutOfTime
        if self.content["cut_off"].count(name) >= MAX_TRIES:
            function = _hanging
        self.content["running"] = name
        self.save()
        log.info("%s: %s ...", self.content["leg"], name)
        started = time.perf_counter()
        try:
            entry = {"name": name, **_taken(function), "seconds": round(time.perf_counter() - started, 2)}
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
        """Record the end of the leg."""
        self.content.update(state=state, told=told, running=None)
        self.save()


def _hanging() -> Found:
    raise GroundingError(f"The leg was cut off in this step {MAX_TRIES} times. Repeat with a higher --limit.")


def _taken(function: Callable[[], Found]) -> dict[str, Any]:
    """Run a step and return its entry; exceptions other than interruptions and `OutOfTime` become an outcome."""
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
        log.exception("Unexpected error:")
        first = (str(error).strip() or "no message").splitlines()[0]
        return _entry("failed", f"{type(error).__name__}: {first}")
    if found.broken:
        return _entry("broken", f"{found.told} Broken: {'; '.join(found.broken)}.".strip(), found)
    return _entry("kept" if found.judged else "measured", found.told, found)


def _plain(value: Any) -> Any:
    """Return a value for JSON; numbers that are not finite become text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    # The json module does not support NumPy scalars.
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
    """Return the content of LEG.json.

    Raises:
        ModelFileError: the file has another format.
    """
    content = read_json(path, "results of a leg", ModelFileError)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ModelFileError(
            f"{path}: expected results of a leg ({FORMAT}), got another format. Remove it and run the leg again.",
            code="unknown_format",
        )
    return content


def record_crash(path: Path, code: int) -> bool:
    """Record that the process of a leg ended with `code` in a step; return whether the leg can continue after it."""
    content = read_leg(path)
    step = content["running"]
    if content["state"] != "unfinished" or step is None:
        return False
    summary = f"The process ended with code {code} in this step."
    content["steps"].append({"name": step, **_entry("failed", summary), "seconds": None})
    content["running"] = None
    write_json(path, content)
    return True


def kept(content: Mapping[str, Any]) -> bool:
    """Return whether a leg ended without a failed check or error, and at least one step was not skipped."""
    outcomes = [step["outcome"] for step in content["steps"]]
    done = any(outcome in ("kept", "measured") for outcome in outcomes)
    return content["state"] in ("finished", "chosen") and done and not any(outcome in BAD for outcome in outcomes)


def gather(directory: Path, legs: Sequence[str], machine: Mapping[str, Any], name: str) -> tuple[Path, Path]:
    """Write all legs of a directory to a JSON file and a Markdown report, and return both paths."""
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
    """Return a phrase for the end of a leg."""
    outcomes = [step["outcome"] for step in content["steps"]]
    counts = {outcome: outcomes.count(outcome) for outcome in ("kept", "measured", *BAD, "skipped")}
    summary = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count) or "no step"
    if content["state"] == "skipped":
        return f"skipped: {content['told']}"
    if content["state"] == "unfinished":
        where = f" in “{content['running']}”" if content["running"] else ""
        return f"not finished, cut off{where} ({summary}); repeat the command to continue"
    part = "chosen steps " if content["state"] == "chosen" else ""
    return f"{part}{'passed' if kept(content) else 'FAILED'} ({summary})"


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
