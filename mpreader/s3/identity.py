"""Identity: facts of the credentials that botocore finds, for the doctor; without the credentials themselves.

Used by :mod:`~mpreader.s3.account`, which also gets the secrets, only to remove them from every text that it returns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Final

import botocore.session
from botocore.credentials import Credentials
from botocore.utils import parse_timestamp

from mpreader.errors import ConfigError
from mpreader.s3.credentials import ProviderFailed, find_credentials, freeze

__all__ = ["Identity", "find_identity"]

# Sources whose credentials botocore does not renew, by its own names. From all others it fetches new ones before the
# old ones expire.
_UNRENEWED: Final = ("env", "shared-credentials-file", "config-file")
# Shorter secrets are not removed from messages. They are those of test servers, such as "test", a word that a message
# may hold for other reasons.
_MIN_SECRET_LENGTH: Final = 8


@dataclass(frozen=True, slots=True)
class Identity:
    """Facts of the credentials that botocore finds.

    Attributes:
        source: Source of the credentials, in botocore's words, such as ``"env"``; "" if there are none.
        profile: Name of the profile in force.
        expires: Time at which they expire, in UTC; None if they never expire, or the time is not known.
        is_renewed: True if botocore fetches new ones by itself before that time.
        lacks_token: True if they are temporary credentials without their session token.
    """

    source: str
    profile: str
    expires: datetime | None = None
    is_renewed: bool = False
    lacks_token: bool = False


def find_identity(core: botocore.session.Session) -> tuple[Identity, tuple[str, ...]]:
    """Find the credentials, and fetch them if they are those of a role or another service.

    Args:
        core: A session of botocore whose providers are watched; see :mod:`mpreader.s3.credentials`.

    Returns:
        Their facts, and their secrets: every text about them must be cleaned of these.

    Raises:
        ConfigError: They can't be had without a person.
        ProviderFailed: They can't be found or fetched.
    """
    profile = core.get_config_variable("profile") or "default"
    settings = core.get_scoped_config()
    if "mfa_serial" in settings and "role_arn" in settings:
        # Finding such credentials would make botocore ask for the code on the terminal, and wait.
        raise ConfigError(f"the profile {profile} asks for an MFA code each time, which a job can't give")
    credentials = find_credentials(core)
    if credentials is None:
        return Identity("", profile), ()
    key, secret, token = _fetch(credentials)
    expires = getattr(credentials, "_expiry_time", None)  # botocore has no public name for it
    identity = Identity(
        source=credentials.method,
        profile=profile,
        expires=expires or _noted_expiry(credentials.method, settings),
        is_renewed=credentials.method not in _UNRENEWED,
        lacks_token=key.startswith("ASIA") and not token,
    )
    return identity, tuple(text for text in (secret, token, key) if len(text) >= _MIN_SECRET_LENGTH)


def _fetch(credentials: Credentials) -> tuple[str, str, str]:
    """Return the id of the access key, the secret key and the session token, all "" if they have expired."""
    try:
        frozen = freeze(credentials)
    except ProviderFailed as failure:
        if not failure.has_expired:
            raise
        return "", "", ""
    return frozen.access_key or "", frozen.secret_key or "", frozen.token or ""


def _noted_expiry(source: str, settings: Mapping[str, object]) -> datetime | None:
    """Return the time at which credentials of a file expire, if a tool has noted it beside them; else None."""
    if source not in _UNRENEWED[1:]:  # of these only the environment is not a file
        return None
    for name, value in settings.items():
        # Each tool has its own name for it, such as "expiration" or "x_security_token_expires".
        if "expir" in name.lower() and isinstance(value, str):
            with contextlib.suppress(ValueError, RuntimeError):  # not a time
                expires: datetime = parse_timestamp(value)
                return expires if expires.tzinfo else expires.replace(tzinfo=timezone.utc)
    return None
