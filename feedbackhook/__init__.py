"""Send backprop's error signals through feedback weights of your choice, in any PyTorch network as it is."""
