"""Nothing of Prefect is imported before its settings are said."""

import flows  # noqa: F401
