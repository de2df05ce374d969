"""What commands can refuse before they import an engine or torch: files, rows, numbers that a manifest bounds.

The same checks run again where the files are read. Here they name the option, and cost no time.
"""
