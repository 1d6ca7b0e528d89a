"""Classes of values by their bounds, as a reader would name them."""

from itertools import pairwise

from memfit.report.run_files import Run
from memfit.report.units import finite, setting_text


def class_names(run: Run, num_seen: int) -> list[str]:
    """Name the classes as the data do, or "up to 5", "5 – 10", "above 10"; by numbers where nothing fits.

    num_seen: classes that occur; edges that make fewer are not those of these classes.
    """
    named = run.manifest.get("class_names")
    if isinstance(named, list) and len(named) >= num_seen:
        return [str(name) for name in named]
    recorded = run.manifest.get("class_edges")
    edges = [edge for edge in map(finite, recorded if isinstance(recorded, list) else []) if edge is not None]
    if not edges or len(edges) + 1 < num_seen:
        return [f"class {index}" for index in range(num_seen)]
    texts = [setting_text(edge) for edge in edges]
    between = [f"{low} – {high}" for low, high in pairwise(texts)]
    return [f"up to {texts[0]}", *between, f"above {texts[-1]}"]
