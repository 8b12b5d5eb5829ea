"""Credentials: finds and renews those of botocore's session, and names the provider that fails.

Used by :mod:`~mpreader.s3.session` before every request, and by the doctor's :mod:`~mpreader.s3.identity`. A provider
may raise anything: it reads files, runs programs and asks services. Done here, in a step of its own, such a failure
can't be taken for one of the request: a token file that is gone is no missing object.
"""

from __future__ import annotations

import re
from typing import Any, Final

import botocore.session
from botocore.credentials import Credentials, ReadOnlyCredentials
from botocore.exceptions import (
    BotoCoreError,
    ConfigNotFound,
    ConfigParseError,
    InvalidConfigError,
    ProfileNotFound,
)
from botocore.parsers import ResponseParserError

from mpreader.s3.redaction import redacted

__all__ = ["SOURCES", "ProviderFailed", "find_credentials", "freeze", "watch_providers"]

# In words, by botocore's names of the providers.
SOURCES: Final = {
    "env": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY of the environment",
    "shared-credentials-file": "the credentials file",
    "config-file": "the configuration file",
    "iam-role": "the instance's role (IMDS)",
    "container-role": "the container's role",
    "assume-role": "an assumed role",
    "assume-role-with-web-identity": "a role for a web identity",
    "sso": "AWS SSO",
    "login": "aws login",
    "custom-process": "the profile's credential_process",
}
# Errors for which the settings must be changed, not the credentials.
_SETTINGS: Final = (ConfigNotFound, ConfigParseError, InvalidConfigError, ProfileNotFound)
# An access key and a token are sent in a header: a line break at their end, for one, can't be.
_SENDABLE: Final = re.compile(r"[\x21-\x7e]+")


class ProviderFailed(Exception):
    """A credential provider has failed. Its text names the provider, and holds no secret.

    Attributes:
        is_setting: True if a file of the configuration is wrong.
        has_expired: True if the provider has credentials, but only such as have expired.
    """

    def __init__(self, provider: str, reason: str, *, is_setting: bool = False, has_expired: bool = False) -> None:
        name = f"{SOURCES[provider]} ({provider})" if provider in SOURCES else f"the credential provider {provider}"
        super().__init__(f"no credentials could be had from {name}: {reason}")
        self.is_setting = is_setting
        self.has_expired = has_expired

    @classmethod
    def by(cls, provider: str, error: Exception) -> ProviderFailed:
        """Make it of what the provider raised, of which only the redacted text is kept."""
        return cls(
            provider,
            _reason(error),
            is_setting=isinstance(error, _SETTINGS),
            # botocore raises a plain RuntimeError; there is no class to tell it by.
            has_expired=isinstance(error, RuntimeError) and "expired" in str(error),
        )


def watch_providers(core: botocore.session.Session) -> None:
    """Make the providers of a botocore session raise :class:`ProviderFailed`, which names the one that fails."""
    resolver = core.get_component("credential_provider")
    resolver.providers = [_WatchedProvider(provider) for provider in resolver.providers]


def find_credentials(core: botocore.session.Session) -> Credentials | None:
    """Return the credentials of a watched session; None if no provider has any.

    Raises:
        ProviderFailed: A provider raised an error.
    """
    credentials: Credentials | None = core.get_credentials()
    return credentials


def freeze(credentials: Credentials) -> ReadOnlyCredentials:
    """Return keys and token; they are fetched or renewed first where that is due.

    Raises:
        ProviderFailed: They can't be, or can't be sent.
    """
    provider = str(credentials.method)
    # Raised after the block, so that no traceback and no context leads to the provider's error, which may hold secrets.
    failure: ProviderFailed | None = None
    try:
        frozen = credentials.get_frozen_credentials()
    except ProviderFailed:
        raise
    except Exception as error:  # noqa: BLE001  # a provider may raise anything
        failure = ProviderFailed.by(provider, error)
    if failure is not None:
        raise failure
    if frozen.access_key is None and frozen.secret_key is None:
        return frozen  # botocore's way to say that there are none, for which it has an error itself
    sent = (frozen.access_key, frozen.token or "-")
    if not isinstance(frozen.secret_key, str) or not all(
        isinstance(text, str) and _SENDABLE.fullmatch(text) for text in sent
    ):
        raise ProviderFailed(provider, "its access key, secret key or token is no text that can be sent")
    return frozen


class _WatchedProvider:
    """A provider of botocore whose errors become :class:`ProviderFailed`; in all else it is the provider itself."""

    def __init__(self, provider: Any) -> None:
        self._provider = provider

    def load(self) -> Any:
        failure: ProviderFailed | None = None
        try:
            return self._provider.load()
        except ProviderFailed:  # of a provider within this one
            raise
        except Exception as error:  # noqa: BLE001  # a provider may raise anything
            failure = ProviderFailed.by(str(self._provider.METHOD), error)
        raise failure

    def __getattr__(self, name: str) -> Any:
        return getattr(self._provider, name)


def _reason(error: Exception) -> str:
    """Return an error's text. Of classes that are not botocore's the class, too: many texts say little without it."""
    if isinstance(error, ResponseParserError):  # its text is the response, which may have keys in it
        return "the response is none that botocore understands"
    text = redacted(str(error))
    if isinstance(error, (BotoCoreError, OSError)) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
