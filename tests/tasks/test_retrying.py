import pytest
from prefect.states import Failed

from memfit import errors
from tasks.retrying import child_died


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (errors.ChildError("died of SIGSEGV"), True),
        (errors.ChildOutOfMemoryError("ran out"), True),
        (errors.ConfigError("bad"), False),
        (errors.DataError("bad"), False),
        (errors.DoesNotFitError("too large"), False),
        (errors.RunStateError("in use"), False),
        (errors.CheckpointError("foreign"), False),
        (errors.ExportError("differs"), False),
        (errors.Resumable("stopped"), False),
        (OSError("disk full"), False),
    ],
)
def test_only_a_dead_child_is_worth_another_try(error, again):
    assert child_died(None, None, Failed(data=error)) is again
