"""TensorRT: plans, the engine and the loop on the device."""
