"""Stands in for `cpbench.estimate_server` where cases need no torch: the same server, but nothing is loaded first.

A child runs two cases at most.
"""

from __future__ import annotations

import socket
import sys

from cpbench.estimate_server import Server
from cpbench.worker import leave

if __name__ == "__main__":
    Server(socket.socket(fileno=int(sys.argv[1])), most_cases=2).serve()
    leave(0)
