"""The tool `trainer doctor`, which checks this machine and the installation."""
