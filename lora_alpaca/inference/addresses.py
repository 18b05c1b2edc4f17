"""The address that a page or an API listens on, found and taken before a model is loaded."""

import errno
import ipaddress
import socket
from collections.abc import Iterable
from typing import NamedTuple

from lora_alpaca.errors import ConfigError


class Address(NamedTuple):
    """A socket that listens, its port, and whether it is this machine's alone."""

    socket: socket.socket
    port: int
    is_private: bool


def listen(host: str, port: int | None, ports: Iterable[int]) -> Address:
    """Return a socket that listens on a port, on the first free one of several if none is asked for.

    Raises ConfigError for an address that cannot be listened on.
    """
    try:
        family, *_, (address, *_) = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise ConfigError(f"--server_name {host}: no such host; 127.0.0.1 is this machine") from None
    candidates = list(ports) if port is None else [port]
    for candidate in candidates:
        try:
            opened = socket.create_server((str(address), candidate), family=family, backlog=1024)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise ConfigError(f"--server_name {host}: not an address of this machine") from None
            if error.errno != errno.EADDRINUSE:
                raise ConfigError(f"--server_port {candidate}: {error.strerror}") from None
        else:
            return Address(opened, opened.getsockname()[1], ipaddress.ip_address(address).is_loopback)
    asked = f"{candidates[0]} to {candidates[-1]} are" if port is None else f"{port} is"
    raise ConfigError(f"--server_port: {asked} in use; name another one, or leave the flag out for the next free one")
