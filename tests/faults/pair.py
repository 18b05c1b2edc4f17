"""One of two ranks that try cases of exactness.py: torchrun --nproc_per_node=2 pair.py FOLDER"""

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from accelerate import PartialState

    from faults import exactness, scene

    exactness.torch.set_num_threads(1)
    PartialState.destroy_process_group = lambda *_: None  # gloo cannot meet a second time over one launcher's store
    where = scene.Scene(Path(sys.argv[1]), dict(exactness.OPTIONS))
    exactness.compare(json.loads((where.folder / "cases.json").read_text()), where.folder, where.options)
