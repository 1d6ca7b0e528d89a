"""What a finished model was asked to show: texts that it continued, how much each expert is used."""

from memfit.report.blocks import Block, Cell, Code, Column, Heading, Row, Section, Table
from memfit.report.run_files import Run, mapping, objects
from memfit.report.units import finite, share_text


def illustrations(run: Run) -> Section | None:
    """Show generated texts as they are, and the experts' shares; None where the workload has neither."""
    shown = mapping(run.evaluation, "illustrations")
    blocks: list[Block] = []
    for text in objects(shown.get("texts")):
        blocks += [
            Heading(str(text.get("how", "")), "a test document's beginning ▸ what the model goes on with"),
            Code(f"{text.get('prompt', '')} ▸ {text.get('text', '')}"),
        ]
    loads = shown.get("expert_loads")
    if isinstance(loads, list) and loads:
        blocks += [Heading("Experts", "mean share of a token's mixture, on test samples"), _loads(loads)]
    return Section("illustrations", "What the model writes", tuple(blocks)) if blocks else None


def _loads(loads: list[object]) -> Table:
    shares = [(index, share) for index, share in enumerate(map(finite, loads)) if share is not None]
    rows = tuple(Row((Cell(str(index)), Cell(share_text(share), bar=share))) for index, share in shares)
    return Table((Column("Expert"), Column("Share", number=True)), rows)
