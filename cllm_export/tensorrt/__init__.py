"""TensorRT: plans, the engine, the loop on the device."""
