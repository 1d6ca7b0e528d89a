"""One self-contained HTML page from the files of a run directory."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from memfit import __version__
from memfit.errors import RunStateError
from memfit.files import write_text
from memfit.report.blocks import Section
from memfit.report.run_files import Run, read_run
from memfit.report.sections.data import data
from memfit.report.sections.export import export
from memfit.report.sections.headline import headline
from memfit.report.sections.health import health
from memfit.report.sections.illustrations import illustrations
from memfit.report.sections.plan import plan
from memfit.report.sections.predictions import predictions
from memfit.report.sections.provenance import config, environment, steps
from memfit.report.sections.scores import scores
from memfit.report.sections.training import memory, training

SectionMaker = Callable[[Run], Section | None]
"""Turns a run into one part of the page; None where it has no place on this run's page."""

SECTIONS: tuple[SectionMaker, ...] = (
    scores,
    predictions,
    illustrations,
    plan,
    training,
    health,
    memory,
    data,
    export,
    steps,
    environment,
    config,
)


def write_report(run_dir: Path, *, sections: Sequence[SectionMaker] = SECTIONS) -> Path:
    """Write `report.html` into a run directory, atomically, and return its path.

    Reads only the run directory and the manifest that its run.json names; what does not exist yet is shown as
    such. A workload adds to the page by passing a longer list of sections. Raises RunStateError where there is no
    such directory.
    """
    if not run_dir.is_dir():
        raise RunStateError(f"report: expected a run directory at {run_dir}, got none. Give runs/<name>/<run id>.")
    path = run_dir / "report.html"
    write_text(path, render(read_run(run_dir), sections))
    return path


def render(run: Run, sections: Sequence[SectionMaker] = SECTIONS) -> str:
    """Return the page of a run as one HTML document."""
    made = [section for make in sections if (section := make(run)) is not None]
    return _template().render(top=headline(run), sections=made, version=__version__)


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("memfit.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2")
