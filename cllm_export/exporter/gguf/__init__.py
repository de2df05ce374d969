"""Imports a GGUF file as a checkpoint: reads it, refuses it by name, and streams its weights into safetensors."""
