"""Text of four kinds on which every model is measured: prose, code, dialogue and mathematics.

The files were written for this project, and are under its licence.
"""
