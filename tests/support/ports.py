"""A port that is free."""

import socket


def free_port() -> int:
    """Of this machine, now: the next that asks may get the same."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
