"""Service models: botocore's loader of them, without its search through the folders of all services.

Used by :mod:`~mpreader.s3.session`. botocore makes a client by the model of its service, two files of its data folder.
Before it loads one, it lists the files of all services, some 400 folders, to see if there is such a service. It does
that once for each kind of model: 20 ms, or a fifth of a first client.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from botocore.exceptions import DataNotFoundError
from botocore.loaders import Loader

__all__ = ["ModelLoader"]


class ModelLoader(Loader):
    """Loader that looks for a service when it is asked for it; in all else botocore's own.

    Args:
        loader: The loader that it replaces, whose folders it searches.
    """

    def __init__(self, loader: Loader) -> None:
        super().__init__(extra_search_paths=list(loader.search_paths), include_default_search_paths=False)

    def list_available_services(self, type_name: str) -> Any:  # a list, for whoever does more than ask for one
        """Return the services that have models of a kind, as a collection that looks for each when asked."""
        return _Services(self, type_name)

    def all_services(self, type_name: str) -> list[str]:
        """Return the names of all services that have models of a kind, in alphabetical order."""
        services: list[str] = super().list_available_services(type_name)
        return services


class _Services:
    """Names of the services that have models of a kind. ``in`` looks at the folders of that one service only."""

    def __init__(self, loader: ModelLoader, type_name: str) -> None:
        self._loader = loader
        self._type_name = type_name

    def __contains__(self, name: str) -> bool:
        try:
            return bool(self._loader.list_api_versions(name, self._type_name))
        except DataNotFoundError:
            return False

    def __iter__(self) -> Iterator[str]:
        return iter(self._loader.all_services(self._type_name))
