"""Ray workers: one HybridWorker a device, in a WorkerGroup over a placement group."""

from rlhf_npu.garbage import search_seldom

search_seldom()  # a worker is imported here first, and the engines next; WorkerGroup.start ends it
