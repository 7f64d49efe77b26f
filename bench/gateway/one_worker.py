"""One worker of the gateway on a listening socket of its own: `one_worker.py gateway.json`.

Elsewhere systemd's socket unit makes the socket.
"""

import socket
import sys

from citadel_gateway.cli.main import main
from citadel_gateway.settings import Gateway, read

config = sys.argv[1]
settings = read(config, Gateway)
listener = socket.create_server((settings.listen.address, settings.listen.port), backlog=4096)
sys.exit(main(["worker", "1", "--config", config, "--listen-fd", str(listener.fileno())]))
