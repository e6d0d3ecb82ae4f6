"""What a model does on a device: policy, critic, reference, scorer, and the tensors that pass between them."""
