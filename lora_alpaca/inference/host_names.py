"""The names of this machine under which a page or an API is served.

What answers under any name can be used by a page from elsewhere whose name is made to point here (DNS rebinding).
"""

import ipaddress
import socket
from collections.abc import Collection
from urllib.parse import urlsplit


def own_names(host: str) -> set[str]:
    """Return the names under which what listens on `host` is reached."""
    names = {"localhost", "127.0.0.1", "::1", host.lower()}
    return names | {socket.gethostname().lower(), socket.getfqdn().lower()} if _is_any(host) else names


def is_own(address: str, host: str, names: Collection[str]) -> bool:
    """Return whether an address (`//name:port`, or an origin) is among the names of what listens on `host`."""
    try:
        name = (urlsplit(address).hostname or "").rstrip(".")
    except ValueError:
        return False
    return name in names or (_is_any(host) and _is_number(name))  # a number cannot be rebound


def _is_any(host: str) -> bool:
    """Return whether a server listens on every address of the machine."""
    return _is_number(host) and ipaddress.ip_address(host).is_unspecified


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
