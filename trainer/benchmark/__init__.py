"""Measurements that anyone can run again: how long things take here, and how sure that is."""

from typing import Final

PUBLIC: Final[dict[str, str]] = {}
