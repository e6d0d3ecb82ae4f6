"""Prompt datasets, the loader, and the tasks that come with the package."""
