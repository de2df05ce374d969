"""The loop that stays on the device."""
