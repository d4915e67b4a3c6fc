"""The tool `trainer runs`, which lists, compares and removes runs."""

PUBLIC: dict[str, str] = {}
