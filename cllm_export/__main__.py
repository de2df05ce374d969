"""``python -m cllm_export``: the command line, as launchers of several processes start it."""

from cllm_export.cli import main

if __name__ == "__main__":
    main()
