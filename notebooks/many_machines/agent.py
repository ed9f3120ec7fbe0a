"""torchrun, where the hosts may share one machine.

A real host finds out by its address whether it keeps the store of the rendezvous. Two local
processes with the same address cannot, so this program says it: host 0 keeps the store.
"""

import os
import sys

from torch.distributed.run import main

OPTION = "--rdzv-conf="

if __name__ == "__main__":
    words = sys.argv[1:]
    settings = [word.removeprefix(OPTION) for word in words if word.startswith(OPTION)]
    settings.append(f"is_host={int(os.environ['HOST'] == '0')}")
    others = [word for word in words if not word.startswith(OPTION)]
    main([OPTION + ",".join(settings), f"--local-addr={os.environ['HOST_ADDRESS']}", *others])
