"""What a run will hold on a device in each stage, known before it starts."""
