"""The tool `trainer doctor`, which checks this machine and the installation."""

PUBLIC: dict[str, str] = {}
