"""Which way a score is better, by its name."""

import re

_RISING = re.compile(r"(accuracy|f1|r2|precision|recall)(_step_\d+)?$")


def higher_is_better(name: str) -> bool:
    """Tell whether a score rises as a model improves; one that is not known is taken to fall."""
    return _RISING.search(name) is not None
