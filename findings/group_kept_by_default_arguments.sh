#!/usr/bin/env bash
# destroy_process_group ends no thread of a gloo group if torch.distributed.nn.functional was first imported while the
# group was there; DistributedDataParallel imports it, so that is the usual order.
#
# Seen with torch 2.13.0 (CPU). That module's functions have the default argument group.WORLD, which is the group itself
# if there is one at import, and None before; so the import keeps the group for good. Two pt_gloo_runloop and one
# gloo_tcp_loop then run on after the group was destroyed and the wrapper collected, into Python's own ending. Importing
# the module before init_process_group lets them end.
#     all_reduce: before 3, after 0
#     all_reduce, module imported after init_process_group: before 3, after 3
#     DistributedDataParallel: before 3, after 3
#     DistributedDataParallel, module imported before init_process_group: before 3, after 0
# Exit status: 0 as described, 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5
cd "$folder"
cat > threads.py <<'PYTHON'
import gc
import importlib
import os
import sys
import time

import torch
import torch.distributed as dist

MODULE = "torch.distributed.nn.functional"


def threads():
    found = 0
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/comm") as name:
            found += "gloo" in name.read()
    return found


work, _, order = sys.argv[1].partition(", module imported ")
if order.startswith("before"):
    importlib.import_module(MODULE)
# one process that talks to itself
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
if order.startswith("after"):
    importlib.import_module(MODULE)
if work == "all_reduce":
    dist.all_reduce(torch.ones(3))
else:
    module = torch.nn.Linear(4, 4)
    wrapped = torch.nn.parallel.DistributedDataParallel(module)
    wrapped(torch.randn(2, 4)).sum().backward()
    del module, wrapped
gc.collect()
before = threads()
dist.destroy_process_group()
gc.collect()
time.sleep(0.5)
print(f"{sys.argv[1]}: before {before}, after {threads()}", flush=True)
os._exit(0)
PYTHON
cat > expected <<'LINES'
all_reduce: before 3, after 0
all_reduce, module imported after init_process_group: before 3, after 3
DistributedDataParallel: before 3, after 3
DistributedDataParallel, module imported before init_process_group: before 3, after 0
LINES
cut -d: -f1 expected | while read -r kind; do "$folder/venv/bin/python" threads.py "$kind" < /dev/null; done | tee seen
if cmp -s seen expected; then echo "as described"; else echo "changed"; exit 1; fi
