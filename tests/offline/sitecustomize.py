"""Refuse every connection that leaves this machine; note the phases of a run where tests/faults asks for it.

Python imports this module at its start, where it is found: tests/conftest.py puts the folder on PYTHONPATH, so that
each script, worker and server which a test starts is as offline as the tests themselves.
"""

import errno
import os
import sys
from pathlib import Path

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
if trace := os.environ.get("LORA_ALPACA_TESTS_TRACE"):  # see faults/phases.py
    sys.path.append(str(Path(__file__).parent.parent))
    from faults.phases import WhenImported

    sys.meta_path.insert(0, WhenImported(trace))
