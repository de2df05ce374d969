"""The command line: parse, call, print. Each module has one command or a few. This package contains no other logic."""

from cllm_export.cli import bench, build, calibrate, chat, demo, device, generate, train, verify
from cllm_export.cli.entry import main

__all__ = ["bench", "build", "calibrate", "chat", "demo", "device", "generate", "main", "train", "verify"]
