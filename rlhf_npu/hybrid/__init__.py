"""The switch between generating and training: plan, engine, reshard, ledger."""
