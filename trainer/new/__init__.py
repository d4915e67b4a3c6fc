"""The tool `trainer new`, which makes a project of the user's own from this repository."""

PUBLIC: dict[str, str] = {}
