"""Adds configs/ to a wheel, as trainer/configs. Everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Copies the shipped configurations, too. An editable installation reads them in place."""

    def run(self) -> None:
        """Runs the command."""
        super().run()
        if not self.editable_mode:
            folder = Path(self.build_lib, "trainer", "configs")
            self.mkpath(str(folder))
            for path in Path("configs").glob("*.toml"):
                self.copy_file(str(path), str(folder / path.name))


setup(cmdclass={"build_py": BuildWithConfigs})
