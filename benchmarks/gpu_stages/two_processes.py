"""Stage 8: two processes on one device."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from gpu_stages.stage import Stage


def run(stage: Stage) -> None:
    """Two ranks on one device, over gloo, have the gradient of one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = [sys.executable, str(Path(__file__).parent), "rank", stage.device, str(int(stage.tiny)), str(stage.folder)]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    places = [{}, *(meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2))]
    processes = [subprocess.Popen(words, env=os.environ | place, stdout=subprocess.PIPE, text=True) for place in places]
    said = [process.communicate()[0] for process in processes]
    codes = [process.returncode for process in processes]
    if any(codes):
        raise RuntimeError(f"a process alone and two ranks ended with {codes}")
    norms = {count: json.loads(said[count - 1].splitlines()[-1]) for count in (1, 2)}
    stage.tell(ranks=norms)
    if abs(norms[1]["norm"] - norms[2]["norm"]) > 1e-3 * norms[1]["norm"]:
        raise RuntimeError("two ranks have another gradient than one")
