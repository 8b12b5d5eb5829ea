"""Version of the package, in a module that imports nothing: every other module, and the build, may read it."""

from __future__ import annotations

__version__ = "0.1.0"
