# SPDX-License-Identifier: Apache-2.0
"""Who may ask: tenants by their bearer tokens, and how often each may."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Mapping

from ..errors import ConfigError
from ..files import read_yaml

LOCAL = "local"
OPERATOR = "operator"
NAME = r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"
"""What a tenant or a person may be called: a part of a path, never a path."""
_SHORTEST = 20  # characters of a token: 100 bits and more, if it is random


class Tenants:
    """Tokens by tenant, kept as digests.

    Args:
        tokens: of each tenant, one or several; 'operator' is not a tenant of people, it may read /metrics.

    Raises:
        ConfigError: a name or a token that cannot be, or a token of two tenants.
    """

    def __init__(self, tokens: Mapping[str, Iterable[str]]) -> None:
        self._digests: dict[bytes, str] = {}
        for tenant, several in tokens.items():
            if not isinstance(tenant, str) or not re.fullmatch(NAME, tenant):
                raise ConfigError(f"expected a tenant's name of letters, digits, '_' and '-', found {tenant!r:.80}")
            for token in several:
                if not isinstance(token, str) or len(token) < _SHORTEST or not token.isascii():
                    raise ConfigError(
                        f"expected tokens of at least {_SHORTEST} ASCII characters, found another one of {tenant!r}: "
                        "make one with python -c 'import secrets; print(secrets.token_urlsafe(32))'"
                    )
                if self._digests.setdefault(_digest(token), tenant) != tenant:
                    raise ConfigError(f"expected a token of its own for each tenant, found that of {tenant!r} twice")
        for tenant in tokens:
            if alike := [one for one in tokens if one != tenant and one.casefold() == tenant.casefold()]:
                raise ConfigError(
                    f"expected tenants that differ by more than capitals, found {tenant!r} and {alike[0]!r}, whose "
                    "people would share their files on many disks: give one of them another name"
                )
        if not self._digests:
            raise ConfigError("expected a token for at least one tenant, found none")

    @classmethod
    def read(cls, path: str) -> Tenants:
        """From a YAML file of 'tenant: token' or 'tenant: [token, token]'.

        Raises:
            ConfigError: the file cannot be read, others may read it, or it says something else.
        """
        found = read_yaml(path)
        if os.name == "posix" and os.stat(path).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigError(f"expected a file of tokens that its owner alone may read, found {path}: chmod 600 it")
        if not isinstance(found, dict):
            raise ConfigError(f"{path}: expected 'tenant: token' lines, found {type(found).__name__}")
        return cls({tenant: each if isinstance(each, list) else [each] for tenant, each in found.items()})

    def of(self, authorization: str | None) -> str | None:
        """The tenant of an Authorization header, in a time that says nothing of the tokens; None for nobody's."""
        kind, _, token = (authorization or "").partition(" ")
        given, found = _digest(token.strip() if kind.lower() == "bearer" else ""), None
        for digest, tenant in self._digests.items():
            if hmac.compare_digest(digest, given):
                found = tenant
        return found


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="replace")).digest()


class Rates:
    """A bucket of requests for each tenant, which fills as time goes by.

    Args:
        rate: requests a second; None for no limit. Two seconds' worth of them may come at once.
    """

    def __init__(self, rate: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._clock = rate, clock
        self._buckets: dict[str, tuple[float, float]] = {}  # tenant -> requests left, and when

    def take(self, tenant: str) -> float:
        """Take a request out of the tenant's bucket: 0, or the seconds until there is one."""
        if self._rate is None:
            return 0.0
        full, now = max(1.0, 2 * self._rate), self._clock()
        left, then = self._buckets.get(tenant, (full, now))
        left = min(full, left + (now - then) * self._rate)
        self._buckets[tenant] = (left - 1 if left >= 1 else left), now
        return 0.0 if left >= 1 else (1 - left) / self._rate
