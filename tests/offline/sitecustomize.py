"""Refuse every connection that leaves this machine.

Python imports this module at its start, where it is found: tests/conftest.py puts the folder on PYTHONPATH, so that
each script, worker and server which a test starts is as offline as the tests themselves.
"""

import errno
import sys

LOCAL = {"localhost", "::1", "::", "0.0.0.0"}


def refuse(event: str, args: tuple[object, ...]) -> None:
    """Raise OSError, as a machine without a network does, before a socket reaches anything but this machine."""
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = args[1]
        host = address[0] if isinstance(address, tuple) else ""  # no tuple: a Unix socket, or one that is connected
    elif event == "socket.getaddrinfo":
        host = args[0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else str(host or "localhost")
    if host not in LOCAL and not host.startswith("127."):
        raise OSError(errno.ENETUNREACH, f"tests run offline; this one asked for {host}")


sys.addaudithook(refuse)
