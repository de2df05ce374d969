"""The decoding loop that runs on the device."""
