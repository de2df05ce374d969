"""TensorRT for RTX itself: its parser and its builder, which need no GPU. Nothing here runs a plan."""
