"""Ray workers: one HybridWorker a device, in a WorkerGroup over a placement group."""
